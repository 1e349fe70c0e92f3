"""The only place where onnxruntime sessions are made; its errors put in words."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.files import scratch_prefix
from onnxshrink.model import Model, ValueInfo
from onnxshrink.package import Package, is_package
from onnxshrink.tensors import LazyTensor, refer_to

__all__ = [
    "NO_PREPACKING",
    "LoadCost",
    "Session",
    "check_providers",
    "child_path",
    "custom_operators",
    "describe",
    "file_bytes",
    "file_bytes_or_less",
    "handed_over",
    "libraries",
    "load_cost",
    "open_session",
    "providers",
    "reason_of",
    "run_proto",
    "serialized",
    "session",
    "value_info",
    "version",
]

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Optimize = Literal["all", "basic", "off"]
Source = Model | Path | str | bytes | onnx.ModelProto

_CPU = ("CPUExecutionProvider",)
_SPILL = 64 << 20
"""Bytes of weights from which a Model is handed over through a file, not a proto."""
NO_PREPACKING = 1 << 30
"""Bytes of weights from which onnxruntime must not make its own copy of them."""
_EXTERNAL_MINIMUM = 1024
_ALIGNMENT = 4096

_TYPES = {
    "float": "FLOAT",
    "bool": "BOOL",
    "string": "STRING",
    "double": "DOUBLE",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    **{
        f"{sign}int{bits}": f"{sign.upper()}INT{bits}"
        for sign in ("", "u")
        for bits in (2, 4, 8, 16, 32, 64)
    },
    "float8e4m3fn": "FLOAT8E4M3FN",
    "float8e4m3fnuz": "FLOAT8E4M3FNUZ",
    "float8e5m2": "FLOAT8E5M2",
    "float8e5m2fnuz": "FLOAT8E5M2FNUZ",
    "complex64": "COMPLEX64",
    "complex128": "COMPLEX128",
}


@functools.cache
def _onnxruntime() -> Any:
    """Import onnxruntime at first use, quiet and without telemetry."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    onnxruntime.disable_telemetry_events()
    return onnxruntime


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises where a model or its inputs are at fault."""
    _onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    return (*own, RuntimeError, ValueError, TypeError)


def providers() -> tuple[str, ...]:
    """Return the names of the execution providers this onnxruntime has."""
    return tuple(_onnxruntime().get_available_providers())


def version() -> str:
    """Return the version of onnxruntime."""
    return str(_onnxruntime().__version__)


_LIBRARIES: list[str] = []
"""Operator libraries for sessions made now. onnxruntime unloads none of them, so that
what one run asked for harms no other run of the process."""


@contextlib.contextmanager
def custom_operators(libraries: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Give every session that is made meanwhile the operators of shared libraries.

    A library is code: it runs as soon as it is opened.

    Args:
        libraries: Shared libraries that export ``RegisterCustomOps``.

    Raises:
        UsageError: A library is missing, or onnxruntime cannot take it.
    """
    paths = [str(Path(library).absolute()) for library in libraries]
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"--custom-ops {path} does not exist or is not a file")
        try:
            _onnxruntime().SessionOptions().register_custom_ops_library(path)
        except _failures() as error:
            raise UsageError(
                f"--custom-ops {path}: onnxruntime cannot take it as a library of "
                f"operators: {_reason(error)}"
            ) from error
    _LIBRARIES.extend(paths)
    try:
        yield
    finally:
        for path in paths:
            _LIBRARIES.remove(path)


def libraries() -> tuple[str, ...]:
    """Return the paths of the operator libraries for sessions made now."""
    return tuple(dict.fromkeys(_LIBRARIES))


