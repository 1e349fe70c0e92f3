"""What a teacher gives for samples: computed in batches, kept in a file, checked.

A file of a teacher's outputs is a ``.npz`` with one array for each output by name, its
first axis the samples in the order of the data. ``write`` makes it from an ONNX model;
any program can, for a teacher of any framework. Two more arrays are optional:
``_checksums``, uint32 [samples], the CRC-32 of what the teacher was fed for each sample
(its inputs in order, as C-ordered bytes), and ``_about``, JSON text that names the
inputs these are of and the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink import runtime
from onnxshrink._columns import Column, open_arrays
from onnxshrink._version import __version__
from onnxshrink.base import Progress
from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples

__all__ = ["Recorded", "answers", "read", "write"]

Array = np.ndarray[Any, Any]

_BATCH_BYTES = 8 << 20
_BATCH = 64
_MAPPED = 64 << 20
"""Bytes from which outputs are kept on disk."""
_CHECKSUMS = "_checksums"
_ABOUT = "_about"


# --- running ----------------------------------------------------------------------


def answers(
    model: Model | Path,
    samples: Samples,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    dtype: type[np.floating[Any]] | None = None,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress | None = None,
) -> dict[str, Array]:
    """Return what a model gives for samples, in their order.

    Args:
        model: The model.
        samples: The samples; each gets an answer, also where the batch size is fixed.
        names: Names of the outputs.
        folder: Where outputs of more than 64 MB together are kept, as mapped files.
        dtype: Float type to store; ``None`` keeps the output's own.
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
    session = runtime.session(model, threads=threads, providers=providers)
    kept: dict[str, Array] = {}
    total = len(samples)
    step = _batch_of(samples)
    for start in range(0, total, step):
        stop = min(start + step, total)
        # Repeat the last sample where a fixed batch is not full.
        chosen = np.minimum(np.arange(start, start + step), total - 1)
        chosen = chosen if samples.batch else chosen[: stop - start]
        given = session.run(samples.read(chosen), names)
        for name in names:
            value = given[name]
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
                raise ModelError(f"output {name!r} is not a tensor of floats")
            if samples.whole:
                value = value[None]
            if value.ndim == 0 or len(value) != len(chosen):
                raise ModelError(
                    f"output {name!r} is {list(value.shape)} for {len(chosen)} "
                    "samples; its first axis must count them"
                )
            if name not in kept:
                kept[name] = _room(
                    folder, len(kept), (total, *value.shape[1:]), dtype or value.dtype
                )
            if kept[name].shape[1:] != value.shape[1:]:
                raise ModelError(f"output {name!r} changes its shape between samples")
            with np.errstate(over="ignore"):
                stored = value[: stop - start].astype(kept[name].dtype)
            if not np.isfinite(stored).all():
                place = int(
                    ~np.isfinite(stored).reshape(len(stored), -1).all(1).argmin()
                )
                raise ModelError(
                    f"output {name!r} is not finite in {stored.dtype} for sample "
                    f"{start + max(0, place)}"
                )
            kept[name][start:stop] = stored
        if progress is not None:
            progress(stop, total, "teacher")
    return kept


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
    for start in range(0, len(samples), step):
        stop = min(start + step, len(samples))
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
        dtype: Float type to store.
        threads: onnxruntime's threads.
        providers: onnxruntime's execution providers.
        progress: Receives progress.

    Raises:
        UsageError: The path is not a ``.npz``, or there is no such output.
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
    wanted = list(names) or _float_outputs(model)
    if not wanted:
        raise UsageError("the model has no output of floats to keep")
    about = {
        "onnxshrink": __version__,
        "model": _digest(model),
        "inputs": _inputs(samples),
    }
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent
        ) as scratch:
            folder = Path(scratch)
            kept = answers(
                model,
                samples,
                wanted,
                folder=folder,
                dtype=dtype,
                threads=threads,
                providers=providers,
                progress=progress,
            )
            arrays: dict[str, Array] = {
                **kept,
                _CHECKSUMS: checksums(samples),
                _ABOUT: np.asarray(json.dumps(about, sort_keys=True))[None],
            }
            made = folder / "made.npz"
            with zipfile.ZipFile(made, "w") as archive:
                for name, array in arrays.items():
                    entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                    with archive.open(entry, "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return {name: array.shape for name, array in kept.items()}


def _float_outputs(model: Model) -> list[str]:
    from onnxshrink.tensors import numpy_type

    return [
        info.name
        for info in model.outputs
        if info.kind == "tensor"
        and info.data_type
        and numpy_type(info.data_type).kind == "f"
    ]


def _digest(model: Model) -> str:
    """SHA-256 of a model as plain bytes, of its file where that is too large."""
    if model.source is not None and model.source.is_file():
        code = hashlib.sha256()
        with model.source.open("rb") as file:
            while chunk := file.read(1 << 20):
                code.update(chunk)
        return code.hexdigest()
    return hashlib.sha256(model.to_bytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Recorded:
    """A teacher's outputs in a file.

    Attributes:
        path: The file.
        outputs: Outputs by name; a row for each sample of the data, in its order.
    """

    path: Path
    outputs: Mapping[str, Column]
    _checksums: Column | None = None
    _about: Mapping[str, Any] | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return next(iter(self.outputs.values())).count

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

    def rows(self, name: str, samples: Samples) -> Array:
        """Return an output for samples, float32.

        Raises:
            UsageError: There is no such output, or it holds NaN or infinity.
        """
        if name not in self.outputs:
            raise UsageError(
                f"{self.path} has no output {name!r}; it has {', '.join(self.outputs)}"
            )
        found = self.outputs[name].rows(samples.positions).astype(np.float32)
        if not np.isfinite(found).all():
            raise UsageError(f"{self.path}: {name!r} holds NaN or infinity")
        return found


def read(path: Path) -> Recorded:
    """Open a file of a teacher's outputs; what is large is read later.

    Raises:
        UsageError: It does not hold such outputs.
        ModelError: It cannot be read.
    """
    if path.suffix != ".npz":
        raise UsageError(f"a file of logits is a .npz, not {path.name}")
    arrays = open_arrays(path)
    sums, about = arrays.pop(_CHECKSUMS, None), arrays.pop(_ABOUT, None)
    arrays = {name: a for name, a in arrays.items() if a.dtype.kind == "f"}
    if not arrays:
        raise UsageError(f"{path} holds no array of floats")
    counts = {name: column.count for name, column in arrays.items()}
    if sums is not None:
        if sums.dtype != np.uint32 or sums.shape:
            raise UsageError(f"{path}: {_CHECKSUMS} is uint32, one for each sample")
        counts[_CHECKSUMS] = sums.count
    if len(set(counts.values())) > 1 or not all(counts.values()):
        words = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise UsageError(f"{path}: the numbers of samples differ or are 0: {words}")
    facts: Mapping[str, Any] | None = None
    if about is not None:
        try:
            if about.dtype.kind != "U" or about.count != 1 or about.shape:
                raise ValueError("it is not one text")
            loaded = json.loads(str(about.rows(np.zeros(1, np.int64))[0]))
            if not isinstance(loaded, dict):
                raise ValueError("it is not an object")
            facts = loaded
        except ValueError as error:
            raise UsageError(f"{path}: cannot read {_ABOUT}: {error}") from error
    return Recorded(path, arrays, sums, facts)
