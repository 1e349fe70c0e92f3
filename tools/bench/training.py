"""Time and memory of one training step, against PyTorch with --torch-python PATH.

A step is forward, distillation loss (T = 4), backward and Adam, in float32 on the CPU.
Each side runs in a process of its own, one after the other, the least of several steps
counts; both update every weight. Three networks: a ResNet-20 (batch 128 of 3 x 32 x
32), an encoder of 4 layers of width 384 (batch 16 of 64 tokens), and a MobileNet-like
net (batch 32 of 3 x 64 x 64). Normalization of the convolutional nets is folded, as in
a model that was exported for inference.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
TEMPERATURE = 4.0
RATE = 1e-4


class Net:
    """Builds an ONNX graph; weights are random and the same for every reader."""

    def __init__(self, inputs: Sequence[onnx.ValueInfoProto]) -> None:
        """Start with the inputs."""
        self.inputs = list(inputs)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}
        self._random = np.random.default_rng(0)

    def weight(self, name: str, *shape: int, value: float | None = None) -> str:
        """Add a weight that is trained."""
        if value is not None:
            array = np.full(shape, value)
        else:
            fan = math.prod(shape[1:]) if len(shape) > 2 else shape[0]
            array = self._random.normal(size=shape) * math.sqrt(1.0 / fan)
        self.weights[name] = array.astype(np.float32)
        return name

    def op(self, kind: str, *inputs: str, **attrs: Any) -> str:
        """Add a node."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attrs))
        return name

    def ints(self, *values: int) -> str:
        """Add a constant."""
        name = f"c{len(self.constants)}"
        self.constants[name] = np.array(values, np.int64)
        return name

    def conv(
        self, x: str, shape: Sequence[int], stride: int = 1, group: int = 1
    ) -> str:
        """Add a convolution that keeps the size, with a bias."""
        number = len(self.nodes)
        w = self.weight(f"w{number}", *shape)
        b = self.weight(f"b{number}", shape[0], value=0.0)
        pad = shape[2] // 2
        return self.op(
            "Conv", x, w, b, strides=[stride] * 2, pads=[pad] * 4, group=group
        )

    def linear(self, x: str, n: int, m: int) -> str:
        """Add a matrix product and a bias."""
        number = len(self.nodes)
        w = self.weight(f"w{number}", n, m)
        b = self.weight(f"b{number}", m, value=0.0)
        return self.op("Add", self.op("MatMul", x, w), b)

    def proto(self, output: str, shape: Sequence[int]) -> onnx.ModelProto:
        """Return the model."""
        self.nodes.append(helper.make_node("Identity", [output], ["scores"]))
        values = {**self.weights, **self.constants}
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(v, k) for k, v in values.items()],
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
        )


def resnet(batch: int = 128) -> tuple[Net, onnx.ModelProto]:
    """ResNet-20 for 32 x 32 images."""
    shape = [batch, 3, 32, 32]
    net = Net([helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)])
    x = net.op("Relu", net.conv("x", (16, 3, 3, 3)))
    width = 16
    for stage, out in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = net.op("Relu", net.conv(x, (out, width, 3, 3), stride))
            y = net.conv(y, (out, out, 3, 3))
            if stride > 1:
                x = net.conv(x, (out, width, 1, 1), stride)
            x = net.op("Relu", net.op("Add", x, y))
            width = out
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net, net.proto(net.linear(x, 64, 10), [batch, 10])


def mobilenet(batch: int = 32) -> tuple[Net, onnx.ModelProto]:
    """Depthwise separable convolutions on 64 x 64 images."""
    shape = [batch, 3, 64, 64]
    net = Net([helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)])
    x = net.op("Relu", net.conv("x", (32, 3, 3, 3), 2))
    width = 32
    for out, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)):
        x = net.op("Relu", net.conv(x, (width, 1, 3, 3), stride, width))
        x = net.op("Relu", net.conv(x, (out, width, 1, 1)))
        width = out
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net, net.proto(net.linear(x, width, 100), [batch, 100])