class Session:
    """A model that onnxruntime has loaded.

    Attributes:
        inputs: Inputs that must be given.
        optional: Inputs that have a default value.
        outputs: Outputs in order, those exposed by ``expose`` last.
    """

    def __init__(self, raw: Any) -> None:
        """Use ``session``."""
        self._raw = raw
        self.inputs = tuple(value_info(arg) for arg in raw.get_inputs())
        self.optional = tuple(
            value_info(arg) for arg in raw.get_overridable_initializers()
        )
        self.outputs = tuple(value_info(arg) for arg in raw.get_outputs())
        self._known = {info.name: info for info in (*self.inputs, *self.optional)}
        self._run_options = _onnxruntime().RunOptions()
        self._run_options.log_severity_level = 4

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once.

        Args:
            feeds: An array for each input, of its dtype and shape.
            names: The outputs wanted; all if ``None``.

        Returns:
            Outputs by name: arrays, or what onnxruntime gives for a sequence (a list),
            a map (a dict) or an absent optional (``None``).

        Raises:
            ModelError: The feeds do not fit the inputs, or onnxruntime failed.
        """
        self.check(feeds)
        wanted = [info.name for info in self.outputs] if names is None else list(names)
        try:
            values = self._raw.run(wanted, dict(feeds), self._run_options)
        except _failures() as error:
            raise ModelError(f"onnxruntime cannot run it: {_reason(error)}") from error
        return dict(zip(wanted, values, strict=True))

    def seconds(self, feeds: Feeds) -> float:
        """Run once on feeds that ``run`` has taken before; return the wall time."""
        start = time.perf_counter()
        try:
            self._raw.run(None, feeds, self._run_options)
        except _failures() as error:
            raise ModelError(f"onnxruntime cannot run it: {_reason(error)}") from error
        return time.perf_counter() - start

    def check(self, feeds: Feeds) -> None:
        """Refuse feeds whose names, dtypes or shapes are not those of the inputs.

        Raises:
            ModelError: What is wrong, and what the input takes.
        """
        missing = [info.name for info in self.inputs if info.name not in feeds]
        if missing:
            raise ModelError(
                f"no array for input {missing[0]!r}; the model takes "
                f"{', '.join(describe(info) for info in self.inputs)}"
            )
        for name, array in feeds.items():
            info = self._known.get(name)
            if info is None:
                raise ModelError(
                    f"the model has no input {name!r}; it takes "
                    f"{', '.join(repr(n) for n in self._known) or 'none'}."
                    f"{nearest(name, self._known)}"
                )
            if info.kind == "tensor":
                _check_array(info, array)


def _check_array(info: ValueInfo, array: Array) -> None:
    if not isinstance(array, np.ndarray):
        raise ModelError(
            f"input {info.name!r} takes a numpy array, not {type(array).__name__}"
        )
    wanted = _dtype(info.data_type)
    text = wanted.kind == "O" and array.dtype.kind in "OSU"
    fits = info.shape is None or (
        len(info.shape) == array.ndim
        and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(info.shape, array.shape, strict=True)
        )
    )
    if not fits or (array.dtype != wanted and not text):
        given = f"{array.dtype} {list(array.shape)}"
        raise ModelError(f"input {describe(info)} was given {given}")


def _dtype(data_type: int) -> np.dtype[Any]:
    from onnxshrink.tensors import numpy_type

    return numpy_type(data_type)


def describe(info: ValueInfo) -> str:
    """Return name, dtype and shape of a value in words."""
    if info.kind != "tensor":
        return f"{info.name!r} ({info.kind})"
    known = info.data_type in onnx.TensorProto.DataType.values()
    dtype = _dtype(info.data_type).name if known and info.data_type else "tensor"
    dtype = "string" if dtype == "object" else dtype
    if info.shape is None:
        return f"{info.name!r} ({dtype})"
    dims = ", ".join("?" if dim is None else str(dim) for dim in info.shape)
    return f"{info.name!r} ({dtype} [{dims}])"


def value_info(arg: Any) -> ValueInfo:
    """Read onnxruntime's description of an input or output: name, type and shape."""
    match = re.fullmatch(r"tensor\((\w+)\)", arg.type)
    if match is None:
        kind = {"seq": "sequence"}.get(
            arg.type.partition("(")[0], arg.type.partition("(")[0]
        )
        return ValueInfo(arg.name, 0, None, kind)
    name = _TYPES.get(match.group(1), "UNDEFINED")
    data_type = dict(onnx.TensorProto.DataType.items()).get(name, 0)
    shape = tuple(None if dim in ("", "?") else dim for dim in arg.shape)
    return ValueInfo(arg.name, data_type, shape)


