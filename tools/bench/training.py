"""Time and memory of one training step, against PyTorch with --torch-python PATH.

A step is forward, distillation loss (T = 4), backward and Adam, in float32 on the CPU.
Each side runs in a process of its own, one after the other, the least of several steps
counts; both update every weight. Three networks: a ResNet-20 (batch 128 of 3 x 32 x
32), an encoder of 4 layers of width 384 (batch 16 of 64 tokens), and a MobileNet-like
net (batch 32 of 3 x 64 x 64). Normalization of the convolutional nets is folded, as in
a model that was exported for inference.

onnx-ad and onnxsim run with ``--peer-python PATH``, or ``--peer-env FOLDER``, where a
virtual environment is made with the pinned versions. onnx-ad makes gradients alone:
Adam is done in numpy behind it. Both are held to the threads by processor affinity.
Where one cannot run a network, the table has its own words why.
"""

from __future__ import annotations

import argparse
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
PEERS = ("onnx-ad==0.3.0", "onnxsim==0.8.1", "onnx", "onnxruntime", "numpy")


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


_PEER = r"""
import json, os, sys, time
tool, path, data, threads, steps = *sys.argv[1:4], *map(int, sys.argv[4:6])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
import numpy as np, onnx, onnxruntime as ort
def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
arrays = dict(np.load(data))
feeds = {k: arrays.pop(k) for k in ("x", "teacher")}
model = onnx.load(path)
base = memory("VmRSS")
if tool == "onnx-ad":
    from onnx_ad import reverse
    kept = [t for t in model.graph.initializer if t.name not in arrays]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for k, v in arrays.items():
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v.shape))
    made = reverse(model, inputs=list(arrays), outputs=["loss"], layout="onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), options)
    names = ["loss", *("adj_" + k for k in arrays)]
    m, v = ({k: np.zeros_like(a) for k, a in arrays.items()} for _ in range(2))
    count = 0
    def step():
        global count
        count += 1
        loss, *grads = session.run(
            names, {**feeds, **arrays, "adj_loss": np.ones(1, np.float32)})
        for k, g in zip(arrays, grads):
            g = g.reshape(arrays[k].shape)
            m[k] += 0.1 * (g - m[k])
            v[k] += 0.001 * (g * g - v[k])
            root = np.sqrt(v[k] / (1 - 0.999**count)) + 1e-8
            arrays[k] = arrays[k] - RATE / (1 - 0.9**count) * m[k] / root
        return float(loss)
else:
    from onnxsim.compile_training import compile_training_loop
    loop = compile_training_loop(model, "loss", list(arrays))
    def step():
        return float(loop(feeds, lr=RATE))
losses, wall, cpu = [], [], []
for _ in range(steps):
    start, used = time.perf_counter(), time.process_time()
    losses.append(step())
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)
print(json.dumps({"losses": losses[:3], "wall": min(wall), "cpu": min(cpu),
                  "memory": memory("VmHWM") - base}))
"""


