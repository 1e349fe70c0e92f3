"""Exports: networks of torch, torchvision and transformers as small ONNX files.

    python tools/bench exports FOLDER --only resnet,llama

The weights are random; what counts are the graphs. ``tools/bench channels coverage``
reads them. torch, torchvision, transformers and onnxscript are needed, in an
environment of their own; ``--legacy`` takes torch's older exporter.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["NETWORKS", "main"]


def main(arguments: Sequence[str]) -> None:
    """Write each network that the installed packages have."""
    parser = argparse.ArgumentParser(prog="exports", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--legacy", action="store_true", help="the older exporter")
    given = parser.parse_args(arguments)
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        print("torch is missing: pip install torch torchvision transformers onnxscript")
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in given.only.split(",") if name] or list(NETWORKS)
    warnings.simplefilter("ignore")
    for name in names:
        torch.manual_seed(0)
        path = given.folder / f"{name}.onnx"
        try:
            network, inputs = NETWORKS[name](torch)
            _settle(torch, network, inputs)
            torch.onnx.export(
                network,
                inputs,
                str(path),
                dynamo=not given.legacy,
                opset_version=17 if given.legacy else 20,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # another version's exporter; the rest goes on
            print(f"{name}: not written: {type(error).__name__}: {str(error)[:200]}")
            continue
        print(f"{name}: {path.stat().st_size:,} bytes", flush=True)


def _settle(torch: Any, network: Any, inputs: tuple[Any, ...]) -> None:
    """Give norms the statistics of the inputs, so that signals reach the outputs."""
    found = [m for m in network.modules() if hasattr(m, "running_mean")]
    for module in found:
        module.momentum = None  # the mean of all batches, which is this one
    if found:
        network.train()
        with torch.no_grad():
            network(*(torch.cat([x + 0.1 * n for n in range(4)]) for x in inputs))
    network.eval()


Made = tuple[Any, tuple[Any, ...]]


def _vision(name: str, **settings: Any) -> Callable[[Any], Made]:
    def make(torch: Any) -> Made:
        models = importlib.import_module("torchvision.models")
        network = getattr(models, name)(weights=None, **settings)
        return network, (torch.randn(1, 3, 64, 64),)

    return make


def _densenet(torch: Any) -> Made:
    models = importlib.import_module("torchvision.models")
    network = models.DenseNet(16, (3, 4, 4, 3), 32, num_classes=100)
    return network, (torch.randn(1, 3, 64, 64),)


def _convnext(torch: Any) -> Made:
    convnext = importlib.import_module("torchvision.models.convnext")
    settings = [
        convnext.CNBlockConfig(48, 96, 2),
        convnext.CNBlockConfig(96, 192, 2),
        convnext.CNBlockConfig(192, None, 2),
    ]
    network = convnext.ConvNeXt(settings, layer_scale=1.0, num_classes=100)
    return network, (torch.randn(1, 3, 64, 64),)


def _swin(torch: Any) -> Made:
    models = importlib.import_module("torchvision.models.swin_transformer")
    network = models.SwinTransformer(
        [4, 4], 48, [2, 2, 2], [3, 6, 12], [4, 4], num_classes=100
    )
    return network, (torch.randn(1, 3, 64, 64),)


def _unet(torch: Any) -> Made:
    nn, cat = torch.nn, torch.cat

    def double(ins: int, outs: int) -> Any:
        layers = []
        for first in (ins, outs):
            layers += [nn.Conv2d(first, outs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outs), nn.ReLU()]
        return nn.Sequential(*layers)

    class UNet(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            widths = [32, 64, 128]
            self.down = nn.ModuleList(
                double(a, b) for a, b in zip([3, *widths], widths, strict=False)
            )
            self.middle = double(128, 256)
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths)
            )
            self.back = nn.ModuleList(double(2 * w, w) for w in reversed(widths))
            self.head = nn.Conv2d(32, 5, 1)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Any) -> Any:
            skips = []
            for block in self.down:
                x = block(x)
                skips.append(x)
                x = self.pool(x)
            x = self.middle(x)
            for up, back in zip(self.up, self.back, strict=True):
                x = back(cat([skips.pop(), up(x)], 1))
            return self.head(x)

    return UNet(), (torch.randn(1, 3, 64, 64),)


def _detector(torch: Any) -> Made:
    """Like YOLO v8: split and joined stages, pooling pyramid, two scales, boxes."""
    nn, cat = torch.nn, torch.cat

    class Conv(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, a: int, b: int, k: int = 1, s: int = 1) -> None:
            super().__init__()
            self.conv = nn.Conv2d(a, b, k, s, k // 2, bias=False)
            self.bn, self.act = nn.BatchNorm2d(b), nn.SiLU()

        def forward(self, x: Any) -> Any:
            return self.act(self.bn(self.conv(x)))

    class Stage(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.cv1, self.cv2 = Conv(a, b), Conv(b // 2 * 3, b)
            self.m = nn.Sequential(Conv(b // 2, b // 2, 3), Conv(b // 2, b // 2, 3))

        def forward(self, x: Any) -> Any:
            one, two = self.cv1(x).chunk(2, 1)
            return self.cv2(cat([one, two, two + self.m(two)], 1))

    class Detector(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(Conv(3, 16, 3, 2), Conv(16, 32, 3, 2))
            self.s1, self.d1 = Stage(32, 64), Conv(64, 64, 3, 2)
            self.s2, self.d2 = Stage(64, 128), Conv(128, 128, 3, 2)
            self.p1, self.p2 = Conv(128, 64), Conv(256, 128)
            self.pool = nn.MaxPool2d(5, 1, 2)
            self.up = nn.Upsample(scale_factor=2)
            self.n1 = Stage(128 + 128, 64)
            self.box = nn.ModuleList(
                nn.Sequential(Conv(w, 64, 3), nn.Conv2d(64, 64, 1)) for w in (64, 128)
            )
            self.kind = nn.ModuleList(
                nn.Sequential(Conv(w, 64, 3), nn.Conv2d(64, 20, 1)) for w in (64, 128)
            )
            self.bins = nn.Conv2d(16, 1, 1, bias=False)

        def forward(self, x: Any) -> Any:
            one = self.s1(self.stem(x))
            two = self.s2(self.d1(one))
            deep = self.p1(self.d2(two))
            pools = [deep]
            for _ in range(3):
                pools.append(self.pool(pools[-1]))
            deep = self.p2(cat(pools, 1))
            mid = self.n1(cat([self.up(deep), two], 1))
            made = []
            for f, box, kind in zip((mid, deep), self.box, self.kind, strict=True):
                made.append(cat([box(f), kind(f)], 1).flatten(2))
            boxes, scores = cat(made, 2).split((64, 20), 1)
            b, _, a = boxes.shape
            boxes = boxes.view(b, 4, 16, a).transpose(2, 1).softmax(1)
            return cat([self.bins(boxes).view(b, 4, a), scores.sigmoid()], 1)

    return Detector(), (torch.randn(1, 3, 64, 64),)


def _bert(torch: Any) -> Made:
    """An encoder whose projections of query, key and value are one layer."""
    nn = torch.nn

    class Layer(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = (
                nn.Linear(width, 4 * width),
                nn.Linear(4 * width, width),
            )
            self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x: Any) -> Any:
            b, s, w = x.shape
            qkv = self.qkv(x).view(b, s, 3, self.heads, w // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q @ k.transpose(-1, -2)) * (w // self.heads) ** -0.5
            mixed = scores.softmax(-1) @ v
            x = self.n1(x + self.out(mixed.transpose(1, 2).reshape(b, s, w)))
            gelu = torch.nn.functional.gelu
            return self.n2(x + self.down(gelu(self.up(x))))

    class Bert(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(500, 96), nn.Embedding(64, 96)
            self.layers = nn.Sequential(*(Layer(96, 6) for _ in range(3)))
            self.head = nn.Linear(96, 10)

        def forward(self, ids: Any) -> Any:
            at = torch.arange(ids.shape[1], device=ids.device)
            x = self.layers(self.words(ids) + self.places(at))
            return self.head(x[:, 0])

    return Bert(), (torch.randint(0, 500, (2, 16)),)


def _wrapped(torch: Any, network: Any, pick: str) -> Any:
    class Wrapped(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: Any) -> Any:
            return getattr(self.network(ids), pick)

    return Wrapped()


def _gpt2(torch: Any) -> Made:
    hf = importlib.import_module("transformers")
    config = hf.GPT2Config(
        vocab_size=500, n_positions=64, n_embd=96, n_layer=3, n_head=6, use_cache=False
    )
    config._attn_implementation = "eager"
    network = hf.GPT2LMHeadModel(config)
    return _wrapped(torch, network, "logits"), (torch.randint(0, 500, (2, 16)),)


def _llama(torch: Any) -> Made:
    hf = importlib.import_module("transformers")
    config = hf.LlamaConfig(
        vocab_size=500,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    network = hf.LlamaForCausalLM(config)
    return _wrapped(torch, network, "logits"), (torch.randint(0, 500, (2, 16)),)


def _t5(torch: Any) -> Made:
    hf = importlib.import_module("transformers")
    config = hf.T5Config(
        vocab_size=500, d_model=96, d_kv=16, d_ff=256, num_layers=3, num_heads=6
    )
    network = _wrapped(torch, hf.T5EncoderModel(config), "last_hidden_state")
    tail = torch.nn.Linear(96, 10)
    return torch.nn.Sequential(network, tail), (torch.randint(0, 500, (2, 16)),)


def _tagger(kind: str) -> Callable[[Any], Made]:
    def make(torch: Any) -> Made:
        nn = torch.nn

        class Tagger(nn.Module):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.words = nn.Embedding(500, 64)
                self.cells = getattr(nn, kind)(
                    64, 96, 2, batch_first=True, bidirectional=True
                )
                self.head = nn.Linear(192, 9)

            def forward(self, ids: Any) -> Any:
                return self.head(self.cells(self.words(ids))[0])

        return Tagger(), (torch.randint(0, 500, (2, 16)),)

    return make


NETWORKS: dict[str, Callable[[Any], Made]] = {
    "resnet18": _vision("resnet18"),
    "mobilenet_v3": _vision("mobilenet_v3_small"),
    "densenet": _densenet,
    "shufflenet_v2": _vision("shufflenet_v2_x0_5"),
    "convnext": _convnext,
    "swin": _swin,
    "unet": _unet,
    "detector": _detector,
    "bert_fused_qkv": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5_encoder": _t5,
    "lstm_tagger": _tagger("LSTM"),
    "gru_tagger": _tagger("GRU"),
}
"""Networks by name: each makes a module and the inputs to export it with."""