# --- making one -------------------------------------------------------------------


def session(
    source: Source,
    *,
    threads: int = 0,
    providers: Sequence[str] = _CPU,
    optimize: Optimize = "all",
    expose: Sequence[str] = (),
    only_exposed: bool = False,
    training: bool = False,
) -> Session:
    """Load a model into onnxruntime with the fewest copies of its weights.

    A file is opened by its path. The weights of a large ``Model`` go through a mapped
    file: the model's own external data where they are unchanged, a temporary one
    otherwise.

    Args:
        source: The model.
        threads: Intra-op threads; 0 lets onnxruntime choose.
        providers: Execution providers, in order of preference.
        optimize: Graph optimisation: ``all``, ``basic`` (constant folding and other
            rewrites that keep plain ONNX) or ``off``.
        expose: Names of values of the main graph to add to the outputs.
        only_exposed: Make ``expose`` the only outputs; what they do not need is not
            computed.
        training: The graph is a training step: less memory for graphs with many values
            that live long, and QDQ stays as written instead of becoming int8 kernels.

    Raises:
        ModelError: onnxruntime cannot load it; says what would have worked.
        UsageError: A provider is not available.
    """
    if isinstance(source, str):
        source = Path(source)
    packed = isinstance(source, Path) and is_package(source)
    if isinstance(source, Path) and (expose or source.suffix == ".onnxtxt"):
        source = Model.load(source, check=False)
    if isinstance(source, bytes) and expose:
        source = _parsed(source)
    if isinstance(source, Path):
        if not source.is_file():
            raise ModelError(f"{source} does not exist or is not a file")
        if packed:
            return _from_package(source, threads, optimize, training, providers)
        large = file_bytes_or_less(source) >= NO_PREPACKING
        options = _options(threads, optimize, large, training)
        return _open(str(source), options, providers, str(source))
    if isinstance(source, bytes):
        return _open(
            source, _options(threads, optimize, False, training), providers, "the model"
        )
    if isinstance(source, onnx.ModelProto):
        proto = source
        if expose:
            proto = onnx.ModelProto()
            proto.CopyFrom(source)
            _expose(proto.graph, expose, only_exposed)
        data = serialized(proto)
        return _open(
            data, _options(threads, optimize, False, training), providers, "the model"
        )
    with tempfile.TemporaryDirectory(
        prefix=scratch_prefix(), ignore_cleanup_errors=True
    ) as scratch:
        proto, folder, size = handed_over(source, Path(scratch))
        _expose(proto.graph, expose, only_exposed)
        options = _options(threads, optimize, size >= NO_PREPACKING, training)
        if folder is not None:
            # External data of a model given as bytes is looked for here.
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder)
            )
        label = str(source.source) if source.source else "the model"
        # onnxruntime keeps the mapping of the scratch file, so the name may go.
        return _open(serialized(proto), options, providers, label)


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    providers: Sequence[str] = _CPU,
) -> Any:
    """Open a model file or a package (``.onnxz``) in onnxruntime.

    A package of less than 64 MiB of weights goes through memory; the weights of a
    larger one are decoded, a block at a time, into a file without a name that
    onnxruntime maps.

    Args:
        path: The file.
        threads: Intra-op threads; 0 lets onnxruntime choose.
        providers: Execution providers, in order of preference.

    Returns:
        The ``onnxruntime.InferenceSession``.

    Raises:
        ModelError: It is damaged, or onnxruntime cannot load it.
        UsageError: A provider is not available.
    """
    return session(Path(path), threads=threads, providers=providers)._raw


def run_proto(
    proto: onnx.ModelProto, feeds: Feeds, *, optimize: Optimize = "off"
) -> list[Any]:
    """Run a small model once on one thread; return its outputs in order.

    Raises:
        ModelError: onnxruntime cannot load or run it.
    """
    made = session(proto, threads=1, optimize=optimize)
    return list(made.run(feeds).values())