def with_loss(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the teacher's scores as input and the loss as output.

    Flatten and Gelu are written out, since onnxsim has no rule for them.
    """
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    graph = out.graph
    constants: dict[str, Array] = {
        "rows": np.array([0, -1], np.int64),
        "half": np.array(0.5, np.float32),
        "one": np.array(1, np.float32),
        "root_half": np.array(math.sqrt(0.5), np.float32),
    }
    for name, array in constants.items():
        graph.initializer.append(numpy_helper.from_array(array, name))
    del graph.node[:]
    for node in proto.graph.node:
        graph.node.extend(_written_out(node))
    shape = [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim]
    factor = TEMPERATURE**2 / shape[0]
    for name, value in (("cool", 1 / TEMPERATURE), ("factor", factor)):
        array = np.array(value, np.float32)
        graph.initializer.append(numpy_helper.from_array(array, name))
    for op, inputs, output in (
        # Not LogSoftmax, for which onnxsim has no rule.
        ("Mul", ["scores", "cool"], "mine"),
        ("Softmax", ["mine"], "mine_share"),
        ("Log", ["mine_share"], "mine_log"),
        ("Mul", ["teacher", "cool"], "theirs"),
        ("Softmax", ["theirs"], "share"),
        ("Log", ["share"], "share_log"),
        ("Sub", ["share_log", "mine_log"], "off"),
        ("Mul", ["share", "off"], "parts"),
        ("ReduceSum", ["parts"], "sum"),
        ("Mul", ["sum", "factor"], "scaled"),
        ("Reshape", ["scaled", "scalar"], "loss"),
    ):
        graph.node.append(helper.make_node(op, inputs, [output], output))
    graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.int64), "scalar"))
    graph.input.append(
        helper.make_tensor_value_info("teacher", TensorProto.FLOAT, shape)
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    return out


def _written_out(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, y = node.input[0], node.output[0]
    if node.op_type == "Flatten":
        return [helper.make_node("Reshape", [x, "rows"], [y], y)]
    if node.op_type != "Gelu":
        return [node]
    a, b, c, d = (f"{y}_{letter}" for letter in "abcd")
    return [
        helper.make_node("Mul", [x, "root_half"], [a], a),
        helper.make_node("Erf", [a], [b], b),
        helper.make_node("Add", [b, "one"], [c], c),
        helper.make_node("Mul", [c, "half"], [d], d),
        helper.make_node("Mul", [d, x], [y], y),
    ]


def peer_step(
    python: str, tool: str, name: str, threads: int, steps: int, folder: Path
) -> dict[str, Any] | str:
    """Measure another tool's step, or return why it has none."""
    net, proto = NETS[name]()
    x, teacher = samples(proto)
    model, data = folder / f"{name}.onnx", folder / f"{name}.npz"
    onnx.save(with_loss(proto), model)
    arrays: dict[str, Any] = dict(net.weights)
    np.savez(data, x=x, teacher=teacher, **arrays)
    code = _PEER.replace("RATE", str(RATE))
    try:
        return _last_line(
            [python, "-c", code, tool, str(model), str(data), str(threads), str(steps)],
            {},
        )
    except SystemExit as error:
        return str(error).strip().splitlines()[-1][:160]


def peer_python(python: str | None, folder: Path | None) -> str | None:
    """Return an interpreter with the other tools, made in a folder if one is given."""
    if folder is None:
        return python
    binary = folder / "bin" / "python"
    if not binary.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(binary), "-m", "pip", "install", "-q", *PEERS]
        subprocess.run(install, check=True)
    return str(binary)


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
    parser.add_argument("--peer-python", help="an interpreter that has the peers")
    parser.add_argument("--peer-env", type=Path, help="a folder to install them in")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        name, threads = given.child
        print(json.dumps(ours(name, int(threads), given.steps)))
        return
    peers = peer_python(given.peer_python, given.peer_env)
    root = Path(__file__).resolve().parent
    print(
        f"{'network':10} threads  {'tool':10} wall ms  cpu ms    MB  wall ratio  "
        "cpu ratio  loss"
    )
    for name in given.only:
        for threads in given.threads:
            command = [sys.executable, str(root), "training"]
            command += ["--steps", str(given.steps), "--child", name, str(threads)]
            rows: dict[str, dict[str, Any] | str] = {}
            rows["onnxshrink"] = _last_line(command, {})
            with tempfile.TemporaryDirectory() as folder:
                if given.torch_python:
                    rows["torch"] = torch_step(
                        given.torch_python, name, threads, given.steps, Path(folder)
                    )
                for tool in ("onnx-ad", "onnxsim") if peers else ():
                    rows[tool] = peer_step(
                        str(peers), tool, name, threads, given.steps, Path(folder)
                    )
            for tool, row in rows.items():
                label = f"{name:10} {threads:7}  {tool:10}"
                print(_line(label, row, rows.get("torch")), flush=True)
    if not peers:
        print("onnx-ad, onnxsim: not measured (no --peer-python, no --peer-env)")


def _line(
    label: str, row: dict[str, Any] | str, base: dict[str, Any] | str | None
) -> str:
    """Return a row of the table."""
    if isinstance(row, str):
        return f"{label} {row}"
    ratios = [
        f"{row[key] / base[key]:10.2f}" if isinstance(base, dict) else " " * 10
        for key in ("wall", "cpu")
    ]
    losses = " ".join(f"{loss:.6f}" for loss in row["losses"])
    return (
        f"{label} {row['wall'] * 1e3:7.0f} {row['cpu'] * 1e3:7.0f} "
        f"{row['memory'] / 2**20:5.0f}  {ratios[0]} {ratios[1]}  {losses}"
    )
