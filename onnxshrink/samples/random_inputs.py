"""Seeded random inputs: right dtypes, right shapes, indices inside their tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.samples.columns import Array, Column, Indices
from onnxshrink.terminal import size_text

if TYPE_CHECKING:
    from onnxshrink.model import Model, ValueInfo


__all__ = [
    "MAX_INPUT_BYTES",
    "RandomColumn",
    "check_sizes",
    "index_limits",
    "input_dtype",
    "random_shapes",
]

MAX_INPUT_BYTES = 1 << 30
"""Bytes of one set of inputs that a model's word is enough for."""
_ADDRESSABLE = 1 << 46


def input_dtype(info: ValueInfo) -> np.dtype[Any]:
    """Return the numpy dtype of an input.

    Raises:
        ModelError: The model gives it no element type.
    """
    from onnxshrink.tensors import numpy_type

    if info.kind != "tensor":
        raise ModelError(
            f"input {info.name!r} is a {info.kind.replace('_', ' ')}, which samples "
            "cannot feed; export the model with tensors as inputs"
        )
    if info.data_type == onnx.TensorProto.UNDEFINED:
        raise ModelError(
            f"the model says no element type for its input {info.name!r}; export it "
            "again with types"
        )
    return numpy_type(info.data_type)


class RandomColumn(Column):
    """Seeded random values, made when they are read; each sample is a whole feed."""

    def __init__(
        self,
        seed: Sequence[int],
        count: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        rows: int | None,
        ones: bool,
    ) -> None:
        self._seed, self._limit, self._ones = tuple(seed), rows, ones
        self.count, self.shape, self.dtype = count, shape, dtype

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        out = np.empty((len(indices), *self.shape), self.dtype)
        for place, index in enumerate(indices):
            out[place] = self._one(int(index))
        return out

    def _one(self, index: int) -> Array:
        random = np.random.default_rng((*self._seed, index))
        kind = self.dtype.kind
        if kind == "O":
            return random.integers(0, 100, self.shape).astype(str).astype(object)
        if self._limit is not None:
            return random.integers(0, max(1, self._limit), self.shape)
        if self._ones or kind == "b":
            return np.ones(self.shape, self.dtype)
        if kind in "iu" and self.dtype.itemsize == 1:
            info = np.iinfo(self.dtype)
            return random.integers(info.min, info.max + 1, self.shape)
        if kind in "iu":
            return np.ones(self.shape, self.dtype)
        return random.standard_normal(self.shape, dtype=np.float32).astype(self.dtype)