def encoder(batch: int = 16, length: int = 64) -> tuple[Net, onnx.ModelProto]:
    """Four layers of width 384 with 6 heads, 5000 tokens, 10 classes."""
    width, heads, depth = 384, 6, 64
    net = Net([helper.make_tensor_value_info("x", TensorProto.INT64, [batch, length])])
    table = net.weight("embedding", 5000, width)
    x = net.op("Gather", table, "x")
    x = net.op("Add", x, net.weight("positions", length, width))

    def norm(x: str) -> str:
        number = len(net.nodes)
        scale = net.weight(f"s{number}", width, value=1.0)
        bias = net.weight(f"t{number}", width, value=0.0)
        return net.op("LayerNormalization", x, scale, bias, axis=-1)

    def split(x: str) -> str:
        shape = net.ints(batch, length, heads, depth)
        return net.op("Reshape", x, shape)

    net.constants["root"] = np.array(1 / math.sqrt(depth), np.float32)
    for _ in range(4):
        h = norm(x)
        q, k, v = (split(net.linear(h, width, width)) for _ in range(3))
        q, v = (net.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = net.op("Transpose", k, perm=[0, 2, 3, 1])
        scores = net.op("Mul", net.op("MatMul", q, k), "root")
        mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
        mixed = net.op("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = net.op("Reshape", mixed, net.ints(batch, length, width))
        x = net.op("Add", x, net.linear(mixed, width, width))
        h = net.op("Gelu", net.linear(norm(x), width, 4 * width))
        x = net.op("Add", x, net.linear(h, 4 * width, width))
    x = net.op("ReduceMean", norm(x), net.ints(1), keepdims=0)
    return net, net.proto(net.linear(x, width, 10), [batch, 10])


NETS: Mapping[str, Callable[[], tuple[Net, onnx.ModelProto]]] = {
    "resnet-20": resnet,
    "encoder": encoder,
    "mobilenet": mobilenet,
}


def samples(proto: onnx.ModelProto) -> tuple[Array, Array]:
    """Return an input and a teacher's scores."""
    random = np.random.default_rng(1)
    info = proto.graph.input[0]
    shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
    if info.type.tensor_type.elem_type == TensorProto.INT64:
        x: Array = random.integers(0, 5000, shape)
    else:
        x = random.normal(size=shape).astype(np.float32)
    out = [d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim]
    return x, random.normal(size=out).astype(np.float32)


def peak() -> int:
    """Return the highest resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def measured(run: Callable[[], float], steps: int, base: int) -> dict[str, Any]:
    """Run steps; return losses, least wall time, least processor time, memory."""
    losses, wall, cpu = [], [], []
    for _ in range(steps):
        start, used = time.perf_counter(), time.process_time()
        losses.append(run())
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {
        "losses": losses[:3],
        "wall": min(wall),
        "cpu": min(cpu),
        "memory": peak() - base,
    }


def ours(name: str, threads: int, steps: int) -> dict[str, Any]:
    """Measure onnxshrink's step."""
    from onnxshrink.model import Model
    from onnxshrink.training import TrainingStep, soft_cross_entropy

    net, proto = NETS[name]()
    x, teacher = samples(proto)
    model = Model.load(proto)
    base = resident()
    step = TrainingStep(
        model,
        {"x": x.shape},
        list(net.weights),
        lambda ctx, v: soft_cross_entropy(ctx, v["scores"], v["teacher"], TEMPERATURE),
        targets={"teacher": (np.float32, teacher.shape)},
        threads=threads,
    )
    feeds = {"x": x, "teacher": teacher}
    return measured(lambda: step(feeds, RATE), steps, base)


_TORCH = r"""
import json, sys, time
import numpy as np, torch
import torch.nn.functional as F
name, path = sys.argv[1], sys.argv[4]
threads, steps = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
data = np.load(path, allow_pickle=True)
nodes = json.loads(str(data["nodes"]))
w = {k[2:]: torch.tensor(data[k]).requires_grad_() for k in data.files
     if k[:2] == "w:"}
c = {k[2:]: torch.tensor(data[k]) for k in data.files if k[:2] == "c:"}
x, teacher = torch.tensor(data["x"]), torch.tensor(data["teacher"])
def forward():
    v = {"x": x, **w, **c}
    for op, ins, out, a in nodes:
        i = [v[n] for n in ins]
        if op == "Conv":
            r = F.conv2d(
                *i, stride=a["strides"], padding=a["pads"][0], groups=a["group"]
            )
        elif op == "Relu": r = F.relu(i[0])
        elif op == "Add": r = i[0] + i[1]
        elif op == "Mul": r = i[0] * i[1]
        elif op == "MatMul": r = i[0] @ i[1]
        elif op == "Flatten": r = i[0].flatten(1)
        elif op == "GlobalAveragePool": r = i[0].mean((2, 3), keepdim=True)
        elif op == "Gather": r = F.embedding(i[1], i[0])
        elif op == "LayerNormalization": r = F.layer_norm(i[0], i[1].shape, i[1], i[2])
        elif op == "Reshape": r = i[0].reshape(i[1].tolist())
        elif op == "Transpose": r = i[0].permute(a["perm"])
        elif op == "Softmax": r = i[0].softmax(-1)
        elif op == "Gelu": r = F.gelu(i[0])
        elif op == "ReduceMean": r = i[0].mean(1)
        elif op == "Identity": r = i[0]
        v[out] = r
    return v["scores"]
base = memory("VmRSS")
optimizer = torch.optim.Adam(list(w.values()), lr=RATE)
T = TEMPERATURE
losses, wall, cpu = [], [], []
for _ in range(steps):
    start, used = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    loss = F.kl_div(F.log_softmax(forward() / T, 1), F.softmax(teacher / T, 1),
                    reduction="batchmean") * T * T
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)
print(json.dumps({"losses": losses[:3], "wall": min(wall), "cpu": min(cpu),
                  "memory": memory("VmHWM") - base}))
"""


def torch_step(
    python: str, name: str, threads: int, steps: int, folder: Path
) -> dict[str, Any]:
    """Measure PyTorch's step on the same graph, node by node the same weights."""
    net, proto = NETS[name]()
    x, teacher = samples(proto)
    nodes = [
        (
            node.op_type,
            list(node.input),
            node.output[0],
            {a.name: helper.get_attribute_value(a) for a in node.attribute},
        )
        for node in proto.graph.node
    ]
    path = folder / f"{name}.npz"
    arrays: dict[str, Any] = {f"w:{k}": v for k, v in net.weights.items()}
    arrays |= {f"c:{k}": v for k, v in net.constants.items()}
    np.savez(path, x=x, teacher=teacher, nodes=np.array(json.dumps(nodes)), **arrays)
    code = _TORCH.replace("RATE", str(RATE)).replace("TEMPERATURE", str(TEMPERATURE))
    command = [python, "-c", code, name, str(threads), str(steps), str(path)]
    return _last_line(command, {"OMP_NUM_THREADS": str(threads)})


def _last_line(command: Sequence[str], extra: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **extra},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str]) -> None:
    """Print a table."""
    import tempfile

    parser = argparse.ArgumentParser(prog="training", description=__doc__)
    parser.add_argument("--torch-python", help="an interpreter that has torch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        name, threads = given.child
        print(json.dumps(ours(name, int(threads), given.steps)))
        return
    root = Path(__file__).resolve().parent
    print(f"{'network':11} threads  {'tool':11} wall ms  cpu ms   MB  wall ratio  loss")
    for name in given.only:
        for threads in given.threads:
            command = [sys.executable, str(root), "training"]
            command += ["--steps", str(given.steps), "--child", name, str(threads)]
            rows = {"onnxshrink": _last_line(command, {})}
            if given.torch_python:
                with tempfile.TemporaryDirectory() as folder:
                    rows["torch"] = torch_step(
                        given.torch_python, name, threads, given.steps, Path(folder)
                    )
            base = rows.get("torch")
            for tool, row in rows.items():
                ratio = f"{row['wall'] / base['wall']:10.2f}" if base else " " * 10
                print(
                    f"{name:11} {threads:7}  {tool:11} {row['wall'] * 1e3:7.0f} "
                    f"{row['cpu'] * 1e3:7.0f} {row['memory'] / 2**20:4.0f}  {ratio}  "
                    + " ".join(f"{loss:.6f}" for loss in row["losses"])
                )
    for package, label in (("onnx_ad", "onnx-ad"), ("onnxsim", "onnxsim")):
        there = importlib.util.find_spec(package) is not None
        print(f"{label}: {'installed, not measured' if there else 'not installed'}")
