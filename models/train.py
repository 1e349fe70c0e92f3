"""Train a model of this folder and write it as ONNX: ``python train.py lenet-5``.

Needs PyTorch besides what the project needs. The first 55,000 training images are
trained on, the last 5,000 are the validation split that every choice was made on, and
the test images are never read here: ``score.py`` does that.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from architectures import LeNet5, LeNet300, ResidualCNN, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

HERE = Path(__file__).parent
VALIDATION = 5_000
OPSET = 17


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained.

    Attributes:
        network: Makes the untrained network.
        epochs: Passes over the training images.
        rate: Highest learning rate of the one-cycle schedule.
        decay: Weight decay of AdamW.
        smoothing: Label smoothing.
        strength: Size of the distortions; 1 turns by up to 11 degrees.
        teachers: Models of this folder whose averaged answer is learned besides the
            label.
    """

    network: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float = 0.01
    smoothing: float = 0.05
    strength: float = 1.0
    teachers: tuple[str, ...] = ()


RECIPES = {
    "residual-cnn": Recipe(network=ResidualCNN, epochs=8, rate=5e-3),
    "lenet-5": Recipe(network=LeNet5, epochs=25, rate=2e-3),
    "lenet-300-100": Recipe(
        network=LeNet300, epochs=50, rate=2e-3, teachers=("lenet-5",)
    ),
    "vit": Recipe(
        network=VisionTransformer, epochs=12, rate=2e-3, teachers=("residual-cnn",)
    ),
}
BATCH = 128
EMA = 0.999
TEMPERATURE = 3.0


def augment(images: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Each image moved, turned, scaled, sheared and bent by its own small amount.

    The bending is the elastic distortion of Simard et al. (2003), with the smooth
    field drawn on a coarse grid instead of blurred.
    """
    count, size = len(images), images.shape[-1]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=random) * 2 - 1) * (strength * limit)

    angle, shear = uniform(0.2), uniform(0.2)
    grow_x, grow_y = 1 + uniform(0.15), 1 + uniform(0.15)
    shift_x, shift_y = uniform(4 / size), uniform(4 / size)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([grow_x * cos, grow_y * (shear - sin), shift_x], dim=1)
    row_y = torch.stack([grow_x * sin, grow_y * cos, shift_y], dim=1)
    affine = functional.affine_grid(
        torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False
    )
    coarse = torch.randn(count, 2, 6, 6, generator=random) * (strength * 1.4 / size)
    bend = functional.interpolate(coarse, (size, size), mode="bicubic")
    grid = affine + bend.permute(0, 2, 3, 1)
    return functional.grid_sample(images, grid, align_corners=False).clamp(0, 1)


class Teachers:
    """The mean logits of models of this folder, computed by onnxruntime."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """Open ``<name>.onnx`` for every name."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._sessions = [
            ort.InferenceSession(HERE / f"{name}.onnx", options) for name in names
        ]

    def __call__(self, images: Tensor) -> Tensor:
        """Mean logits of a batch of images."""
        feed = {"image": images.numpy()}
        answers = [session.run(["logits"], feed)[0] for session in self._sessions]
        return torch.from_numpy(np.mean(answers, axis=0))


def loss_of(
    logits: Tensor, labels: Tensor, taught: Tensor | None, smoothing: float
) -> Tensor:
    """Cross entropy with the labels and, with a teacher, divergence from it."""
    hard = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    if taught is None:
        return hard
    # Hinton et al. (2015): the square keeps the gradient's size at any temperature.
    soft = functional.kl_div(
        functional.log_softmax(logits / TEMPERATURE, dim=1),
        functional.log_softmax(taught / TEMPERATURE, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return 0.1 * hard + 0.9 * TEMPERATURE**2 * soft


def moving_average(average: Tensor, current: Tensor, count: int) -> Tensor:
    """Exponential moving average that forgets the untrained weights quickly."""
    return average + (current - average) * max(1 - EMA, 9 / (10 + int(count)))


@torch.no_grad()
def errors(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many images the network in its inference form gets wrong."""
    network.eval()
    guesses = torch.cat([network(batch).argmax(dim=1) for batch in images.split(1000)])
    return int((guesses != labels).sum())


def train(recipe: Recipe, seed: int) -> nn.Module:
    """The moving average of the weights after the last epoch."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    with np.load(HERE / "mnist.npz") as data:
        images = torch.from_numpy(data["train_x"]).unsqueeze(1).float() / 255
        labels = torch.from_numpy(data["train_y"]).long()
    seen, held_out = images[:-VALIDATION], images[-VALIDATION:]
    seen_labels, held_out_labels = labels[:-VALIDATION], labels[-VALIDATION:]

    # Only for speed: PyTorch's convolutions on a CPU like the channels last.
    network = recipe.network().to(memory_format=torch.channels_last)
    average = AveragedModel(network, avg_fn=moving_average, use_buffers=True)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.rate, weight_decay=recipe.decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.rate,
        total_steps=recipe.epochs * (len(seen) // BATCH),
        pct_start=0.2,
    )
    teachers = Teachers(recipe.teachers) if recipe.teachers else None
    start = time.monotonic()
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        order = torch.randperm(len(seen), generator=random)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            inputs = augment(seen[batch], recipe.strength, random)
            taught = teachers(inputs) if teachers else None
            loss = loss_of(
                network(inputs), seen_labels[batch], taught, recipe.smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
        wrong = errors(average, held_out, held_out_labels)
        print(
            f"epoch {epoch:3}/{recipe.epochs}  loss {loss.item():.3f}  "
            f"{wrong} of {VALIDATION} wrong  {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return average.module


def export(network: nn.Module, path: Path) -> None:
    """Write the network as ONNX, every weight under the name of its layer."""
    torch.onnx.export(
        network.eval().to(memory_format=torch.contiguous_format),
        (torch.zeros(1, 1, 28, 28),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        # PRESERVE keeps batch normalization out of the convolutions before it.
        training=torch.onnx.TrainingMode.PRESERVE,
        dynamo=False,
    )
    model = onnx.load(path)
    # A Linear on three dimensions is a MatMul by a transposed copy of its weight that
    # the exporter numbers: name it like the others, after the node's module.
    anonymous = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.name.startswith("onnx::")
    }
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in anonymous:
                layer = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
                node.input[position] = f"{layer}.weight"
                anonymous[name].name = f"{layer}.weight"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main() -> None:
    """Train the named model and replace its file in this folder."""
    parser = argparse.ArgumentParser(description="Train a model and write it as ONNX.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = train(RECIPES[options.name], options.seed)
    export(network, HERE / f"{options.name}.onnx")


if __name__ == "__main__":
    main()
