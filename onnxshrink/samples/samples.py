"""Samples: what a model is fed with, read lazily.

Plain data needs no words: a ``.npz`` with one array for each model input by name, a
``.npy`` (or ``.npz`` with one array) for a model with one input, a folder of ``.npz``
files that continue each other, or a folder with ``<input>.npy`` for each input. The
first axis counts samples. An array called ``labels`` holds labels.

Anything else is said after the path (``--data`` and ``--eval``):

    models/mnist.npz:image=train_x/255,labels=train_y
    photos.npz:input=x-127/128@chw,labels=labels
    sentences.npz:input_ids=ids,attention_mask=ids@mask,token_type_ids=0

Each part is ``name=value``: a model input (or the labels' key), then an array of the
file or a number, then steps taken from left to right:

    +N -N *N /N   arithmetic, in the dtype of the input; ``/`` only for float inputs
    @chw          move the last axis (channels) in front of the others
    @mask         1 where the value is not zero, else 0

Nothing is rescaled unless it is said. Done without being asked, and noted, are only: a
change of dtype that keeps every value (int16 to int64; int64 to int32 where the values
fit; float64 to float32 rounds), and axes of size 1 added or left out, or samples that
are stored flat, where the element count fits the input exactly.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    Spool,
    Stored,
    listing,
    open_arrays,
    parse_expression,
    split_path,
)
from onnxshrink.samples.random_inputs import (
    RandomColumn,
    index_limits,
    input_dtype,
    random_shapes,
)

if TYPE_CHECKING:
    from onnxshrink.model import Model, ValueInfo

__all__ = ["Samples"]

_LABELS = "labels"


# --- samples ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """Named arrays over the same samples, read when a batch is asked for.

    Made by ``from_path``, ``from_arrays``, ``from_batches`` or ``random``, then tied to
    a model's inputs with ``bind``. ``take`` gives a part, without copying data.

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

    # --- making -------------------------------------------------------------------

    @classmethod
    def of(cls, data: Any, labels: str | None = None) -> Samples:
        """Make samples of whatever the Python API takes.

        Args:
            data: ``Samples``; text or a path as on the command line; a mapping of
                arrays; one array; or an iterable of batches.
            labels: Key of the labels; ``None`` takes ``labels`` if there is such.
        """
        if isinstance(data, Samples):
            return data
        if isinstance(data, (str, Path)):
            return cls.from_path(data, labels)
        if isinstance(data, (Mapping, np.ndarray)):
            return cls.from_arrays(data, labels)
        if isinstance(data, Iterable):
            return cls.from_batches(data, labels)
        raise UsageError(
            f"cannot read samples from {type(data).__name__}; give a path, arrays by "
            "input name, one array, or an iterable of batches"
        )

    @classmethod
    def from_path(cls, text: str | Path, labels: str | None = None) -> Samples:
        """Open a file or folder; nothing but headers is read.

        Args:
            text: Path, optionally ``path:name=value,...`` as in the module's text.
            labels: Key of the labels; ``None`` takes ``labels`` if there is such.

        Raises:
            UsageError: The text after the path cannot be read.
            ModelError: A file cannot be read.
        """
        path, words = split_path(str(text))
        arrays = open_arrays(path)
        if words is None:
            return cls._made(str(path), arrays, None, labels)
        expressions: dict[str, Expression] = {}
        for word in words.split(","):
            key, equals, value = word.partition("=")
            if not equals or not key or not value:
                raise UsageError(
                    f"{text}: cannot read {word!r}; each part after the path is "
                    "name=array, such as image=train_x/255"
                )
            if key in expressions:
                raise UsageError(f"{text}: {key!r} is given twice")
            expressions[key] = parse_expression(value, arrays, f"{path}, {key}")
        return cls._made(str(text), arrays, expressions, labels)

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array] | Array, labels: str | None = None
    ) -> Samples:
        """Take arrays by input name, or one array; they are not copied."""
        given = {UNNAMED: arrays} if isinstance(arrays, np.ndarray) else arrays
        columns: dict[str, Column] = {}
        for name, array in given.items():
            try:
                columns[name] = Stored(np.asarray(array))
            except ModelError as error:
                raise ModelError(f"array {name!r}: {error}") from error
        return cls._made("arrays", columns, None, labels)

    @classmethod
    def from_batches(cls, batches: Iterable[Any], labels: str | None = None) -> Samples:
        """Take an iterable of batches, each a mapping of arrays or one array.

        The batches are kept in a temporary file, because samples are read more than
        once and not in their order.
        """
        spools: dict[str, Spool] = {}
        count = 0
        for number, batch in enumerate(batches):
            given = batch if isinstance(batch, Mapping) else {UNNAMED: batch}
            if number and given.keys() != spools.keys():
                raise ModelError(
                    f"batch {number} has arrays {sorted(given)}, the first had "
                    f"{sorted(spools)}"
                )
            for name, array in given.items():
                if name not in spools:
                    spools[name] = Spool(name)
                spools[name].add(np.asarray(array), number)
            count += 1
        if not count:
            raise ModelError("the iterable gave no batch")
        columns = {name: spool.column() for name, spool in spools.items()}
        return cls._made(f"{count} batches", columns, None, labels)

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
        if not used and not (expressions is not None and expressions):
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

        Raises:
            UsageError: A shape names no input or does not fit it.
            ModelError: An input is not a tensor of a type that can be made up.
        """
        sizes = random_shapes(model.inputs, shapes or {})
        limits = index_limits(model)
        columns: dict[str, Column] = {}
        for info in model.inputs:
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
        )

    # --- looking ------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, or of the arrays before ``bind``."""
        if not self._bound and self._expressions is not None:
            return tuple(self._expressions)
        return tuple(self._columns)

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
        if self._labels is None:
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
            feed[name] = np.asarray(one, order="C")
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
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            if self.batch is None or stop - start == self.batch:
                yield start, stop

    @property
    def used(self) -> int:
        """How many samples ``batches`` gives."""
        return len(self) // self.batch * self.batch if self.batch else len(self)

    def to_json(self) -> dict[str, object]:
        """Return the facts for a report."""
        return {
            "source": self.source,
            "samples": len(self),
            "random": self.random,
            "labels": self._labels is not None,
            "notes": list(self.notes),
        }

    # --- binding ------------------------------------------------------------------

    def bind(self, inputs: Sequence[ValueInfo]) -> Samples:
        """Tie the arrays to a model's inputs.

        Args:
            inputs: The inputs that must be fed, as ``Model.inputs``.

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
        notes: list[str] = []
        chosen = self._chosen(inputs, notes)
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
        _check_labels(self._labels, count, self.source)
        sizes = _symbols(inputs, columns, whole, self.source)
        alone = any(whole.values())
        for info in inputs:
            expression, column = chosen[info.name]
            if column is None:
                columns[info.name] = _constant_for(
                    info, expression, count, sizes, self.source
                )
                whole[info.name] = alone
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
            _columns={info.name: columns[info.name] for info in inputs},
            _expressions=None,
            _indices=self._indices if self._taken else np.arange(count),
            _whole=alone,
            batch=batch,
            notes=tuple(notes),
            _bound=True,
        )

    def _chosen(
        self, inputs: Sequence[ValueInfo], notes: list[str]
    ) -> dict[str, tuple[Expression | None, Column | None]]:
        """Find for each input its array (or a number) and what to do to it."""
        names = [info.name for info in inputs]
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
            elif (
                self._expressions is None
                and len(inputs) == 1
                and len(self._columns) == 1
            ):
                (only,) = self._columns
                if only not in (UNNAMED, "arr_0"):
                    notes.append(f"array {only!r} feeds the only input {info.name!r}")
                chosen[info.name] = None, self._columns[only]
            else:
                raise UsageError(self._missing(info.name))
        return chosen

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
        if change is None:
            raise UsageError(
                f"{what}: array {name or 'given'!r} holds {column.dtype} and the input "
                f"takes {dtype}; {self._advice(info, name, column.dtype, dtype)}"
            )
        if change:
            notes.append(f"{info.name}: {column.dtype} {change} {dtype}")
        shape, alone, note = _fitting(info, column)
        if shape is None:
            raise UsageError(
                f"{what}: samples of shape {list(column.shape)} do not fit the input "
                f"{describe(info)}{_layout_advice(info, column.shape)}"
            )
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


def _check_labels(labels: Column | None, count: int, source: str) -> None:
    if labels is not None and labels.count != count:
        raise ModelError(f"{source}: {labels.count} labels for {count} samples")


# --- fitting arrays to inputs -----------------------------------------------------


def _dtype_change(given: np.dtype[Any], wanted: np.dtype[Any]) -> str | None:
    """Say how a dtype becomes another; ``""``: they are equal, ``None``: it may not."""
    if given == wanted:
        return ""
    if wanted.kind == "O" and given.kind in "SU":
        return ""
    if given.kind in "iub" and wanted.kind in "iub":
        exact = np.can_cast(given, wanted, "safe")
        return "widened to" if exact else "checked to fit"
    if given.kind == "f" and (wanted.kind == "f" or wanted.name == "bfloat16"):
        return "widened to" if np.can_cast(given, wanted, "safe") else "rounded to"
    return None


def _fitting(
    info: ValueInfo, column: Column
) -> tuple[tuple[int, ...] | None, bool, str]:
    """Return the shape of one sample for an input, whether it is whole, and a note."""
    if info.shape is None:
        return column.shape, False, ""
    wanted = info.shape

    def fits(shape: Sequence[int], dims: Sequence[int | str | None]) -> bool:
        return len(shape) == len(dims) and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(dims, shape, strict=True)
        )

    if wanted and fits(column.shape, wanted[1:]):
        return column.shape, False, ""
    if fits(column.shape, wanted):
        return column.shape, True, "each sample is a whole feed, batch axis included"
    dims = wanted[1:]
    if not wanted or not all(isinstance(dim, int) for dim in dims):
        return None, False, ""
    target = tuple(int(dim) for dim in dims if isinstance(dim, int))
    if math.prod(target) != math.prod(column.shape):
        return None, False, ""

    def core(shape: Sequence[int]) -> list[int]:
        return [size for size in shape if size != 1]

    flat = len(core(column.shape)) <= 1 or len(core(target)) <= 1
    if core(column.shape) != core(target) and not flat:
        return None, False, ""
    return target, False, f"samples {list(column.shape)} reshaped to {list(target)}"


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