def _parsed(data: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:
        raise ModelError("the given bytes are not an ONNX model") from error
    return proto


def serialized(proto: onnx.ModelProto) -> bytes:
    """Return a proto's bytes.

    Raises:
        ModelError: There are more than protobuf holds.
    """
    try:
        return proto.SerializeToString()
    except Exception as error:  # protobuf has its own class for each backend
        raise ModelError(
            "the model does not fit into one protobuf of 2 GiB; give its path instead"
        ) from error


def file_bytes_or_less(path: Path) -> int:
    """Return bytes of a model and its data; of the file alone if it cannot be read."""
    try:
        return file_bytes(path)
    except ModelError:
        return path.stat().st_size if path.exists() else 0


def _options(
    threads: int, optimize: Optimize, large: bool = False, training: bool = False
) -> Any:
    ort = _onnxruntime()
    if threads < 0:
        raise UsageError(f"threads cannot be negative: {threads}")
    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    if optimize not in levels:
        raise UsageError(f"optimize is one of {', '.join(levels)}, not {optimize!r}")
    options = ort.SessionOptions()
    for library in libraries():
        options.register_custom_ops_library(library)
    options.log_severity_level = 4
    options.graph_optimization_level = levels[optimize]
    options.intra_op_num_threads = threads
    # Threads that wait by spinning burn the cores other processes need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if training:
        # The plan made for fixed shapes packs worse than the arena by half and more.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def check_providers(wanted: Sequence[str]) -> None:
    """Refuse execution providers that this onnxruntime lacks.

    Raises:
        UsageError: Names one, and those there are.
    """
    available = providers()
    for name in wanted:
        if name not in available:
            raise UsageError(
                f"onnxruntime has no provider {name!r}; it has {', '.join(available)}."
                f"{nearest(name, available)}"
            )


def _open(
    source: str | bytes, options: Any, wanted: Sequence[str], label: str
) -> Session:
    check_providers(wanted)
    try:
        raw = _onnxruntime().InferenceSession(
            source, options, providers=list(wanted), enable_fallback=0
        )
    except _failures() as error:
        raise ModelError(
            f"onnxruntime cannot load {label}: {_reason(error)}"
        ) from error
    return Session(raw)


def _from_package(
    path: Path, threads: int, optimize: Optimize, training: bool, wanted: Sequence[str]
) -> Session:
    """Open a package: large weights are decoded into a file that is then mapped."""
    package = Package(path)
    size = sum(file.size for file in package.files)
    options = _options(threads, optimize, size >= NO_PREPACKING, training)
    if size < _SPILL and len(package.files) == 1:
        data = b"".join(package.stream(package.files[0]))
        return _open(data, options, wanted, str(path))
    with tempfile.TemporaryDirectory(
        prefix=scratch_prefix(), ignore_cleanup_errors=True
    ) as scratch:
        proto = _spilled(package, Path(scratch) / "weights")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", scratch
        )
        return _open(serialized(proto), options, wanted, str(path))


def _spilled(package: Package, place: Path) -> onnx.ModelProto:
    """Return the model of a package, large weights decoded into a file."""
    proto, ranges = package.skeleton()
    tensors: list[tuple[onnx.TensorProto, LazyTensor]] = []
    for index, header in enumerate(proto.graph.initializer):
        if index in ranges:
            tensors.append((header, package.tensor(header, *ranges[index])))
    for header in _tensors(proto.graph):
        if header.data_location == onnx.TensorProto.EXTERNAL:
            values = package.external(header)
            header.ClearField("data_location")
            del header.external_data[:]
            if values.nbytes < _EXTERNAL_MINIMUM:
                header.raw_data = b"".join(values.raw_chunks())
            else:
                tensors.append((header, values))
    at = 0
    starts = []
    for header, values in tensors:
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        starts.append(at)
        refer_to(header, place.name, at, values.nbytes)
        at += values.nbytes
    place.touch()

    def decode(job: tuple[LazyTensor, int]) -> None:
        with place.open("r+b") as file:
            file.seek(job[1])
            for chunk in job[0].raw_chunks():
                file.write(chunk)

    jobs = zip((values for _, values in tensors), starts, strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, jobs):
            pass
    return proto


