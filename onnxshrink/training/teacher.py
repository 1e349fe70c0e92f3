"""What a teacher gives for samples: computed in batches, kept in a file, checked.

A file of a teacher's answers is a ``.npz`` with one array for each output by name, its
first axis the samples in the order of the data. ``write`` makes it from an ONNX model;
any program can, for a teacher of any framework. Instead of an output ``y`` of class
scores [samples, ..., classes] there may be its k largest: ``y/values`` float
[samples, ..., k], descending, ``y/indices`` int32 of the same shape, the classes these
are of, and ``y/rest`` float32 [samples, ...], the logarithm of the sum of the
exponentials of all other scores. Two more arrays are optional: ``_checksums``, uint32
[samples], the CRC-32 of what the teacher was fed for each sample (its inputs in order,
as C-ordered bytes), and ``_about``, JSON text that names the inputs these are of, the
model, and which of the arrays are tensors from inside of it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp

from onnxshrink import runtime
from onnxshrink._version import __version__
from onnxshrink.base import Progress
from onnxshrink.errors import ModelError, OutputError, UsageError, nearest
from onnxshrink.files import replacing
from onnxshrink.model import Model, ValueInfo
from onnxshrink.samples import Samples
from onnxshrink.samples.columns import Column
from onnxshrink.samples.sources import open_arrays
from onnxshrink.structure.inferred import value_infos
from onnxshrink.tensors import numpy_type

__all__ = [
    "Largest",
    "Recorded",
    "answers",
    "are_shares",
    "digest",
    "float_outputs",
    "read",
    "uncounted",
    "write",
]

Array = np.ndarray[Any, Any]

_BATCH_BYTES = 8 << 20
_BATCH = 64
_OUTPUT_BYTES = 256 << 20
"""Bytes that outputs of one run may have."""
_MAPPED = 64 << 20
"""Bytes from which outputs are kept on disk."""
SHARE_FLOOR = 1e-7
"""Least probability whose logarithm is taken."""
_PARTS = ("values", "indices", "rest")
"""Arrays of an output of which only the largest scores are kept."""
REFERENCE = "the model that this run started from"
"""What ``Recorded.whose`` says of that model."""
_CHECKSUMS = "_checksums"
_ABOUT = "_about"


# --- running ----------------------------------------------------------------------


def answers(
    model: Model,
    samples: Samples,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    dtype: type[np.floating[Any]] | None = None,
    top: Mapping[str, int] | None = None,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress | None = None,
) -> dict[str, Array]:
    """Return what a model gives for samples, in their order.

    Args:
        model: The model.
        samples: The samples; each gets an answer, also where the batch size is fixed.
        names: Names of outputs, or of other values of the main graph.
        folder: Where outputs of more than 64 MB are kept, as mapped files.
        dtype: Float type to store; ``None`` keeps the output's own.
        top: How many of the largest scores along the last axis are kept of an output;
            it is then three arrays, ``name/values``, ``name/indices``, ``name/rest``.
        threads: onnxruntime's threads.
        providers: onnxruntime's execution providers.
        progress: Receives progress.

    Returns:
        Arrays by output name; the first axis counts the samples. Where a sample is a
        whole feed, the second is the output's own first axis.

    Raises:
        ModelError: An output does not count samples, is not a float tensor, or holds
            values that are not finite.
    """
    session = runtime.session(
        model, threads=threads, providers=providers, expose=list(names)
    )
    kept: dict[str, Array] = {}
    shares: dict[str, bool] = {}
    total = len(samples)
    step = _batch_of(samples)
    if samples.batch is None:
        # Large vocabularies and images inside: what comes out bounds the batch too.
        given = session.run(samples.read([0]), names)
        step = max(
            1, min(step, _OUTPUT_BYTES // max(1, sum(map(_nbytes, given.values()))))
        )
    for start, stop in _stretches(samples, step):
        # Repeat the last sample where a fixed batch is not full.
        chosen = np.minimum(np.arange(start, start + step), stop - 1)
        chosen = chosen if samples.batch else chosen[: stop - start]
        given = session.run(samples.read(chosen), names)
        for name in names:
            value = _counted(name, given.pop(name), len(chosen), samples.whole)
            value = value[: stop - start]
            pieces = {name: value}
            if top and name in top:
                known = shares.setdefault(name, are_shares(value))
                found = _largest(value, top[name], is_share=known)
                pieces = {f"{name}/{part}": array for part, array in found.items()}
            for key, piece in pieces.items():
                wanted = dtype if dtype and key in (name, f"{name}/values") else None
                if key not in kept:
                    kept[key] = _room(
                        folder,
                        len(kept),
                        (total, *piece.shape[1:]),
                        wanted or piece.dtype,
                    )
                _store(name, kept[key], piece, start, samples)
        if progress is not None:
            progress(stop, total, "teacher")
    return kept


def uncounted(
    model: Model, samples: Samples, names: Sequence[str], *, threads: int = 0
) -> dict[str, str]:
    """Return the outputs that are no floats for each sample, and why.

    Args:
        model: The model.
        samples: A few samples.
        names: Names of outputs.
        threads: onnxruntime's threads.
    """
    floats = set(float_outputs(model))
    found = {
        info.name: f"it holds {_kind(info)}, no floats"
        for info in model.outputs
        if info.name in names and info.name not in floats
    }
    left = [name for name in names if name not in found]
    if not left:
        return found
    session = runtime.session(model, threads=threads)
    step = samples.batch or 1
    most = len(samples) // step * step
    counts = [most] if samples.batch or most < 3 else [most, most - 1]
    shapes: dict[str, tuple[int, ...]] = {}
    for count in [step] if samples.whole or samples.batch else counts:
        given = session.run(samples.read(np.arange(count)), left)
        for name in left:
            value = given[name]
            shape = np.shape(value)
            if not samples.whole and (not shape or shape[0] != count):
                found.setdefault(
                    name,
                    f"it is {list(shape)} for {count} samples, so its first axis does "
                    "not count them",
                )
            elif shapes.setdefault(name, shape[1:]) != shape[1:]:
                found.setdefault(name, "its shape changes from sample to sample")
    return found


def _kind(info: ValueInfo) -> str:
    if info.kind != "tensor" or not info.data_type:
        return f"a {info.kind}"
    dtype = numpy_type(info.data_type)
    return "strings" if dtype.hasobject else f"{dtype.name} values"


def _stretches(samples: Samples, step: int) -> Iterator[tuple[int, int]]:
    """Yield the positions [start, stop) of all samples, so many of one shape each."""
    for first, last in samples.alike(0, len(samples)):
        for start in range(first, last, step):
            yield start, min(start + step, last)


def _counted(name: str, value: Any, count: int, whole: bool) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise ModelError(f"output {name!r} is not a tensor of floats")
    rows: Array = value[None] if whole else value
    if rows.ndim == 0 or len(rows) != count:
        raise ModelError(
            f"output {name!r} is {list(rows.shape)} for {count} samples; its first "
            "axis must count them"
        )
    return rows


def _store(name: str, kept: Array, value: Array, start: int, samples: Samples) -> None:
    if kept.shape[1:] != value.shape[1:]:
        raise ModelError(f"output {name!r} changes its shape between samples")
    with np.errstate(over="ignore"):
        stored = value.astype(kept.dtype)
    if not np.isfinite(stored).all():
        bad = ~np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
        place = start + int(bad.argmax())
        raise ModelError(
            f"output {name!r} is not finite in {stored.dtype} for sample "
            f"{samples.positions[place]} of {samples.source}"
            f"{_infinite(samples.read([place]))}"
        )
    kept[start : start + len(value)] = stored


def _infinite(feed: Mapping[str, Array]) -> str:
    """Say which inputs hold infinity."""
    floats = {name: v for name, v in feed.items() if v.dtype.kind == "f"}
    found = [repr(name) for name, value in floats.items() if np.isinf(value).any()]
    return f", whose {' and '.join(found)} holds infinity" if found else ""


def are_shares(scores: Array, axis: int = -1) -> bool:
    """Whether scores are probabilities already: shares of 1 along an axis."""
    total = scores.sum(axis=axis, dtype=np.float64)
    return bool(scores.min() >= 0 and np.allclose(total, 1, atol=1e-3))


def _largest(scores: Array, count: int, *, is_share: bool) -> dict[str, Array]:
    """Return the largest scores along the last axis, which they are, and the rest."""
    if scores.ndim < 2 or scores.shape[-1] <= count:
        raise ModelError(
            f"of scores {list(scores.shape)} the {count} largest cannot be kept; there "
            "must be more along the last axis"
        )
    logs = np.asarray(scores, np.float32)
    if is_share:
        logs = np.log(np.maximum(logs, np.float32(SHARE_FLOOR)))
    indices = np.sort(np.argpartition(-logs, count, axis=-1)[..., :count], axis=-1)
    values = np.take_along_axis(logs, indices, -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    others = logs.astype(np.float64)
    np.put_along_axis(others, indices, -np.inf, -1)
    return {
        "values": np.take_along_axis(values, order, -1),
        "indices": np.take_along_axis(indices, order, -1).astype(np.int32),
        "rest": logsumexp(others, axis=-1).astype(np.float32),
    }


def _nbytes(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else 0


def _batch_of(samples: Samples) -> int:
    if samples.batch:
        return samples.batch
    one = sum(value.nbytes for value in samples.read([0]).values())
    return max(1, min(_BATCH, _BATCH_BYTES // max(1, one)))


def _room(
    folder: Path | None, number: int, shape: tuple[int, ...], dtype: Any
) -> Array:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if folder is None or size < _MAPPED:
        return np.empty(shape, dtype)
    path = folder / f"answers-{number}.npy"
    made: Array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    return made


def checksums(samples: Samples) -> Array:
    """Return the CRC-32 of what each sample feeds, uint32 [samples]."""
    found = np.zeros(len(samples), np.uint32)
    step = _batch_of(samples)
    for start, stop in _stretches(samples, step):
        if samples.whole:
            feeds = [
                [np.ascontiguousarray(v) for v in samples.read([at]).values()]
                for at in range(start, stop)
            ]
        else:
            read = samples.read(np.arange(start, stop))
            feeds = [
                [np.ascontiguousarray(v[at]) for v in read.values()]
                for at in range(stop - start)
            ]
        for at, feed in enumerate(feeds):
            code = 0
            for value in feed:
                code = zlib.crc32(value.tobytes(), code)
            found[start + at] = code
    return found


def _inputs(samples: Samples) -> list[list[Any]]:
    """Return name, dtype and shape of what one sample feeds."""
    feed = samples.read(np.arange(samples.batch or 1))
    cut = 0 if samples.whole else 1
    return [[k, str(v.dtype), list(v.shape[cut:])] for k, v in feed.items()]


# --- the file ---------------------------------------------------------------------


def write(
    path: Path,
    model: Model,
    samples: Samples,
    *,
    names: Sequence[str] = (),
    tensors: Sequence[str] = (),
    top_k: int = 0,
    dtype: type[np.floating[Any]] | None = None,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress | None = None,
) -> dict[str, tuple[int, ...]]:
    """Run a teacher over samples and write what it gives; return the shapes by name.

    The file appears at once or not at all.

    Args:
        path: A ``.npz``.
        model: The teacher.
        samples: All samples of the data, in its order, bound to the teacher's inputs.
        names: Outputs to keep; empty is every output of floats.
        tensors: Values inside of the main graph to keep as well, names or glob
            patterns; a pattern stands for values of floats only.
        top_k: Keep only so many of the largest scores along the last axis of outputs
            of rank 2 or more that have more of them; 0 keeps all.
        dtype: Float type to store.
        threads: onnxruntime's threads.
        providers: onnxruntime's execution providers.
        progress: Receives progress.

    Raises:
        UsageError: The path is not a ``.npz``, ``top_k`` is negative, or there is no
            such output or value.
        ModelError: The teacher cannot be run on the samples.
        OutputError: The file cannot be written.
    """
    if path.suffix != ".npz":
        raise UsageError(f"a file of logits is a .npz, not {path.name}")
    known = [info.name for info in model.outputs]
    for name in names:
        if name not in known:
            raise UsageError(
                f"the model has no output {name!r}; it has {', '.join(known)}"
            )
    if top_k < 0:
        raise UsageError(f"the number of largest scores is at least 0, not {top_k}")
    wanted = list(names) or float_outputs(model)
    if not wanted:
        raise UsageError("the model has no output of floats to keep")
    inside = _inside(model, tensors, wanted)
    about = {
        "onnxshrink": __version__,
        "model": digest(model),
        "name": model.source.name if model.source is not None else "",
        "inputs": _inputs(samples),
        "tensors": inside,
    }
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent
        ) as scratch:
            folder = Path(scratch)
            kept = answers(
                model,
                samples,
                [*wanted, *inside],
                folder=folder,
                dtype=dtype,
                top=_top(model, samples, wanted, top_k, threads),
                threads=threads,
                providers=providers,
                progress=progress,
            )
            arrays: dict[str, Array] = {
                **kept,
                _CHECKSUMS: checksums(samples),
                _ABOUT: np.asarray(json.dumps(about, sort_keys=True))[None],
            }
            with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
                for name, array in arrays.items():
                    entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                    with archive.open(entry, "w", force_zip64=True) as part:
                        np.lib.format.write_array(part, array, allow_pickle=False)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return {name: array.shape for name, array in kept.items()}


def _top(
    model: Model, samples: Samples, names: Sequence[str], count: int, threads: int
) -> dict[str, int]:
    """Return of which outputs the largest scores are kept: those that have more."""
    if not count:
        return {}
    feed = samples.read(np.arange(samples.batch or 1))
    given = runtime.session(model, threads=threads).run(feed, names)
    return {
        name: count
        for name, value in given.items()
        if isinstance(value, np.ndarray)
        and value.ndim + samples.whole > 1
        and value.shape[-1] > count
    }


def _inside(model: Model, patterns: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """Return names of values of the main graph, in its order.

    Raises:
        UsageError: There is no such value, or it is no tensor of floats.
    """
    known = value_infos(model) if patterns else {}
    kinds = {
        tensor.name: known[tensor.name].data_type if tensor.name in known else 0
        for node in model.graph.nodes
        for tensor in node.outputs
        if tensor.name
    }
    floats = [n for n, kind in kinds.items() if kind and numpy_type(kind).kind == "f"]
    found: list[str] = []
    for pattern in patterns:
        exact = [name for name in kinds if name == pattern]
        matches = exact or fnmatch.filter(floats, pattern)
        if not matches:
            raise UsageError(
                f"the model computes no value {pattern!r}.{nearest(pattern, floats)}"
            )
        found += [name for name in matches if name not in outputs]
    return list(dict.fromkeys(found))


def float_outputs(model: Model) -> list[str]:
    """Return the names of outputs that are tensors of floats."""
    return [
        info.name
        for info in model.outputs
        if info.kind == "tensor"
        and info.data_type
        and numpy_type(info.data_type).kind == "f"
    ]


def digest(model: Model) -> str:
    """SHA-256 of a model as plain bytes, of its file where that is too large."""
    if model.source is not None and model.source.is_file():
        code = hashlib.sha256()
        with model.source.open("rb") as file:
            while chunk := file.read(1 << 20):
                code.update(chunk)
        return code.hexdigest()
    return hashlib.sha256(model.to_bytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Largest:
    """The largest scores of an output, for each sample.

    Attributes:
        values: [..., k] of floats, descending.
        indices: [..., k], the classes they are of.
        rest: [...], the logarithm of the sum of the exponentials of all other scores.
    """

    values: Column
    indices: Column
    rest: Column


@dataclass(frozen=True, eq=False)
class Recorded:
    """A teacher's answers in a file.

    Attributes:
        path: The file.
        outputs: Outputs by name; a row for each sample of the data, in its order.
        largest: Outputs of which only the largest scores are there.
        tensors: Values from inside of the teacher.
    """

    path: Path
    outputs: Mapping[str, Column]
    largest: Mapping[str, Largest]
    tensors: Mapping[str, Column]
    _checksums: Column | None = None
    _about: Mapping[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return [*self.outputs, *self.largest]

    @property
    def count(self) -> int:
        """Number of samples."""
        columns = [*self.outputs.values(), *(o.values for o in self.largest.values())]
        return columns[0].count

    def check(self, samples: Samples) -> str:
        """Refuse samples that are not those the teacher saw.

        Args:
            samples: Some of the samples of the data.

        Returns:
            Why only their number could be checked, or ``""``.

        Raises:
            UsageError: The number of samples or a checksum differs.
        """
        if samples.source_count != self.count:
            raise UsageError(
                f"{self.path} has {self.count} samples and {samples.source} has "
                f"{samples.source_count}; record the teacher on the data given"
            )
        if self._checksums is None:
            return "it holds no checksums of the data"
        inputs = (self._about or {}).get("inputs")
        if inputs is not None and inputs != _inputs(samples):
            return "the teacher takes other inputs, so checksums cannot be compared"
        wanted = self._checksums.rows(samples.positions)
        differs = np.flatnonzero(wanted != checksums(samples))
        if len(differs):
            raise UsageError(
                f"{len(differs)} of {len(samples)} samples, the first of them number "
                f"{samples.positions[differs[0]]} of {samples.source}, are not what "
                f"the teacher of {self.path} was fed: other data, another order or "
                "another scale"
            )
        return ""

    def whose(self, model: Model) -> str:
        """Say whether the answers are this model's, or ``""`` if it is not known."""
        about = self._about or {}
        theirs, name = about.get("model"), about.get("name")
        if not isinstance(theirs, str):
            return ""
        if theirs == digest(model):
            return REFERENCE
        called = f"{name}, " if isinstance(name, str) and name else ""
        return f"another model, {called}SHA-256 {theirs[:12]}"

    def rows(self, name: str, samples: Samples) -> Array:
        """Return an output or a value from inside for samples, float32.

        Raises:
            UsageError: There is no such array, or it holds NaN or infinity.
        """
        known = {**self.outputs, **self.tensors}
        if name not in known:
            raise UsageError(
                f"{self.path} has no output {name!r}; it has {', '.join(known)}"
            )
        return self._floats(name, known[name], samples)

    def top_rows(self, name: str, samples: Samples, classes: int) -> dict[str, Array]:
        """Return the largest scores of an output for samples.

        Args:
            name: The output, one of ``largest``.
            samples: The samples.
            classes: How many classes there are.

        Returns:
            ``values`` float32, ``indices`` int64 and ``rest`` float32.

        Raises:
            UsageError: A class is not among those that there are, or appears twice, or
                a score is NaN or infinite.
        """
        found = self.largest[name]
        indices = found.indices.rows(samples.positions).astype(np.int64)
        low, high = int(indices.min(initial=0)), int(indices.max(initial=0))
        if low < 0 or high >= classes:
            raise UsageError(
                f"{self.path}: {name!r} has scores of class {low if low < 0 else high}"
                f", and there are {classes} classes"
            )
        ordered = np.sort(indices, axis=-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise UsageError(f"{self.path}: {name!r} has two scores of one class")
        return {
            "values": self._floats(name, found.values, samples),
            "indices": indices,
            "rest": self._floats(name, found.rest, samples),
        }

    def _floats(self, name: str, column: Column, samples: Samples) -> Array:
        found = column.rows(samples.positions).astype(np.float32)
        if not np.isfinite(found).all():
            raise UsageError(f"{self.path}: {name!r} holds NaN or infinity")
        return found


def read(path: Path) -> Recorded:
    """Open a file of a teacher's answers; what is large is read later.

    Raises:
        UsageError: It does not hold such answers.
        ModelError: It cannot be read.
    """
    if path.suffix != ".npz":
        raise UsageError(f"a file of logits is a .npz, not {path.name}")
    arrays = open_arrays(path)
    sums, text = arrays.pop(_CHECKSUMS, None), arrays.pop(_ABOUT, None)
    largest = _read_largest(path, arrays)
    arrays = {name: a for name, a in arrays.items() if a.dtype.kind == "f"}
    counts = {name: column.count for name, column in arrays.items()}
    for name, one in largest.items():
        parts = (one.values, one.indices, one.rest)
        counts |= {f"{name}/{p}": c.count for p, c in zip(_PARTS, parts, strict=True)}
    if sums is not None:
        if sums.dtype != np.uint32 or sums.shape:
            raise UsageError(f"{path}: {_CHECKSUMS} is uint32, one for each sample")
        counts[_CHECKSUMS] = sums.count
    if len(set(counts.values())) > 1 or not all(counts.values()):
        words = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise UsageError(f"{path}: the numbers of samples differ or are 0: {words}")
    about = None if text is None else _read_about(path, text)
    inside = (about or {}).get("tensors")
    inside = inside if isinstance(inside, list) else []
    tensors = {name: arrays.pop(name) for name in inside if name in arrays}
    if not arrays and not largest:
        raise UsageError(f"{path} holds no array of floats")
    return Recorded(path, arrays, largest, tensors, sums, about)


def _read_largest(path: Path, arrays: dict[str, Column]) -> dict[str, Largest]:
    """Take outputs of which only the largest scores are there out of the arrays."""
    found: dict[str, Largest] = {}
    for key in list(arrays):
        name, slash, part = key.rpartition("/")
        keys = [f"{name}/{one}" for one in _PARTS]
        if not slash or part != "values" or any(key not in arrays for key in keys):
            continue
        one = Largest(*(arrays.pop(key) for key in keys))
        kinds = one.values.dtype.kind, one.indices.dtype.kind, one.rest.dtype.kind
        shape = one.values.shape
        fits = one.indices.shape == shape and one.rest.shape == shape[:-1]
        if not shape or not fits or kinds not in (("f", "i", "f"), ("f", "u", "f")):
            raise UsageError(
                f"{path}: the largest scores of {name!r} are floats [..., k], integers "
                f"[..., k] and floats [...] for a sample, not {one.values}, "
                f"{one.indices} and {one.rest}"
            )
        found[name] = one
    return found


def _read_about(path: Path, text: Column) -> Mapping[str, Any]:
    try:
        if text.dtype.kind != "U" or text.count != 1 or text.shape:
            raise ValueError("it is not one text")
        loaded = json.loads(str(text.rows(np.zeros(1, np.int64))[0]))
        if not isinstance(loaded, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise UsageError(f"{path}: cannot read {_ABOUT}: {error}") from error
    return loaded
