"""Samples: what a model is fed with, read lazily.

Plain data needs no words: a ``.npz`` (``.safetensors``, ``.parquet``, ``.csv``) with
one array or column for each model input by name, a ``.npy`` (or an ``.npz`` with one
array) for a model with one input, a folder of ``.npz`` files that continue each other
or are a sample each, a folder with ``<input>.npy`` for each input or a ``.npy`` for
each sample, or a folder of images. The first axis counts samples. An array called
``labels`` (or ``label``, ``target``, ``targets``, ``y``, ``class``, which is said)
holds labels.

Anything else is said after the path (``--data`` and ``--eval``):

    models/mnist.npz:image=train_x/255,labels=train_y
    photos.npz:input=x-127/128@chw,labels=labels
    sentences.npz:input_ids=ids,attention_mask=ids@mask,token_type_ids=0

Each part is ``name=value``: a model input (or the labels' key), then an array of the
file or a number, then steps taken from left to right:

    +N -N *N /N   arithmetic, in the dtype of the input; ``/`` only for float inputs;
                  ``/N:N:N`` has a number for each value along the last axis
    @chw          move the last axis (channels) in front of the others
    @mask         1 where the value is not zero, else 0

Nothing is rescaled unless it is said. Done without being asked, and noted, are only: a
change of dtype that keeps every value (int16 to int64; int64 to int32 where the values
fit; float64 to float32 rounds), and axes of size 1 added or left out, or samples that
are stored flat, where the element count fits the input exactly.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.samples.columns import (
    UNNAMED,
    Array,
    Column,
    Computed,
    Constant,
    Expression,
    Fitted,
    Indices,
    Stacked,
    Stored,
    cast,
    listing,
    parse_expression,
)
from onnxshrink.samples.given import columns_of
from onnxshrink.samples.random_inputs import (
    MAX_INPUT_BYTES,
    RandomColumn,
    check_sizes,
    index_limits,
    input_dtype,
    random_shapes,
)
from onnxshrink.samples.records import Lengths, Mode, Padded, Records
from onnxshrink.samples.sources import open_arrays, split_path
from onnxshrink.samples.synthetic import DeadLeaves, image_inputs

if TYPE_CHECKING:
    from onnxshrink.model import Model, ValueInfo

__all__ = ["Samples"]

_LABELS = "labels"
_WHOLE = (("b", "f"), ("i", "f"), ("u", "f"))
"""Kinds of dtypes of which single numbers become floats without being asked."""
_OTHER_LABELS = ("label", "target", "targets", "y", "class")
"""Names under which labels are found where the model has no such input."""


# --- samples ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """Named arrays over the same samples, read when a batch is asked for.

    Made by ``of``, ``from_path``, ``from_arrays``, ``from_batches`` or ``random_for``,
    then tied to a model's inputs with ``bind``. ``take`` gives a part, without copying
    data. Samples may differ in shape: they are filled up where the model has a mask for
    that, else those of one shape run together.

    Attributes:
        source: Where it came from, in words.
        random: Whether the values are random, good for a smoke test only.
        batch: Samples in every run if the model fixes that, else ``None``.
        notes: What ``bind`` did without being asked.
    """

    source: str
    _columns: Mapping[str, Column]
    _expressions: Mapping[str, Expression] | None = None
    _labels: Column | None = None
    _indices: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    _whole: bool = False
    batch: int | None = None
    random: bool = False
    notes: tuple[str, ...] = ()
    _bound: bool = False
    _taken: bool = False
    _kinds: Indices | None = None
    _memo: dict[str, str] = field(default_factory=dict)
    _path: Path | None = None
    _once: Mapping[str, Array] = field(default_factory=dict)
    _axes: Mapping[str, int] = field(default_factory=dict)

    # --- making -------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        data: Any,
        labels: str | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> Samples:
        """Make samples of whatever the Python API takes.

        Args:
            data: ``Samples``; text or a path as on the command line; a mapping of
                arrays; one array; a pair ``(x, y)``; a frame or table; or an iterable
                of batches or rows, each a mapping, a pair, or one array. Arrays may be
                tensors of any framework.
            labels: Key of the labels; ``None`` takes ``labels`` if there is such.
            transform: What to do to each item of an iterable or, where there are
                columns, to each row, before it is taken.

        Raises:
            UsageError: It is none of these.
            ModelError: It cannot be read.
        """
        if isinstance(data, Samples):
            return data
        if isinstance(data, (str, Path)):
            if transform is not None:
                found = cls.from_path(data, labels)
                source, columns = columns_of(
                    {**found._columns, **found._labelled()}, transform
                )
                return cls._made(found.source, columns, None, labels)
            return cls.from_path(data, labels)
        source, columns = columns_of(data, transform)
        return cls._made(source, columns, None, labels)

    @classmethod
    def from_path(cls, text: str | Path, labels: str | None = None) -> Samples:
        """Open a file or folder; of arrays nothing but headers is read.

        Args:
            text: Path, optionally ``path:name=value,...`` as in the module's text.
            labels: Key of the labels; ``None`` takes ``labels`` if there is such.

        Raises:
            UsageError: The text after the path cannot be read.
            ModelError: A file cannot be read.
        """
        path, words = split_path(str(text))
        parts: dict[str, str] = {}
        for word in [] if words is None else words.split(","):
            key, equals, value = word.partition("=")
            if not equals or not key or not value:
                raise UsageError(
                    f"{text}: cannot read {word!r}; each part after the path is "
                    "name=array, such as image=train_x/255"
                )
            if key in parts:
                raise UsageError(f"{text}: {key!r} is given twice")
            parts[key] = value
        edge = None
        if path.is_dir() and "edge" in parts:
            edge = _whole_number(parts.pop("edge"), f"{text}: edge")
        notes: list[str] = []
        arrays = open_arrays(path, edge, notes)
        source = str(path if words is None else text)
        if not parts:
            found = cls._made(source, arrays, None, labels)
        else:
            expressions = {
                key: parse_expression(value, arrays, f"{path}, {key}")
                for key, value in parts.items()
            }
            # Folders and file lists label their files: nobody has to say so.
            given = path.is_dir() and UNNAMED not in arrays and "labels" in arrays
            mine = labels or (_LABELS if given and _LABELS not in parts else None)
            found = cls._made(source, arrays, expressions, mine)
        return replace(found, notes=tuple(notes), _path=path)

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any] | Any, labels: str | None = None
    ) -> Samples:
        """Take arrays by input name, or one array; they are not copied."""
        source, columns = columns_of(arrays)
        return cls._made(source, columns, None, labels)

    @classmethod
    def from_batches(cls, batches: Iterable[Any], labels: str | None = None) -> Samples:
        """Take an iterable of batches or rows: mappings, pairs ``(x, y)``, or arrays.

        They are kept in a temporary file, because samples are read more than once and
        not in their order. Which of the two they are shows when they are tied to a
        model.
        """
        source, columns = columns_of(iter(batches))
        return cls._made(source, columns, None, labels)

    @classmethod
    def _made(
        cls,
        source: str,
        arrays: Mapping[str, Column],
        expressions: Mapping[str, Expression] | None,
        labels: str | None,
    ) -> Samples:
        """Take the labels out, check the counts."""
        key = labels or _LABELS
        columns = dict(arrays)
        found: Column | None = None
        if expressions is not None and key in expressions:
            expression = expressions[key]
            if expression.array is None:
                raise UsageError(f"{source}: the labels are a number, not an array")
            found = arrays[expression.array]
            if expression.steps:
                what = f"{source}, {key}"
                dtype = np.dtype(np.float64)
                found = Computed(found, expression.steps, dtype, what)
            expressions = {k: e for k, e in expressions.items() if k != key}
        elif key in columns and (expressions is None or labels is not None):
            found = columns.pop(key)
        elif labels is not None:
            raise UsageError(
                f"{source} has no labels {labels!r}; it has {listing(columns)}."
                f"{nearest(labels, columns)}"
            )
        used = columns
        if expressions is not None:
            names = {e.array for e in expressions.values()}
            used = {name: c for name, c in columns.items() if name in names}
        if not used and not expressions:
            raise ModelError(f"{source} holds no array of samples")
        if not used:
            raise UsageError(f"{source}: at least one input needs an array")
        count = min(column.count for column in used.values())
        return cls(source, columns, expressions, found, np.arange(count))

    @classmethod
    def random_for(
        cls,
        model: Model,
        *,
        seed: int = 0,
        count: int = 8,
        shapes: Mapping[str, Sequence[int]] | None = None,
        max_input_bytes: int = MAX_INPUT_BYTES,
        values: Mapping[str, Sequence[float]] | None = None,
        batch: int | None = None,
    ) -> Samples:
        """Make seeded random inputs of the right dtypes and shapes: a smoke test.

        Each sample is a whole feed. Integers that index a table stay inside it, masks
        are ones, equal symbols of dimensions have equal sizes. Batches default to 2,
        other dynamic dimensions to 16 (64 for height and width).

        Args:
            model: The model to feed.
            seed: Seed of the values.
            count: Number of feeds.
            shapes: Shapes of inputs by name, for dimensions the model leaves open.
            max_input_bytes: Most bytes of one feed that the model may ask for; inputs
                whose shape is given do not count.
            values: Numbers for inputs by name, the same in every feed.
            batch: Size of dimensions that count samples, if the model leaves it open.

        Raises:
            UsageError: A shape names no input or does not fit it.
            ModelError: An input is not a tensor of a type that can be made up, or the
                model asks for more bytes than are believed.
        """
        sizes = random_shapes(model.inputs, shapes or {}, batch)
        once = {
            info.name: _filled_with(info, values[info.name], sizes[info.name])
            for info in _named(model.inputs, values)
            if values is not None
        }
        check_sizes(model.inputs, sizes, shapes or {}, max_input_bytes)
        limits = index_limits(model)
        columns: dict[str, Column] = {}
        for info in model.inputs:
            if info.name in once:
                continue
            dtype = input_dtype(info)
            if dtype.kind == "c" or info.kind != "tensor":
                raise ModelError(
                    f"input {info.name!r} is {info.kind} of "
                    f"{dtype}; random values cannot be made for it: give data"
                )
            columns[info.name] = RandomColumn(
                (seed, zlib.crc32(info.name.encode())),
                count,
                sizes[info.name],
                dtype,
                limits.get(info.name),
                "mask" in info.name.lower(),
            )
        return cls(
            f"seeded random inputs (seed {seed})",
            columns,
            None,
            None,
            np.arange(count),
            _whole=True,
            batch=1,
            random=True,
            _bound=True,
            _once=once,
        )

    @classmethod
    def synthetic_for(
        cls, model: Model, words: str = "", *, seed: int = 0, count: int = 192
    ) -> Samples:
        """Make up images of dead leaves, to calibrate with where there are none.

        Inputs that are no images get seeded random values.

        Args:
            model: The model to feed.
            words: ``input=rgb/255@chw,...`` as after a path; the arrays are ``rgb`` and
                ``gray``, uint8. Without words, floats get values from -1 to 1.
            seed: Seed of the images.
            count: Number of images.

        Raises:
            UsageError: No input takes images, or the words cannot be read.
            ModelError: Another input cannot be made up.
        """
        shown = image_inputs(model.inputs)
        high, wide, channels, _ = next(iter(shown.values()))
        seed_of = zlib.crc32(f"dead leaves {seed}".encode())
        arrays: dict[str, Column] = {
            "rgb": DeadLeaves(seed_of, count, (high, wide, 3)),
            "gray": DeadLeaves(seed_of, count, (high, wide)),
        }
        if any(channels == 4 for _, _, channels, _ in shown.values()):
            arrays["rgba"] = DeadLeaves(seed_of, count, (high, wide, 4))
        parts: dict[str, str] = {}
        notes = []
        for word in filter(None, words.split(",")):
            key, _, value = word.partition("=")
            parts[key] = value
        for info in model.inputs:
            if info.name in parts:
                continue
            if info.name in shown:
                _, _, channels, is_first = shown[info.name]
                array = {1: "gray", 3: "rgb"}.get(channels, "rgba")
                scaled = input_dtype(info).kind == "f"
                parts[info.name] = (
                    array
                    + ("-127.5/127.5" if scaled else "")
                    + ("@chw" if is_first and channels > 1 else "")
                )
                if scaled:
                    notes.append(
                        f"{info.name}: made-up images with values from -1 to 1; if the "
                        f"model takes others, synthetic:{info.name}={array}/255@chw"
                    )
                continue
            drawn = cls.random_for(model, seed=seed, count=count)
            arrays[info.name] = drawn._columns[info.name]
            parts[info.name] = info.name
        expressions = {
            key: parse_expression(value, arrays, f"synthetic, {key}")
            for key, value in parts.items()
        }
        made = cls._made("synthetic images (dead leaves)", arrays, expressions, None)
        return replace(made, notes=tuple(notes))

    # --- looking ------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, or of the arrays before ``bind``."""
        if not self._bound and self._expressions is not None:
            return tuple(self._expressions)
        return (*self._columns, *self._once)

    @property
    def positions(self) -> Indices:
        """Where each sample stands in its source, from 0: its identity over splits."""
        return self._indices.copy()

    @property
    def source_count(self) -> int:
        """How many samples the source has, of which these are some."""
        counts = [column.count for column in self._columns.values()]
        return min(counts, default=0)

    @property
    def labels(self) -> Array | None:
        """Labels in the order of the samples, or ``None``."""
        if self._labels is None or isinstance(self._labels, Records):
            return None
        labels = self._labels.rows(self._indices)
        if labels.dtype.kind == "f" and np.isnan(labels).any():
            place = int(np.isnan(labels).reshape(len(labels), -1).any(1).argmax())
            raise ModelError(f"the label of sample {place} is NaN")
        return labels

    @property
    def whole(self) -> bool:
        """Whether each sample is a feed of its own, batch axis included."""
        return self._whole

    @property
    def hint(self) -> str:
        """What may help where a run on these samples fails."""
        if not self.random:
            return ""
        shapes = ",".join(
            f"{name}={'x'.join(map(str, column.shape))}"
            for name, column in self._columns.items()
        )
        return (
            f" (these are random inputs of shape {shapes}; if a size is wrong for "
            "the model, --shape name=2x128 sets it, and --data feeds real samples)"
        )

    def take(self, chosen: Sequence[int] | Indices | slice) -> Samples:
        """Return some of the samples, in the order given, without copying data."""
        picked = chosen if isinstance(chosen, slice) else np.asarray(chosen, np.int64)
        try:
            indices = self._indices[picked]
        except IndexError as error:
            raise UsageError(f"{self.source} has {len(self)} samples: {error}") from (
                error
            )
        return replace(self, _indices=indices, _taken=True)

    def joined(self, other: Samples) -> Samples:
        """Return these samples and then those of another part of the same source."""
        if self._columns is not other._columns:
            raise UsageError("only parts of the same samples can be put together")
        indices = np.concatenate([self._indices, other._indices])
        return replace(self, _indices=indices, _taken=True)

    def read(self, chosen: Sequence[int] | Indices) -> dict[str, Array]:
        """Return the feed of some samples, by position.

        Raises:
            ModelError: A value is NaN.
        """
        indices = self._indices[np.asarray(chosen, np.int64)]
        feed = {}
        for name, column in self._columns.items():
            values = column.rows(indices)
            if values.dtype.kind == "f" and np.isnan(values).any():
                bad = int(np.isnan(values).reshape(len(values), -1).any(1).argmax())
                raise ModelError(
                    f"{self.source}: sample {indices[bad]} of {name!r} holds NaN"
                )
            # values[0] of strings would be a plain object, and no array.
            one = values[0:1].reshape(values.shape[1:]) if self._whole else values
            if name in self._axes:
                one = np.moveaxis(one, 0, self._axes[name])
            feed[name] = np.asarray(one, order="C")
        feed.update(self._once)
        return feed

    def batches(self, size: int = 32) -> Iterator[dict[str, Array]]:
        """Yield feeds of at most ``size`` samples, in order.

        A model with a fixed batch size gets exactly that many, and samples that do not
        fill a batch are left out; where a sample is a whole feed, each comes alone.
        """
        for start, stop in self.spans(size):
            yield self.read(np.arange(start, stop))

    def spans(self, size: int = 32) -> Iterator[tuple[int, int]]:
        """Yield the positions [start, stop) of each batch that ``batches`` gives."""
        step = self.batch or max(1, size)
        for first, last in self.alike(0, len(self)):
            for start in range(first, last, step):
                stop = min(start + step, last)
                if self.batch is None or stop - start == self.batch:
                    yield start, stop

    def alike(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut the positions [start, stop) where the shape of the samples changes."""
        if self._kinds is None:
            if start < stop:
                yield start, stop
            return
        kinds = self._kinds[self._indices[start:stop]]
        ends = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        for first, last in pairwise(ends):
            if first < last:
                yield start + first, start + last

    def in_batches_of(self, batch: int, note: str = "") -> Samples:
        """Return the same samples, so many in every run.

        Args:
            batch: How many; where each sample is a whole feed, that stays.
            note: What to say of it.

        Raises:
            UsageError: The model fixes another number, or there are fewer samples.
        """
        notes = (*self.notes, note) if note else self.notes
        if self._whole:
            return replace(self, notes=notes)
        if self.batch not in (None, batch):
            raise UsageError(
                f"--batch {batch}: the model takes {self.batch} samples at a time"
            )
        if len(self) < batch:
            raise UsageError(
                f"--batch {batch}: {self.source} has {len(self)} samples for a part "
                "of the run; give more samples or a smaller batch"
            )
        return replace(self, batch=batch, notes=notes)

    def first(self, size: int) -> dict[str, Array]:
        """Return the feed of the first batch of at most so many samples."""
        return next(self.batches(size))

    def grouped(self) -> Samples:
        """Return the same samples, those of one shape behind each other."""
        if self._kinds is None:
            return self
        kinds = self._kinds[self._indices]
        return self.take(np.argsort(kinds, kind="stable"))

    def commonest(self) -> Samples:
        """Return those samples of the shape that most of them have."""
        if self._kinds is None:
            return self
        kinds = self._kinds[self._indices]
        return self.take(np.flatnonzero(kinds == np.bincount(kinds).argmax()))

    @property
    def varied(self) -> bool:
        """Whether samples differ in shape, so that not all run in one batch."""
        return self._kinds is not None

    @property
    def digest(self) -> str:
        """SHA-256 of all values and labels of the source, in its order.

        Of a file it is that of the file, as ``sha256sum`` gives it.

        Raises:
            ModelError: The data cannot be read.
        """
        if "digest" not in self._memo:
            found = hashlib.sha256()
            if self._path is not None and self._path.is_file():
                _feed_file(found.update, self._path)
            elif self.random:
                found.update(self.source.encode())
            else:
                for name, column in sorted(self._columns.items()):
                    found.update(name.encode(errors="replace"))
                    column.digest(found.update)
                if self._labels is not None:
                    self._labels.digest(found.update)
            self._memo["digest"] = found.hexdigest()
        return self._memo["digest"]

    def _labelled(self) -> dict[str, Column]:
        return {} if self._labels is None else {_LABELS: self._labels}

    @property
    def used(self) -> int:
        """How many samples ``batches`` gives."""
        if self.batch and self._kinds is not None:
            return sum(stop - start for start, stop in self.spans())
        return len(self) // self.batch * self.batch if self.batch else len(self)

    def to_json(self) -> dict[str, object]:
        """Return the facts for a report."""
        return {
            "source": self.source,
            "samples": len(self),
            "random": self.random,
            "labels": self._labels is not None,
            "sha256": self.digest,
            "notes": list(self.notes),
        }

    # --- binding ------------------------------------------------------------------

    def bind(
        self,
        inputs: Sequence[ValueInfo],
        values: Mapping[str, Sequence[float]] | None = None,
    ) -> Samples:
        """Tie the arrays to a model's inputs.

        An array whose shape is that of its input, which has no axis that counts
        samples, is given once: every run gets it whole. Where samples do not lie along
        the first axis of an input, the symbol that others have there says along which.

        Args:
            inputs: The inputs that must be fed, as ``Model.inputs``.
            values: Numbers for inputs by name, in place of arrays.

        Returns:
            Samples whose batches fit the model; ``notes`` says what was adapted.

        Raises:
            UsageError: An array is missing, or has the wrong dtype or shape; says what
                would fit.
        """
        if self._bound:
            return self
        if not inputs:
            raise ModelError("the model has no inputs, so it cannot be fed")
        notes: list[str] = list(self.notes)
        found = self._with_labels(inputs, notes)
        return found._tied(inputs, notes, values or {})

    def _tied(
        self,
        inputs: Sequence[ValueInfo],
        notes: list[str],
        values: Mapping[str, Sequence[float]],
    ) -> Samples:
        every = inputs
        valued = {info.name for info in _named(inputs, values)}
        inputs = [info for info in inputs if info.name not in valued]
        chosen = self._chosen(inputs, notes)
        once = _given_once(inputs, chosen, notes)
        inputs = [info for info in inputs if info.name not in once]
        inputs, chosen, axes = _along(inputs, chosen, notes)
        chosen, mode = self._settled(inputs, chosen)
        labels = _settled_labels(self._labels, mode, notes)
        chosen = self._filled(inputs, chosen, notes)
        columns: dict[str, Column] = {}
        whole: dict[str, bool] = {}
        for info in inputs:
            expression, column = chosen[info.name]
            if column is None:
                continue
            fitted, alone = self._fit(info, expression, column, notes)
            columns[info.name], whole[info.name] = fitted, alone
        counts = {name: column.count for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            words = ", ".join(f"{name!r} has {n}" for name, n in counts.items())
            raise ModelError(f"{self.source}: the numbers of samples differ: {words}")
        count = next(iter(counts.values()), len(self))
        if count == 0:
            raise ModelError(f"{self.source} holds no samples")
        _check_labels(labels, count, self.source)
        kinds = _joint_kinds(columns, notes)
        sizes = _symbols(inputs, columns, whole, self.source)
        alone = any(whole.values())
        for info in inputs:
            expression, column = chosen[info.name]
            if column is None:
                columns[info.name] = _constant_for(
                    info, expression, count, sizes, self.source
                )
                whole[info.name] = alone
        for info in every:
            if info.name in valued:
                once[info.name] = _valued(info, values[info.name], sizes, self.source)
                if _counts_samples(info, inputs):
                    batched = once.pop(info.name)
                    columns[info.name] = Constant(
                        float(batched.flat[0]), count, batched.shape[1:], batched.dtype
                    )
                    whole[info.name] = False
                    inputs = [*inputs, info]
        used = len(self) if self._taken else count
        batch = self._batch(inputs, columns, whole, notes, used)
        if alone:
            # Feeds come one by one; a batched input keeps its axis of one sample.
            columns = {
                name: column
                if whole[name]
                else Fitted(column, (1, *column.shape), column.dtype, name)
                for name, column in columns.items()
            }
        return replace(
            self,
            _labels=labels,
            _kinds=kinds,
            _columns={info.name: columns[info.name] for info in inputs},
            _expressions=None,
            _indices=self._indices if self._taken else np.arange(count),
            _whole=alone,
            batch=batch,
            notes=tuple(notes),
            _bound=True,
            _once=once,
            _axes=axes,
        )

    def _chosen(
        self, inputs: Sequence[ValueInfo], notes: list[str]
    ) -> dict[str, tuple[Expression | None, Column | None]]:
        """Find for each input its array (or a number) and what to do to it."""
        names = [info.name for info in inputs]
        wide = self._side_by_side(inputs, notes)
        if wide is not None:
            return {inputs[0].name: (None, wide)}
        by_place = self._by_place()
        if by_place and len(by_place) != len(inputs):
            raise UsageError(
                f"{self.source}: items of {len(by_place)} arrays without names, and "
                f"the model takes {len(inputs)} inputs: {', '.join(names)}; give the "
                "inputs in their order, with labels behind them or not, or a mapping"
            )
        if self._expressions is not None:
            for key in self._expressions:
                if key not in names:
                    raise UsageError(
                        f"{self.source}: the model has no input {key!r}; it takes "
                        f"{', '.join(names)}.{nearest(key, names)}"
                    )
        chosen: dict[str, tuple[Expression | None, Column | None]] = {}
        for info in inputs:
            expression = (self._expressions or {}).get(info.name)
            if expression is not None:
                column = self._columns[expression.array] if expression.array else None
                chosen[info.name] = expression, column
            elif self._expressions is None and info.name in self._columns:
                chosen[info.name] = None, self._columns[info.name]
            elif by_place:
                place = len(chosen)
                chosen[info.name] = None, self._columns[by_place[place]]
            elif "mask" in info.name.lower() and any(
                isinstance(column, Records) for column in self._columns.values()
            ):
                chosen[info.name] = None, None  # found by ``_filled``
            elif (
                self._expressions is None
                and len(inputs) == 1
                and (len(self._columns) == 1 or UNNAMED in self._columns)
            ):
                only = (
                    UNNAMED if UNNAMED in self._columns else next(iter(self._columns))
                )
                if only not in (UNNAMED, "arr_0"):
                    notes.append(f"array {only!r} feeds the only input {info.name!r}")
                chosen[info.name] = None, self._columns[only]
            else:
                raise UsageError(self._missing(info.name))
        if self._expressions is None and not by_place:
            unused = [name for name in self._columns if name and name not in chosen]
            if unused and UNNAMED not in self._columns and len(self._columns) > 1:
                shown = ", ".join(map(repr, unused[:8]))
                more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
                notes.append(f"nothing uses {shown}{more}")
        return chosen

    def _by_place(self) -> list[str]:
        """Return the names of columns that have only their place, in order."""
        found = [name for name in self._columns if name.startswith("#")]
        return found if self._expressions is None else []

    def _with_labels(self, inputs: Sequence[ValueInfo], notes: list[str]) -> Samples:
        """Find labels that nobody named."""
        names = {info.name for info in inputs}
        if self._expressions is not None or UNNAMED in self._columns:
            return self
        columns = dict(self._columns)
        if self._labels is not None:
            if _LABELS in names and _LABELS not in columns and not self._taken:
                columns[_LABELS] = self._labels  # the model's own input
                return replace(self, _labels=None, _columns=columns)
            return self
        by_place = self._by_place()
        if by_place and len(by_place) == len(inputs) + 1:
            found = columns.pop(by_place[-1])
            notes.append(f"labels: what stands behind {', '.join(names)} in each item")
            return replace(self, _labels=found, _columns=columns)
        for label in columns:
            if label not in names and label.lower() in _OTHER_LABELS:
                if len(columns) == 1:
                    break
                notes.append(f"labels: taken from {label!r}")
                found = columns.pop(label)
                return replace(self, _labels=found, _columns=columns)
        return self

    def _side_by_side(
        self, inputs: Sequence[ValueInfo], notes: list[str]
    ) -> Column | None:
        """Join the columns of a table for the only input, which has none by name."""
        names = list(self._columns)
        if len(inputs) != 1 or self._expressions is not None or len(names) < 2:
            return None
        (info,) = inputs
        if info.name in names or info.shape is None or len(info.shape) != 2:
            return None
        columns = list(self._columns.values())
        numbers = all(
            column.shape == ()
            and column.dtype.kind in "biuf"
            and not isinstance(column, Records)
            for column in columns
        )
        width = info.shape[1]
        if not numbers or (isinstance(width, int) and width != len(names)):
            return None
        if len({column.count for column in columns}) > 1:
            return None
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        notes.append(f"{info.name}: the columns {shown} side by side")
        return Stacked(columns, input_dtype(info))

    def _settled(
        self,
        inputs: Sequence[ValueInfo],
        chosen: Mapping[str, tuple[Expression | None, Column | None]],
    ) -> tuple[dict[str, tuple[Expression | None, Column | None]], Mode]:
        """Say of items whether they are batches or samples: what fits the model."""
        recorded = [
            info for info in inputs if isinstance(chosen[info.name][1], Records)
        ]
        if not recorded:
            return dict(chosen), "row"
        can_fill = any("mask" in info.name.lower() for info in inputs)
        costs: dict[Mode, int] = {}
        modes: tuple[Mode, ...] = ("batch", "row")
        for mode in modes:
            cost = 0
            for info in recorded:
                expression, records = chosen[info.name]
                assert isinstance(records, Records)
                one = _cost(info, expression, records, mode, can_fill, self.source)
                if one is None:
                    break
                cost += one
            else:
                costs[mode] = cost
        if costs:
            best = min(costs, key=lambda mode: costs[mode])
        else:
            info = recorded[0]
            ndim = len(next(iter(chosen[info.name][1].item_shapes)))  # type: ignore[union-attr]
            rank = len(info.shape) if info.shape is not None else ndim
            best = "row" if ndim < rank else "batch"
        settled = {
            name: (e, c.column(best) if isinstance(c, Records) else c)
            for name, (e, c) in chosen.items()
        }
        return settled, best

    def _filled(
        self,
        inputs: Sequence[ValueInfo],
        chosen: Mapping[str, tuple[Expression | None, Column | None]],
        notes: list[str],
    ) -> dict[str, tuple[Expression | None, Column | None]]:
        """Fill samples up to one shape where the model has a mask for that."""
        filled = dict(chosen)
        masks = [info for info in inputs if "mask" in info.name.lower()]
        wanted = [i for i in masks if chosen[i.name] == (None, None)]
        varied = {
            info.name: column
            for info in inputs
            if (column := chosen[info.name][1]) is not None and column.kinds is not None
        }
        covering = [i for i in masks if i in wanted or i.name in varied]
        if not covering:
            return filled
        for info in inputs:
            column = varied.get(info.name)
            if column is None:
                continue
            if len({len(shape) for shape in column.shapes}) > 1:
                raise UsageError(
                    f"{self.source}: samples of {info.name!r} differ in their number "
                    "of axes"
                )
            dims = (info.shape or ())[1:] or (None,) * len(column.shape)
            most = [max(sizes) for sizes in zip(*column.shapes, strict=True)]
            target = tuple(
                dim if isinstance(dim, int) and dim >= size else size
                for dim, size in zip(dims, most, strict=False)
            )
            if len(target) != len(most):
                target = tuple(most)
            filled[info.name] = chosen[info.name][0], Padded(column, target)
            least = min(math.prod(shape) for shape in column.shapes)
            notes.append(
                f"{info.name}: samples of {least} to {math.prod(most)} values filled "
                f"up with zeros to {list(target)}, which {covering[0].name!r} covers"
            )
        for info in wanted:
            rank = len(info.shape or ()) - 1
            like = next(
                (
                    name
                    for name, (_, column) in filled.items()
                    if column is not None and len(column.shape) == rank
                ),
                None,
            )
            if like is None:
                raise UsageError(self._missing(info.name))
            source = varied.get(like) or filled[like][1]
            shape = filled[like][1].shape  # type: ignore[union-attr]  # see above
            filled[info.name] = None, Lengths(source, shape)  # type: ignore[arg-type]
            notes.append(f"{info.name}: ones where {like!r} has values")
        return filled

    def _missing(self, name: str) -> str:
        known = [n for n in self._columns if n]
        present = listing(self._columns)
        example = known[0] if known else "x"
        if UNNAMED in self._columns:
            return (
                f"{self.source}: one array without a name feeds a model with one "
                f"input only; input {name!r} needs an array of that name"
            )
        return (
            f"{self.source}: nothing for input {name!r}; there are {present}. Say "
            f"which, as in {self.source.partition(':')[0]}:{name}={example}."
            f"{nearest(name, known)}"
        )

    def _fit(
        self,
        info: ValueInfo,
        expression: Expression | None,
        column: Column,
        notes: list[str],
    ) -> tuple[Column, bool]:
        """Give a column the dtype and shape of an input."""
        from onnxshrink.runtime import describe

        what = f"{self.source}: {info.name!r}"
        if info.kind != "tensor":
            raise ModelError(f"{what} is {info.kind}, which samples cannot feed")
        dtype = input_dtype(info)
        name = info.name
        if expression is not None:
            name = expression.array or name
            if expression.steps:
                target = dtype if expression.arithmetic else column.dtype
                column = Computed(column, expression.steps, target, what)
        change = _dtype_change(column.dtype, dtype)
        is_table = column.shape == () or isinstance(column, Lengths)
        if change is None and is_table and (column.dtype.kind, dtype.kind) in _WHOLE:
            change = "taken as"
        if change is None:
            raise UsageError(
                f"{what}: array {name or 'given'!r} holds {column.dtype} and the input "
                f"takes {dtype}; {self._advice(info, name, column.dtype, dtype)}"
            )
        if change:
            notes.append(f"{info.name}: {column.dtype} {change} {dtype}")
        found = [_fitting(info, shape) for shape in column.shapes or (column.shape,)]
        for given, (shape, _, _) in zip(
            column.shapes or (column.shape,), found, strict=True
        ):
            if shape is None or (column.kinds is not None and shape != given):
                raise UsageError(
                    f"{what}: samples of shape {list(given)} do not fit the input "
                    f"{describe(info)}{_layout_advice(info, given)}"
                )
        if len({alone for _, alone, _ in found}) > 1:
            raise UsageError(
                f"{what}: some samples are whole feeds of {describe(info)} and others "
                "are not"
            )
        shape, alone, note = found[0]
        assert shape is not None
        if note:
            notes.append(f"{info.name}: {note}")
        return Fitted(column, shape, dtype, what), alone

    def _advice(
        self, info: ValueInfo, name: str, given: np.dtype[Any], wanted: np.dtype[Any]
    ) -> str:
        if given.kind in "iub" and wanted.kind == "f":
            path = self.source.partition(":")[0]
            scale = "255" if given.itemsize == 1 else "1"
            return (
                "nothing is rescaled unless you say so, as in "
                f"{path}:{info.name}={name or 'x'}/{scale} "
                "(or /1 to keep the values)"
            )
        return f"convert it to {wanted}"

    def _batch(
        self,
        inputs: Sequence[ValueInfo],
        columns: Mapping[str, Column],
        whole: Mapping[str, bool],
        notes: list[str],
        count: int,
    ) -> int | None:
        """Return the batch size the model fixes."""
        if any(whole.values()):
            return 1
        fixed = {
            info.shape[0]
            for info in inputs
            if info.shape and isinstance(info.shape[0], int)
        }
        if not fixed:
            return None
        if len(fixed) > 1:
            raise ModelError(
                f"{self.source}: the model's inputs have different fixed first axes "
                f"{sorted(fixed)}; give each sample as a whole feed, "
                "[samples, *input shape]"
            )
        (batch,) = fixed
        if batch < 1 or count < batch:
            raise ModelError(
                f"{self.source}: the model takes {batch} samples at a time and there "
                f"are {count}"
            )
        if count % batch:
            notes.append(
                f"the model takes {batch} samples at a time: {count % batch} unused"
            )
        return batch


def _whole_number(text: str, what: str) -> int:
    if not text.isdigit() or len(text) > 6:
        raise UsageError(f"{what} is a whole number, not {text!r}")
    return int(text)


def _feed_file(feed: Callable[[bytes], object], path: Path) -> None:
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                feed(piece)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _cost(
    info: ValueInfo,
    expression: Expression | None,
    records: Records,
    mode: Mode,
    can_fill: bool,
    source: str,
) -> int | None:
    """Return how far items are from an input, as batches or samples; ``None``: no."""
    if mode == "batch" and () in records.item_shapes:
        return None
    cost = 0
    for item in records.item_shapes:
        shape = item[1:] if mode == "batch" else item
        if expression is not None and expression.steps:
            one = np.zeros((1, *shape), records.dtype)
            try:
                shape = Computed(
                    Stored(one), expression.steps, records.dtype, source
                ).shape
            except UsageError:
                return None
        fitted, alone, note = _fitting(info, shape)
        if fitted is None:
            dims = (info.shape or ())[1:]
            fills = len(dims) == len(shape) and all(
                not isinstance(dim, int) or size <= dim
                for dim, size in zip(dims, shape, strict=True)
            )
            if not can_fill or not fills:
                return None
            cost = max(cost, 3)
        cost = max(cost, 2 * alone, int(bool(note)))
    return cost


def _settled_labels(
    labels: Column | None, mode: Mode, notes: list[str]
) -> Column | None:
    """Return labels as what their items are, beside items that are in this mode."""
    if isinstance(labels, Records):
        one = mode == "row" or () in labels.item_shapes
        labels = labels.column("row" if one else "batch")
    if labels is not None and labels.kinds is not None:
        notes.append("labels: they differ in shape, so nothing is measured with them")
        return None
    if labels is not None and labels.shape == (1,):
        return Fitted(labels, (), labels.dtype, "labels")
    return labels


def _joint_kinds(columns: Mapping[str, Column], notes: list[str]) -> Indices | None:
    """Return a number for each sample, the same for those that run together."""
    varied = {name: c for name, c in columns.items() if c.kinds is not None}
    if not varied:
        return None
    sizes = []
    kinds = []
    for column in varied.values():
        assert column.kinds is not None
        kinds.append(column.kinds)
        each = np.array([math.prod(shape) for shape in column.shapes], np.int64)
        sizes.append(each[column.kinds])
    # Short ones first: where two have one shape, in all inputs, the number is the same.
    stacked = np.stack([np.sum(sizes, axis=0), *kinds], axis=1)
    _, joint = np.unique(stacked, axis=0, return_inverse=True)
    count = int(joint.max()) + 1
    notes.append(
        f"{', '.join(varied)}: samples of {count} shapes; "
        "those of one shape run together"
    )
    return np.asarray(joint, np.int64).reshape(-1)


def _check_labels(labels: Column | None, count: int, source: str) -> None:
    if labels is not None and labels.count != count:
        raise ModelError(f"{source}: {labels.count} labels for {count} samples")


# --- fitting arrays to inputs -----------------------------------------------------


def _named(
    inputs: Sequence[ValueInfo], values: Mapping[str, Sequence[float]] | None
) -> list[ValueInfo]:
    """Return the inputs that numbers are given for.

    Raises:
        UsageError: A number is for no input.
    """
    names = [info.name for info in inputs]
    for name in values or {}:
        if name not in names:
            raise UsageError(
                f"--value: the model has no input {name!r}; it takes "
                f"{', '.join(names)}.{nearest(name, names)}"
            )
    return [info for info in inputs if info.name in (values or {})]


def _filled_with(
    info: ValueInfo, numbers: Sequence[float], shape: tuple[int, ...]
) -> Array:
    """Return an array of one number, or of as many as it holds."""
    dtype = input_dtype(info)
    values = np.asarray(numbers, np.float64).reshape(-1)
    if dtype.kind in "iub" and not (values == np.floor(values)).all():
        raise UsageError(f"--value: {info.name!r} takes {dtype}")
    if values.size not in (1, math.prod(shape)):
        raise UsageError(
            f"--value: {info.name!r} of shape {list(shape)} takes one number or "
            f"{math.prod(shape)}, not {values.size}"
        )
    cast = values.astype(dtype)
    if values.size == 1:
        return np.full(shape, cast[0], dtype)
    return np.asarray(cast.reshape(shape))


def _valued(
    info: ValueInfo,
    numbers: Sequence[float],
    sizes: Mapping[str, int],
    source: str,
) -> Array:
    """Return the array of an input that numbers are given for."""
    if info.shape is None:
        return _filled_with(info, numbers, (len(numbers),) if len(numbers) > 1 else ())
    shape = []
    for axis, dim in enumerate(info.shape):
        size = sizes.get(dim) if isinstance(dim, str) else dim
        if size is None and len(info.shape) == 1 and len(numbers) > 1:
            size = len(numbers)
        if size is None and axis:
            raise UsageError(
                f"{source}: the size of dimension {dim or '?'!r} of {info.name!r} is "
                "not known, so a number cannot fill it; give an array"
            )
        shape.append(1 if size is None else size)
    return _filled_with(info, numbers, tuple(shape))


def _counts_samples(info: ValueInfo, others: Sequence[ValueInfo]) -> bool:
    """Whether the first axis of an input is open, as that of the others is."""
    if not info.shape or isinstance(info.shape[0], int):
        return False
    firsts = [other.shape[0] for other in others if other.shape]
    return info.shape[0] in firsts


def _fits_whole(shape: Sequence[int], dims: Sequence[int | str | None]) -> bool:
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or dim == size
        for dim, size in zip(dims, shape, strict=True)
    )


Chosen = Mapping[str, tuple[Expression | None, Column | None]]


def _given_once(
    inputs: Sequence[ValueInfo], chosen: Chosen, notes: list[str]
) -> dict[str, Array]:
    """Return the arrays that have the shape of their input, which counts no samples.

    That is a scalar, or an input whose first axis has a fixed size, or a size of its
    own, where others leave theirs open.
    """
    plain = {
        info.name: column
        for info in inputs
        if (column := chosen[info.name][1]) is not None
        and column.kinds is None
        and not isinstance(column, Records)
    }
    symbol = _batch_symbol(inputs)
    found: dict[str, Array] = {}
    for info in inputs:
        column = plain.get(info.name)
        if column is None or info.shape is None or info.kind != "tensor":
            continue
        expression = chosen[info.name][0]
        if expression is not None and expression.steps:
            continue
        others = {c.count for name, c in plain.items() if name != info.name}
        if not others or (symbol is not None and symbol in info.shape):
            continue
        scalar = info.shape == () and column.shape == () and column.count == 1
        full = (column.count, *column.shape)
        fits = _fits_whole(full, info.shape)
        is_open = any(
            other.shape and not isinstance(other.shape[0], int)
            for other in inputs
            if other is not info
        )
        fixed = bool(info.shape) and isinstance(info.shape[0], int)
        alone = fits and ((fixed and is_open) or column.count not in others)
        if not (scalar and others != {1}) and not alone:
            continue
        values = column.rows(np.arange(column.count))
        change = _dtype_change(values.dtype, input_dtype(info))
        if change is None:
            continue
        found[info.name] = cast(
            values.reshape(()) if scalar else values, input_dtype(info), info.name
        )
        notes.append(f"{info.name}: given once, for every run")
    return found if len(found) < len(inputs) else {}


def _batch_symbol(inputs: Sequence[ValueInfo]) -> str | None:
    """Return the symbol that counts samples: that of most first axes."""
    firsts = [info.shape[0] for info in inputs if info.shape]
    names = [dim for dim in firsts if isinstance(dim, str)]
    every = [d for info in inputs for d in info.shape or () if isinstance(d, str)]
    named = [dim for dim in every if "batch" in dim.lower()]
    if named:
        return max(named, key=lambda name: (named.count(name), name in names))
    return max(names, key=names.count, default=None)


def _along(
    inputs: Sequence[ValueInfo], chosen: Chosen, notes: list[str]
) -> tuple[list[ValueInfo], dict[str, Any], dict[str, int]]:
    """Find inputs whose samples do not lie along the first axis.

    Returns:
        The inputs as if they did; what feeds them; and where the axis really is.
    """
    symbol = _batch_symbol(inputs)
    turned, columns, axes = [], dict(chosen), {}
    for info in inputs:
        expression, column = chosen[info.name]
        shape = info.shape or ()
        if symbol is None or symbol not in shape[1:] or shape[0] == symbol:
            turned.append(info)
            continue
        axis = shape.index(symbol)
        rest = (*shape[:axis], *shape[axis + 1 :])
        if column is not None and column.kinds is None:
            full = (column.count, *column.shape)
            is_first = _fits_whole(column.shape, rest)
            if not is_first and not _fits_whole(full, shape):
                turned.append(info)  # a whole feed each, or an error that says so
                continue
            if not is_first:
                whole = column.rows(np.arange(column.count))
                columns[info.name] = expression, Stored(np.moveaxis(whole, axis, 0))
        axes[info.name] = axis
        turned.append(replace(info, shape=(symbol, *rest)))
        notes.append(f"{info.name}: samples lie along axis {axis}, as {symbol!r} says")
    return turned, columns, axes


def _dtype_change(given: np.dtype[Any], wanted: np.dtype[Any]) -> str | None:
    """Say how a dtype becomes another; ``""``: they are equal, ``None``: it may not."""
    if given == wanted:
        return ""
    if wanted.kind == "O" and given.kind in "SU":
        return ""
    if given.kind in "iub" and wanted.kind in "iub":
        exact = np.can_cast(given, wanted, "safe")
        return "widened to" if exact else "checked to fit"
    if given.name == "bfloat16" and wanted.kind == "f":
        return "widened to"
    if given.kind == "f" and (wanted.kind == "f" or wanted.name == "bfloat16"):
        return "widened to" if np.can_cast(given, wanted, "safe") else "rounded to"
    return None


def _fitting(
    info: ValueInfo, given: tuple[int, ...]
) -> tuple[tuple[int, ...] | None, bool, str]:
    """Return the shape of one sample for an input, whether it is whole, and a note."""
    if info.shape is None:
        return given, False, ""
    wanted = info.shape

    def fits(shape: Sequence[int], dims: Sequence[int | str | None]) -> bool:
        return len(shape) == len(dims) and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(dims, shape, strict=True)
        )

    if wanted and fits(given, wanted[1:]):
        return given, False, ""
    if fits(given, wanted):
        return given, True, "each sample is a whole feed, batch axis included"
    dims = wanted[1:]
    if not wanted or not all(isinstance(dim, int) for dim in dims):
        return None, False, ""
    target = tuple(int(dim) for dim in dims if isinstance(dim, int))

    def core(shape: Sequence[int]) -> list[int]:
        return [size for size in shape if size != 1]

    if math.prod(target) != math.prod(given):
        if not isinstance(wanted[0], int) or core([wanted[0], *target]) != core(given):
            return None, False, ""
        full = (wanted[0], *target)
        return full, True, f"samples {list(given)} reshaped to {list(full)}"

    flat = len(core(given)) <= 1 or len(core(target)) <= 1
    if core(given) != core(target) and not flat:
        return None, False, ""
    return target, False, f"samples {list(given)} reshaped to {list(target)}"


def _layout_advice(info: ValueInfo, shape: tuple[int, ...]) -> str:
    moved = (shape[-1], *shape[:-1]) if len(shape) > 1 else shape
    dims = (info.shape or ())[1:]
    if len(dims) == len(moved) and all(
        not isinstance(dim, int) or dim == size
        for dim, size in zip(dims, moved, strict=True)
    ):
        return "; @chw moves the last axis in front"
    return ""


def _symbols(
    inputs: Sequence[ValueInfo],
    columns: Mapping[str, Column],
    whole: Mapping[str, bool],
    source: str,
) -> dict[str, int]:
    """Return the sizes of symbolic dimensions, which must agree between inputs."""
    sizes: dict[str, tuple[int, str]] = {}
    for info in inputs:
        if info.name not in columns or info.shape is None:
            continue
        if columns[info.name].kinds is not None:
            continue  # see ``_joint_kinds``
        dims = info.shape if whole[info.name] else info.shape[1:]
        for dim, size in zip(dims, columns[info.name].shape, strict=False):
            if not isinstance(dim, str):
                continue
            known, name = sizes.setdefault(dim, (size, info.name))
            if known != size:
                raise UsageError(
                    f"{source}: dimension {dim!r} is {known} in {name!r} and {size} in "
                    f"{info.name!r}"
                )
    return {dim: size for dim, (size, _) in sizes.items()}


def _constant_for(
    info: ValueInfo,
    expression: Expression | None,
    count: int,
    sizes: Mapping[str, int],
    source: str,
) -> Column:
    """Fill an input with a number; its shape comes from the other inputs."""
    assert expression is not None
    dims = (info.shape or ())[1:]
    shape = []
    for dim in dims:
        size = sizes.get(dim) if isinstance(dim, str) else dim
        if size is None:
            raise UsageError(
                f"{source}: the size of dimension {dim or '?'!r} of {info.name!r} is "
                "not known, so a number cannot fill it; give an array"
            )
        shape.append(size)
    if expression.steps:
        raise UsageError(f"{source}: {expression.text!r} is a number with steps")
    dtype = input_dtype(info)
    if dtype.kind in "iub" and not float(expression.number).is_integer():
        raise UsageError(f"{source}: {info.name!r} takes {dtype}")
    return Constant(expression.number, count, tuple(shape), dtype)