def _expose(graph: onnx.GraphProto, expose: Sequence[str], only_exposed: bool) -> None:
    if only_exposed:
        del graph.output[:]
    known = {info.name for info in graph.output}
    for name in expose:
        if name not in known:
            # onnxruntime infers the type of an output that states none.
            graph.output.add(name=name)
            known.add(name)


def handed_over(
    model: Model, scratch: Path
) -> tuple[onnx.ModelProto, Path | None, int]:
    """Return a proto of bounded size, the folder of its data, and bytes of weights.

    Args:
        model: The model; it is not changed.
        scratch: A folder for a file of weights, where the model's own will not do.
    """
    from onnxshrink.model.exporter import Piece, export
    from onnxshrink.tensors import FileTensor

    parts = export(model)
    size = sum(piece.data_bytes for piece in parts.pieces)
    if size < _SPILL:
        return parts.proto(), None, size
    home = model.source.parent.resolve() if model.source is not None else None

    def stays(piece: Piece) -> bool:
        """Whether the values lie, aligned, in a file of the model's own folder."""
        tensor = piece.tensor
        return (
            isinstance(tensor, FileTensor)
            and tensor.path.resolve().parent == home
            and not tensor.path.is_symlink()
            and tensor.offset % 64 == 0
        )

    changed = sum(p.data_bytes for p in parts.pieces if not stays(p))
    at_home = home is not None and changed < _SPILL
    data = scratch / "weights"
    with data.open("wb") as file:
        for index, piece in enumerate(parts.pieces):
            tensor = piece.tensor
            if tensor is None or tensor.nbytes < _EXTERNAL_MINIMUM:
                continue
            if at_home:
                if not stays(piece):
                    continue
                assert isinstance(tensor, FileTensor)
                place = (tensor.path.name, tensor.offset)
            else:
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                place = (data.name, file.tell())
                for chunk in tensor.raw_chunks():
                    file.write(chunk)
            header = onnx.TensorProto()
            header.CopyFrom(piece.header)
            refer_to(header, *place, tensor.nbytes)
            parts.pieces[index] = Piece(header)
    return parts.proto(), home if at_home else scratch, size


# --- onnxruntime's words ----------------------------------------------------------


def _reason(error: BaseException) -> str:
    """Return what onnxruntime means, in one line, and what would have worked."""
    return reason_of(str(error)) or type(error).__name__


def reason_of(text: str) -> str:
    """Return what a message of onnxruntime means, in one line."""
    text = " ".join(text.split())
    for pattern, words in _MEANINGS:
        match = re.search(pattern, text)
        if match is not None:
            return words.format(*match.groups())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    text = re.sub(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)?(?: \[.*?\])? ", "", text)
    text = text.replace("Please fix either the inputs/outputs or the model.", "")
    text = re.sub(r"\(?/onnxruntime_src/\S+\)?", "", text).strip(" .")
    return text[:400]


_MEANINGS = (
    (
        r"(?:bad_alloc|[Ff]ailed to allocate memory)",
        "it needs more memory than there is",
    ),
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        "its IR version is {0}, and this onnxruntime takes at most {1}",
    ),
    (
        r"Opset (\d+) is under development.*domain (\S+) is till opset (\d+)",
        "its opset of {1} is {0}, and this onnxruntime takes at most {2}",
    ),
    (
        r"Fatal error: (\S+):(\S+?)\(-?\d+\) is not a registered function/op",
        "operator {1} of domain {0} is a custom operator that onnxruntime does not "
        "have; --custom-ops LIB (custom_ops= in Python) gives the library that has it",
    ),
    (
        r"No Op registered for (\S+) with domain_version of (\d+)",
        "there is no operator {0} in opset {1}",
    ),
    (
        r"Could not find an implementation for (\S+?)\((\d+)\) node with name '(.*)'",
        "onnxruntime has no kernel of {0} (opset {1}) for the types that node {2!r} "
        "has with these providers",
    ),
    (
        r"NOT_IMPLEMENTED : Failed to find kernel for (?:com\.\S+?\.|ai\.onnx\.)?"
        r"(\w+)\((\d+)\) \(node:'?(.*?)'?[ )]",
        "onnxruntime has no kernel of {0} (opset {1}) for the types that node {2!r} "
        "has with these providers",
    ),
    (
        r"[Pp]rotobuf parsing failed|No graph was found in the protobuf",
        "it is not an ONNX model or is truncated",
    ),
    (
        r"running (\S+) node\. Name:'(.*?)' Status Message: "
        r"(?:.*onnxruntime_src\S+ .*\) )?(.*)",
        "{0} node {1!r}: {2}",
    ),
    (
        r"Numpy_type \d+ can't be converted to MLDataType",
        "an input has a type that cannot be handed over as a numpy array",
    ),
)


