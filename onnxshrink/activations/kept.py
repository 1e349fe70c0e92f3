"""Calibration kept in a folder: a run that was interrupted goes on, others are read.

The file of a run is named by a digest of the model, the samples and the statistics. It
holds, for each tensor, what was gathered and from how many samples. What is read is
checked before it is believed, and a file that does not fit is ignored with a note.

Tested in tests/quantization/test_calibration.py.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.activations.gathering import SLICE_BYTES, fingerprint, gather
from onnxshrink.errors import OutputError, UsageError
from onnxshrink.files import replacing
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.statistics import Statistic, Stored

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = ["gather_cached"]

Array = NDArray[Any]

SAVE_SECONDS = 10.0
"""How often an unfinished run is saved, at most."""
SAVE_SHARE = 20
"""Saving takes no more than one of so many seconds."""
_FORMAT = 1
_LARGEST = 1 << 30
"""Bytes a file may hold when unpacked."""
_PROBES = 64
"""Samples whose values are part of a run's name; positions and sizes of all are."""


def gather_cached(
    model: Model,
    wanted: Mapping[str, Stored],
    ctx: Context,
    folder: Path,
    *,
    slice_bytes: int = SLICE_BYTES,
    least: float = 0.0,
) -> dict[str, Statistic]:
    """Feed statistics as ``Context.statistics`` does, and keep them in a folder.

    Args:
        model: The model; it is not changed.
        wanted: A fresh statistic for each tensor name.
        ctx: Samples, session options, progress and notes.
        folder: Where the file is kept; made if it is missing.
        slice_bytes: Bytes of activations held at a time.
        least: Seconds a run must have taken for its end to be kept.

    Returns:
        The statistics under the same names, fed; tensors that cannot be watched are
        absent.

    Raises:
        ModelError: There are no calibration samples, or the model does not run.
        OutputError: The folder cannot be written.
        UsageError: A statistic cannot be stored.
    """
    samples = ctx.samples.calibration
    if samples is None or not samples.used:
        return gather(model, wanted, ctx, slice_bytes=slice_bytes)
    for name, statistic in wanted.items():
        if not isinstance(statistic, Stored):
            raise UsageError(
                f"a {type(statistic).__name__} of {name!r} cannot be kept in a folder"
            )
        statistic.state()
    file = _CalibrationFile.of(model, wanted, samples, folder)
    run = file.read(wanted, samples.used, ctx)
    run.complete(model, samples, ctx, file, slice_bytes, least)
    return {name: run.fed[name] for name in wanted if name in run.fed}


@dataclass(eq=False)
class _Calibration:
    """A calibration as far as it has come.

    Attributes:
        fed: The statistics.
        seen: How many samples each has seen.
        saved: When it was saved last.
        pause: Seconds until it is saved again.
    """

    fed: dict[str, Stored]
    seen: dict[str, int]
    saved: float = field(default_factory=time.monotonic)
    pause: float = field(default_factory=lambda: SAVE_SECONDS)

    def complete(
        self,
        model: Model,
        samples: Samples,
        ctx: Context,
        file: _CalibrationFile,
        slice_bytes: int,
        least: float,
    ) -> None:
        """Feed each statistic the samples it has not seen, saving now and then."""
        total = samples.used
        begun = time.monotonic()
        for start in sorted(set(self.seen.values())):
            names = [name for name, seen in self.seen.items() if seen == start]
            if start >= total:
                continue

            def after(fed: Iterable[str], count: int, start: int = start) -> None:
                for name in fed:
                    self.seen[name] = start + count
                now = time.monotonic()
                if now - self.saved >= self.pause:
                    file.write(self)
                    self.saved = time.monotonic()
                    self.pause = max(SAVE_SECONDS, SAVE_SHARE * (self.saved - now))

            found = gather(
                model,
                {name: self.fed[name] for name in names},
                # Half-fed statistics must not be remembered as whole ones.
                replace(ctx, cache={}),
                slice_bytes=slice_bytes,
                samples=samples.take(slice(start, None)),
                after=after,
            )
            for name in names:
                if name in found:
                    self.seen[name] = total
                else:
                    del self.fed[name], self.seen[name]
            if time.monotonic() - begun >= least:
                file.write(self)


