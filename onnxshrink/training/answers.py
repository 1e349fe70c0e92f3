"""Where a training finds its teacher's answers: in a file, in advance, or live.

Tested in tests/training/test_teacher.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.training import teacher

__all__ = ["Answers", "FileTeacher", "Lookup", "ModelTeacher", "values_of"]

Array = np.ndarray[Any, Any]
Answers = Mapping[str, Mapping[str, Array]]
"""A teacher's rows by name and by part, see ``onnxshrink.training.heads``."""
Lookup = Callable[[Array, Mapping[str, Array]], Answers]
"""Returns the answers to a batch, from positions of its samples and what is fed."""
_CHUNK = 64


class FileTeacher:
    """Answers that a teacher gave once.

    Attributes:
        recorded: The file.
        shared: What the file calls each output of the model that it has.
        classes: How many classes outputs have.
        is_reference: Whether it is known to be the model that the run started from.
        notes: What one should know of the file.
    """

    def __init__(self, path: Path, model: Model, ctx: Context) -> None:
        """Open a file for a model that is to be taught.

        Raises:
            UsageError: It does not hold answers, or none that the model could give.
            ModelError: It cannot be read.
        """
        self.recorded = teacher.read(path)
        self.notes: list[str] = []
        whose = self.recorded.whose(ctx.reference)
        self.is_reference = whose == teacher.REFERENCE
        if whose:
            self.notes.append(f"{path} holds answers of {whose}")
        known, names = self.recorded.names, teacher.float_outputs(model)
        self.shared = {name: name for name in names if name in known}
        if not self.shared and len(names) == len(known) == 1:
            self.shared = {names[0]: known[0]}
        if not self.shared:
            raise UsageError(
                f"{path} has {', '.join(known)}, and none of that is an output of the "
                f"model, which has {', '.join(names) or 'none'}"
            )
        self.classes: dict[str, int] = {}

    @property
    def values(self) -> list[str]:
        """Names of the tensors there are."""
        return [*self.recorded.tensors, *self.recorded.outputs]

    def check(self, *parts: Samples) -> None:
        """Refuse samples that are not those of the file."""
        for samples in parts:
            note = self.recorded.check(samples)
        if note:
            self.notes.append(f"{self.recorded.path} is taken on trust: {note}")

    def ask(self, samples: Samples, names: Sequence[str]) -> Answers:
        """Return the answers to samples."""
        found: dict[str, Mapping[str, Array]] = {}
        for name in names:
            theirs = self.shared.get(name, name)
            if theirs in self.recorded.largest:
                classes = self.classes.get(name, 1 << 31)
                found[name] = self.recorded.top_rows(theirs, samples, classes)
            else:
                found[name] = {"": self.recorded.rows(theirs, samples)}
        return found

    def lookup(self, samples: Samples, names: Sequence[str]) -> Lookup:
        """Return a way to read answers in batches; all of them are looked at once."""
        for start in range(0, len(samples), _CHUNK):
            self.ask(samples.take(slice(start, start + _CHUNK)), names)
        return lambda positions, feed: self.ask(samples.take(positions), names)


class ModelTeacher:
    """The model that the run started from.

    Attributes:
        is_reference: Whether it is known to be that: yes.
        notes: What one should know of it.
    """

    is_reference = True

    def __init__(self, ctx: Context, folder: Path) -> None:
        """Take the reference of a context, and a folder for large answers."""
        self._ctx, self._folder = ctx, folder
        self.notes: list[str] = []

    @property
    def values(self) -> list[str]:
        """Names of the tensors there are."""
        return values_of(self._ctx.reference)

    def ask(
        self, samples: Samples, names: Sequence[str], folder: Path | None = None
    ) -> Answers:
        """Return the answers to samples."""
        ctx = self._ctx
        found = teacher.answers(
            ctx.reference,
            samples,
            names,
            folder=folder,
            dtype=np.float32,
            threads=ctx.threads,
            providers=ctx.providers,
            progress=ctx.progress,
        )
        return {name: {"": rows} for name, rows in found.items()}

    def lookup(self, samples: Samples, names: Sequence[str]) -> Lookup:
        """Return a way to read answers in batches; all are computed now."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        stored = self.ask(samples, names, folder)
        return lambda positions, feed: {
            name: {part: array[positions] for part, array in rows.items()}
            for name, rows in stored.items()
        }

    def live(self, samples: Samples, names: Sequence[str]) -> Lookup:
        """Return a way to compute answers to what a step is fed with."""
        ctx = self._ctx
        session = runtime.session(
            ctx.reference, threads=ctx.threads, providers=ctx.providers, expose=names
        )

        def answer(positions: Array, feed: Mapping[str, Array]) -> Answers:
            found = session.run(feed, names)
            rows = {n: np.asarray(array, np.float32) for n, array in found.items()}
            return {n: {"": a[None] if samples.whole else a} for n, a in rows.items()}

        return answer


def values_of(model: Model) -> list[str]:
    """Return the names of what nodes of the main graph compute."""
    return [t.name for node in model.graph.nodes for t in node.outputs if t.name]