# --- bytes ------------------------------------------------------------------------


def file_bytes(path: Path) -> int:
    """Return the bytes of a model file and of the data files it refers to.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        total = path.stat().st_size
        if path.suffix == ".onnxtxt" or is_package(path):
            return total
        from onnxshrink.tensors.wire import read_skeleton

        graph = read_skeleton(path)[0].graph
        names = {name for tensor in _tensors(graph) for name in _locations(tensor)}
        for name in sorted(names):
            data = path.parent / name
            total += data.stat().st_size if data.is_file() else 0
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    return total


def _locations(tensor: onnx.TensorProto) -> list[str]:
    return [e.value for e in tensor.external_data if e.key == "location"]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


# --- what loading costs -----------------------------------------------------------


@dataclass(frozen=True)
class LoadCost:
    """What it takes to open a session.

    Attributes:
        seconds: Wall time.
        peak_memory_bytes: Highest resident memory while loading and running nothing,
            beyond that of the process before.
    """

    seconds: float
    peak_memory_bytes: int


_PROBE = """
import json, sys, time
import onnxruntime

def memory(name):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0

onnxruntime.set_default_logger_severity(4)
onnxruntime.disable_telemetry_events()
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = int(sys.argv[2])
libraries = json.loads(sys.argv.pop(4))
for library in libraries:
    options.register_custom_ops_library(library)
if sys.argv[3] == "large":
    options.add_session_config_entry("session.disable_prepacking", "1")
if sys.argv[3] == "package":
    from onnxshrink.runtime import custom_operators, open_session
    custom_operators(libraries).__enter__()
before = memory("VmRSS")
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the high-water mark that the imports left
except OSError:
    pass
start = time.perf_counter()
if sys.argv[3] == "package":
    session = open_session(
        sys.argv[1], threads=int(sys.argv[2]), providers=sys.argv[4:]
    )
else:
    session = onnxruntime.InferenceSession(
        sys.argv[1], options, providers=sys.argv[4:], enable_fallback=0
    )
seconds = time.perf_counter() - start
print("probe", seconds, memory("VmHWM") - before)
"""


def child_path() -> str:
    """Return PYTHONPATH for a child process that imports what this one does.

    Only the folders of our own packages, and what the environment says: the working
    folder, where this process may look first, holds other people's files.
    """
    folders = []
    for name in ("onnxshrink", "numpy", "onnxruntime"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folders.append(str(Path(spec.origin).absolute().parents[1]))
    folders.extend(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys(folder for folder in folders if folder))


def load_cost(
    path: Path,
    *,
    threads: int = 0,
    providers: Sequence[str] = _CPU,
    timeout: float = 600.0,
) -> LoadCost | None:
    """Open the model in a process of its own and measure what that takes.

    Costs the import of onnxruntime, about 0.2 s, beside the loading itself.

    Returns:
        The cost, or ``None`` where it cannot be measured (no /proc, no process, a
        model that does not load).
    """
    if not os.path.exists("/proc/self/status"):
        return None
    size = "large" if file_bytes_or_less(path) >= NO_PREPACKING else "small"
    size = "package" if is_package(path) else size
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBE]
    command += [str(path), str(threads), size, json.dumps(libraries()), *providers]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": child_path()},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    words = done.stdout.split()
    if done.returncode or len(words) < 3 or words[-3] != "probe":
        return None
    seconds, peak = words[-2:]
    return LoadCost(float(seconds), max(0, int(peak)))