@dataclass(frozen=True)
class _CalibrationFile:
    """Where a calibration is kept.

    Attributes:
        path: The file.
        mark: Digest of the model, the samples and the statistics.
    """

    path: Path
    mark: str

    @classmethod
    def of(
        cls, model: Model, wanted: Mapping[str, Stored], samples: Samples, folder: Path
    ) -> _CalibrationFile:
        """Name the file of a calibration, and make its folder."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{_FORMAT} {fingerprint(model)}".encode())
        for name in sorted(wanted):
            digest.update(f"{name}\0{wanted[name].key!r}\0".encode())
        _identify(samples, digest)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot keep calibration in {folder}: {error}; give a folder that "
                "can be written"
            ) from error
        mark = digest.hexdigest()
        return cls(folder / f"calibration-{mark}.npz", mark)

    # --- reading ------------------------------------------------------------------

    def read(
        self, wanted: Mapping[str, Stored], total: int, ctx: Context
    ) -> _Calibration:
        """Return the calibration that was kept, or a fresh one."""
        fresh = _Calibration(
            {name: one.fresh() for name, one in wanted.items()},
            dict.fromkeys(wanted, 0),
        )
        try:
            kept = self._arrays()
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            ctx.skipped(self.path.name, f"unreadable calibration is ignored: {error}")
            return fresh
        try:
            return self._restored(kept, wanted, total)
        except UsageError as error:
            ctx.skipped(self.path.name, f"calibration is ignored: {error}")
            return fresh

    def _arrays(self) -> dict[str, Array]:
        with self.path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                size = sum(info.file_size for info in archive.infolist())
            if size > _LARGEST:
                raise ValueError(f"it unpacks to {size:,} bytes")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}

    def _restored(
        self, kept: Mapping[str, Array], wanted: Mapping[str, Stored], total: int
    ) -> _Calibration:
        about = kept.get("about")
        if about is None or about.dtype != np.uint8 or about.ndim != 1:
            raise UsageError("it is not a calibration")
        try:
            facts = json.loads(about.tobytes())
            mark, entries = facts["mark"], dict(facts["seen"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"it is not a calibration: {error}") from error
        if mark != self.mark:
            raise UsageError("it belongs to another model, other samples or statistics")
        run = _Calibration({}, {})
        for number, (name, seen) in enumerate(entries.items()):
            if name not in wanted:
                raise UsageError(f"{name!r} was not asked for")
            if type(seen) is not int or not 0 <= seen <= total:
                raise UsageError(f"{name!r} cannot have seen {seen!r} samples")
            statistic = wanted[name].fresh()
            start = f"{number}."
            state = {
                key.removeprefix(start): array
                for key, array in kept.items()
                if key.startswith(start)
            }
            statistic.restore(state)
            run.fed[name], run.seen[name] = statistic, seen
        return run

    # --- writing ------------------------------------------------------------------

    def write(self, run: _Calibration) -> None:
        """Write the calibration; the file is whole, or as it was before."""
        facts = {"mark": self.mark, "seen": run.seen}
        arrays = {"about": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        for number, statistic in enumerate(run.fed.values()):
            for key, array in statistic.state().items():
                arrays[f"{number}.{key}"] = array
        with replacing(self.path, what="cannot keep calibration in") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]


def _identify(samples: Samples, digest: Any) -> None:
    """Feed a digest with what tells these samples from others.

    That is the positions of all samples and the values of some, evenly spread. Reading
    all of 10,000 images would take longer than the file saves.
    """
    digest.update(samples.positions.tobytes())
    digest.update(f"{samples.source_count} {samples.batch}".encode())
    chosen = np.unique(np.linspace(0, samples.used - 1, _PROBES).astype(np.int64))
    for position in chosen:
        first = int(position) // (samples.batch or 1) * (samples.batch or 1)
        feed = samples.read(np.arange(first, first + (samples.batch or 1)))
        for name in sorted(feed):
            values = np.asarray(feed[name])
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            if values.dtype.kind == "O":
                digest.update(repr(values.tolist()).encode())
            else:
                digest.update(np.ascontiguousarray(values).tobytes())