def random_shapes(
    inputs: Sequence[ValueInfo],
    shapes: Mapping[str, Sequence[int]],
    batch: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Choose a shape for every input; equal symbols get equal sizes."""
    names = [info.name for info in inputs]
    symbols: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in names:
            raise UsageError(
                f"--shape: the model has no input {name!r}; it takes "
                f"{', '.join(names)}.{nearest(name, names)}"
            )
        info = inputs[names.index(name)]
        fits = info.shape is None or (
            len(info.shape) == len(shape)
            and all(
                not isinstance(dim, int) or dim == size
                for dim, size in zip(info.shape, shape, strict=True)
            )
        )
        if not fits or any(size < 0 for size in shape):
            from onnxshrink.runtime import describe

            raise UsageError(
                f"--shape {name}={'x'.join(map(str, shape))} does not fit the input "
                f"{describe(info)}"
            )
        for dim, size in zip(info.shape or (), shape, strict=False):
            if isinstance(dim, str) and symbols.setdefault(dim, size) != size:
                raise UsageError(
                    f"--shape: dimension {dim!r} is {symbols[dim]} and {size}"
                )
    _total_length(inputs, symbols)
    chosen: dict[str, tuple[int, ...]] = {}
    for info in inputs:
        if info.name in shapes:
            chosen[info.name] = tuple(shapes[info.name])
            continue
        sizes = []
        for axis, dim in enumerate(info.shape or ()):
            if isinstance(dim, int):
                sizes.append(dim)
                continue
            size = _default_size(dim, axis, len(info.shape or ()), symbols, batch)
            if dim is not None:
                size = symbols.setdefault(dim, size)
            sizes.append(size)
        chosen[info.name] = tuple(sizes)
    return chosen


def _total_length(inputs: Sequence[ValueInfo], symbols: dict[str, int]) -> None:
    """Let the total length of a language model be that of its past and its tokens.

    Attention masks of decoders have a symbol of their own for it, such as
    ``total_sequence_length`` beside ``past_sequence_length`` and ``sequence_length``.
    """
    open_ = [
        (dim, axis, len(info.shape or ()))
        for info in inputs
        for axis, dim in enumerate(info.shape or ())
        if isinstance(dim, str) and "+" not in dim
    ]
    total = next((d for d, *_ in open_ if "total" in d.lower()), None)
    past = next((one for one in open_ if "past" in one[0].lower()), None)
    new = next(
        (
            one
            for one in open_
            if one[1:] == (1, 2) and one[0] not in (total, past and past[0])
        ),
        None,
    )
    if total is None or past is None or new is None or total in symbols:
        return
    for dim, axis, rank in (past, new):
        symbols.setdefault(dim, _default_size(dim, axis, rank, symbols))
    symbols[total] = symbols[past[0]] + symbols[new[0]]


def _itemsize(info: ValueInfo) -> int:
    return input_dtype(info).itemsize if info.data_type and info.kind == "tensor" else 1


def check_sizes(
    inputs: Sequence[ValueInfo],
    sizes: Mapping[str, Sequence[int]],
    given: Mapping[str, object],
    most: int,
) -> None:
    """Refuse inputs that are larger than a model's word is enough for.

    Args:
        inputs: The inputs.
        sizes: Their shapes by name.
        given: Names of inputs whose shape the user gave; these do not count.
        most: Bytes of all others together.

    Raises:
        ModelError: They are larger.
    """
    total = 0
    for info in inputs:
        shape = sizes.get(info.name, ())
        nbytes = math.prod(shape) * _itemsize(info)
        total += 0 if info.name in given else nbytes
        if total > most or nbytes > _ADDRESSABLE:
            shown = "x".join(map(str, shape))
            raise ModelError(
                f"input {info.name!r} of {shown} takes {size_text(float(nbytes))}, and "
                f"more than {size_text(most)} are not made up without being asked; "
                "--data gives samples, --shape other sizes of open dimensions, "
                "--max-input-bytes raises the limit"
            )


def _default_size(
    dim: str | None,
    axis: int,
    rank: int,
    symbols: Mapping[str, int],
    batch: int | None = None,
) -> int:
    """Guess a size for a dimension the model leaves open."""
    word = (dim or "").lower()
    if dim in symbols:
        return symbols[dim or ""]
    if "+" in word:  # such as past_sequence_length + 1
        parts = [part.strip() for part in (dim or "").split("+")]
        return sum(
            int(part) if part.isdigit() else _default_size(part, axis, rank, symbols)
            for part in parts
        )
    if "batch" in word or (axis == 0 and not re.search("seq|len|time|step", word)):
        return batch or 2
    if "channel" in word:
        return 3
    if re.search("height|width", word) or (
        rank == 4 and axis > 1 and "seq" not in word
    ):
        return 64
    return 16


_FOLLOWED = frozenset(
    {
        "Cast",
        "CastLike",
        "Clip",
        "Concat",
        "Dropout",
        "Expand",
        "Flatten",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Operators whose outputs hold the indices they were given."""


def index_limits(model: Model) -> dict[str, int]:
    """Return the rows of the smallest table that each integer input indexes."""
    shapes: Mapping[str, ValueInfo] | None = None
    limits: dict[str, int] = {}
    tensors = {tensor.name: tensor for tensor in model.graph.inputs}
    for info in model.inputs:
        if info.kind != "tensor" or input_dtype(info).kind not in "iu":
            continue
        stack, seen = [tensors[info.name]], set()
        while stack:
            tensor = stack.pop()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            for node in tensor.outputs:
                places = [i for i, read in enumerate(node.inputs) if read is tensor]
                table = _TABLES.get(node.op, {})
                for place in places:
                    if place in table:
                        if shapes is None:
                            shapes = model.infer_shapes()
                        rows = _rows(model, node, node.inputs[table[place]], shapes)
                        if rows is not None:
                            limits[info.name] = min(rows, limits.get(info.name, rows))
                    elif node.op in _FOLLOWED or (node.op == "Gather" and place == 0):
                        stack.extend(node.outputs)
    return limits


_TABLES: Mapping[str, Mapping[int, int]] = {
    "Gather": {1: 0},
    "EmbedLayerNormalization": {0: 2, 1: 4},
    "OneHot": {0: 1},
    "Equal": {0: 1, 1: 0},
}
"""Operators that read a table: input with the indices -> input with the table.

Equal with a list of numbers is how some exporters write one-hot coding.
"""
_LONGEST_LIST = 1 << 20


def _rows(
    model: Model, node: Any, table: Any, shapes: Mapping[str, ValueInfo]
) -> int | None:
    """Return how many indices the table takes, from 0 on."""
    if node.op in ("OneHot", "Equal"):
        weight = model.constant(table)
        if weight is None or not 0 < weight.size <= _LONGEST_LIST:
            return None
        if node.op == "Equal" and weight.size < 2:
            return None
        return int(np.max(weight.read())) + int(node.op == "Equal")
    info = shapes.get(table.name)
    shape = info.shape if info is not None else getattr(table, "shape", None)
    axis = int(node.attrs.get("axis", 0)) if node.op == "Gather" else 0
    if not shape or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return int(size) if isinstance(size, int) else None
