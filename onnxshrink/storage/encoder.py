"""The smallest exact encoding of an initializer, as nodes that fold back at load.

Every form is built twice: first as a draft that knows the exact size of what it would
add to the file but no data, then, for the smallest draft, with its data.

========== ===========================================================================
form       decoder
========== ===========================================================================
fill       ConstantOfShape
cast       Cast of a smaller type that holds every value exactly
codes      words -> digits -> Gather(codebook)
vectors    words -> digits -> Gather(codebook of vectors)
parts      words -> digits -> Add(first row of the part) -> Gather(all codebooks)
mask       bits -> rank of each 1 by CumSum -> Gather(values behind a default)
gaps       digits -> CumSum -> ScatterElements(values); digits are distances, and a
           longer distance stops over at a default value
skips      as gaps, but the top digit only moves on and takes no value
========== ===========================================================================

``values`` of a sparse form are raw, cast or codes. Digits come out of a word by a
Gather from a table, ``table[word] = word // powers % base``, which is itself computed
in the graph and shared, or by the division itself where the tensor is small or words
have 31 bits. Codes of 3, 5 and 6 bits are sums of digits of two streams. Gap coding is
run-length coding (Golomb 1966), the base its parameter.

onnxruntime folds all of it from ORT_ENABLE_BASIC on. It keeps the intermediate tensors
of all decoders until the last one is folded, so forms avoid tensors of the full size;
NonZero is not folded at all, and Gather takes no indices below 32 bits.

Tested in tests/storage/test_storage.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx

from onnxshrink.storage.census import Census, Groups, cast_type, survives
from onnxshrink.storage.packing import (
    BITS,
    PACKINGS,
    Packing,
    Planes,
    plane_for,
    tightest,
)
from onnxshrink.tensors import LazyTensor
from onnxshrink.tensors.wire import encode_varint

__all__ = [
    "MAX_INFLATION",
    "PREFIX",
    "SLACK",
    "SUPPORTED",
    "Encoder",
    "Encoding",
    "plain_nbytes",
]

MAX_DECODE_RATIO = 10.0
"""Most memory that decoding a weight may take, in multiples of its plain bytes."""

Array = np.ndarray[Any, Any]
_T = onnx.TensorProto

PREFIX = "~"
"""First character of every name inside a decoder; how a decoder is recognised."""
MAX_INFLATION = 4096
"""A decoded tensor has at most this many bytes for each byte of its encoding."""
SLACK = 1 << 20
"""Bytes that a decoded tensor may have whatever the size of its encoding."""

SUPPORTED = frozenset(
    {
        _T.FLOAT,
        _T.FLOAT16,
        _T.DOUBLE,
        _T.INT8,
        _T.INT16,
        _T.INT32,
        _T.INT64,
        _T.UINT8,
        _T.UINT16,
        _T.UINT32,
        _T.UINT64,
        _T.BOOL,
    }
)
"""Element types that every operator used here takes in onnxruntime."""
_MIN_OPSET = 7
_MIN_SPARSE_OPSET = 11
_DIVIDE_UP_TO = 1 << 16
"""Streams up to this length are unpacked by division, which needs no table."""
_MIN_SAVED = 1 / 64
"""Share of the plain bytes that an encoding has to save."""
_CLOSE = 1 / 64
"""Share of bytes above the smallest that a form of less decode memory may take."""
_SMALL_DECODE = 16 << 20
"""Bytes of decode memory below which only bytes of the file count."""
_FEW = 16
"""Distinct values up to which vectors are not looked for."""
_CAST_NBYTES = 48
"""About what a Cast takes in a file."""
_INT32_LIMIT = 2**31 - 2**16
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Encoding:
    """What to write in place of one initializer.

    Attributes:
        nodes: Decoder nodes in order; the last one's output is the initializer's name.
            They may read what earlier encodings of the same encoder have added.
        initializers: What the nodes read and no earlier encoding has added.
        nbytes: Bytes all this takes in the file.
        plain_nbytes: Bytes the plain initializer would take in the file.
        decode_nbytes: Bytes of all tensors that onnxruntime computes to decode it.
        kind: The form, such as ``gaps16+codes16``.
    """

    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[onnx.TensorProto, ...]
    nbytes: int
    plain_nbytes: int
    decode_nbytes: int
    kind: str


def _framed(nbytes: int) -> int:
    """Return the bytes of a field of ``nbytes`` bytes with its tag and length."""
    return 1 + len(encode_varint(nbytes)) + nbytes


def plain_nbytes(name: str, tensor: LazyTensor) -> int:
    """Return the bytes a plain initializer takes in a file."""
    header = _T(name=name, dims=tensor.shape, data_type=tensor.data_type)
    return _framed(header.ByteSize() + _framed(tensor.nbytes))


@dataclass(frozen=True)
class _Leaf:
    """An initializer whose data may not exist yet."""

    header: onnx.TensorProto
    nbytes: int
    data: Callable[[], Array]

    @property
    def file_nbytes(self) -> int:
        return _framed(self.header.ByteSize() + _framed(self.nbytes))

    def proto(self, name: str) -> onnx.TensorProto:
        proto = _T()
        proto.CopyFrom(self.header)
        proto.name = name
        array = self.data()
        assert array.nbytes == self.nbytes, (proto.name, array.nbytes, self.nbytes)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        proto.raw_data = np.ascontiguousarray(little).tobytes()
        return proto


@dataclass
class _Stream:
    """A tensor in a draft.

    Attributes:
        name: Its name.
        length: Number of elements, padding included.
        flat: Whether it has one dimension.
        shaped: Whether it already has the shape of the weight.
    """

    name: str
    length: int
    flat: bool = True
    shaped: bool = False


@dataclass
class _Draft:
    """Nodes and initializers of one encoding, under provisional names."""

    opset: int
    known: dict[tuple[object, ...], str]
    number: int
    kind: str = ""
    nbytes: int = 0
    decode_nbytes: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    leaves: list[_Leaf] = field(default_factory=list)
    added: dict[tuple[object, ...], str] = field(default_factory=dict)

    def _name(self) -> str:
        number, text = self.number, ""
        while True:
            number, digit = divmod(number, len(_DIGITS))
            text = _DIGITS[digit] + text
            if not number:
                break
        self.number += 1
        return PREFIX + text

    def leaf(
        self,
        dims: Sequence[int],
        data_type: int,
        nbytes: int,
        data: Callable[[], Array],
    ) -> str:
        """Add an initializer of this weight alone."""
        name = self._name()
        leaf = _Leaf(_T(name=name, dims=dims, data_type=data_type), nbytes, data)
        self.leaves.append(leaf)
        self.nbytes += leaf.file_nbytes
        return name

    def constant(self, array: Array) -> str:
        """Add a small initializer, or use one of the same content again."""
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        name = self.known.get(key) or self.added.get(key)
        if name is None:
            data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            name = self.leaf(array.shape, data_type, array.nbytes, lambda: array)
            self.added[key] = name
        return name

    def int32(self, *values: int) -> str:
        """Add an int32 scalar (one value) or vector."""
        array = np.array(values, np.int32)
        return self.constant(array.reshape(()) if len(values) == 1 else array)

    def int64(self, *values: int) -> str:
        """Add an int64 vector, such as a shape."""
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, *inputs: str, nbytes: int = 0, **attrs: Any) -> str:
        """Add a node, or use an equal one again; ``nbytes`` is its output's size."""
        proto = onnx.NodeProto(op_type=op, input=inputs)
        for attr, value in attrs.items():
            proto.attribute.append(onnx.helper.make_attribute(attr, value))
        key = ("node", proto.SerializeToString(deterministic=True))
        name = self.known.get(key) or self.added.get(key)
        if name is not None:
            return name
        name = self._name()
        proto.output.append(name)
        self.nodes.append(proto)
        self.added[key] = name
        self.nbytes += _framed(proto.ByteSize())
        self.decode_nbytes += nbytes
        return name

    def finish(self, stream: _Stream, name: str) -> None:
        """Make the stream the output of the last node, under the weight's name."""
        if not self.nodes or self.nodes[-1].output[0] != stream.name:
            stream = _Stream(self.node("Identity", stream.name), stream.length)
        last = self.nodes[-1]
        self.nbytes -= _framed(last.ByteSize())
        for key in [key for key, made in self.added.items() if made == stream.name]:
            del self.added[key]
        last.output[0] = name
        self.nbytes += _framed(last.ByteSize())


@dataclass(frozen=True)
class _Values:
    """How a run of values is written.

    Attributes:
        kind: ``raw``, ``cast`` or ``codes``.
        data_type: Element type of the cast.
        packing: Packing of the codes.
        keys: Bit patterns of the codebook, sorted.
    """

    kind: str
    data_type: int = 0
    packing: Packing | Planes | None = None
    keys: Array | None = None

    @property
    def label(self) -> str:
        if self.kind == "cast":
            return _T.DataType.Name(self.data_type).lower()
        return f"codes{self.packing.base}" if self.packing else self.kind

    def payload(self, count: int, itemsize: int) -> int:
        """Return the bytes of ``count`` values, codebook included."""
        if self.keys is not None:
            return self.floor(count, itemsize) + self.keys.nbytes
        return self.floor(count, itemsize)

    def floor(self, count: int, itemsize: int) -> int:
        """Return the bytes of ``count`` values if the codebook is already there."""
        if self.packing is not None:
            return self.packing.nbytes(count)
        if self.kind == "cast":
            return count * cast_type(self.data_type).itemsize
        return count * itemsize


class _Forms:
    """Every form of one tensor, as drafts."""

    def __init__(
        self, name: str, tensor: LazyTensor, census: Census, start: _Draft
    ) -> None:
        self.name = name
        self.shape = tensor.shape
        self.data_type = tensor.data_type
        self.census = census
        self.size = census.size
        self.item = census.dtype.itemsize
        self.start = start
        self.opset = start.opset

    def candidates(self) -> Iterator[tuple[int, Callable[[], _Draft]]]:
        """Yield each form worth weighing: bytes of its data alone, and its draft."""
        census = self.census
        all_keys = None if census.codes is None else census.codes.keys
        if census.stored == 0:
            if self.opset >= 9:
                yield 0, self._fill
            if all_keys is not None:
                yield 0, partial(self._dense, self._codes(all_keys))
            return
        for values in self._value_forms(all_keys):
            if values.kind != "raw":
                floor = values.floor(self.size, self.item)
                yield floor, partial(self._dense, values)
        if all_keys is None or all_keys.size > _FEW:
            yield from self._table_forms()
        if self.opset < _MIN_SPARSE_OPSET or self.size >= _INT32_LIMIT:
            return
        keys = None if all_keys is None else all_keys[all_keys != census.default]
        for values in self._best_values(keys, census.stored):
            floor = BITS.nbytes(self.size) + values.floor(census.stored, self.item)
            yield floor, partial(self._mask, values)
        if census.stored * 2 < self.size:
            yield from self._gap_forms(keys)

    def _table_forms(self) -> Iterator[tuple[int, Callable[[], _Draft]]]:
        """Yield forms with a table of vectors, or with tables of parts."""
        for dim, table, ranks in self.census.vectors():
            count = self.size // dim
            for packing in self._packings(len(table)):
                floor = packing.nbytes(count)
                yield floor, partial(self._vectors, packing, table, ranks)
        if self.item == 1:
            return
        groups = self.census.groups()
        if groups is None:
            return
        for packing in self._packings(groups.tables.shape[1]):
            floor = packing.nbytes(self.size) + groups.tables.nbytes
            yield floor, partial(self._parts, packing, groups)

    # --- values -------------------------------------------------------------------

    def _packings(self, count: int) -> list[Packing | Planes]:
        """Return how digits below ``count`` may be packed, the tightest first."""
        packing = tightest(max(count, 2), self.opset)
        planes = plane_for(max(count, 2), self.opset)
        return [packing] if planes is None else [planes, packing]

    def _codes(self, keys: Array) -> _Values:
        packing = tightest(max(keys.size, 2), self.opset)
        return _Values("codes", packing=packing, keys=keys)

    def _value_forms(self, keys: Array | None) -> list[_Values]:
        forms = [_Values("raw")]
        forms += [_Values("cast", data_type=kind) for kind in self.census.casts]
        if keys is not None and keys.size:
            forms += [
                _Values("codes", packing=packing, keys=keys)
                for packing in self._packings(keys.size)
            ]
        return forms

    def _best_values(self, keys: Array | None, count: int) -> list[_Values]:
        """Return the forms of fewest bytes, between which their nodes decide.

        There are two, or three if one of them has planes, which take many nodes.
        """
        forms = self._value_forms(keys)
        forms.sort(key=lambda form: form.payload(count, self.item))
        planes = any(isinstance(form.packing, Planes) for form in forms[:2])
        return forms[: 3 if planes else 2]

    def _write(
        self,
        draft: _Draft,
        values: _Values,
        count: int,
        patterns: Callable[[], Array],
        dims: Sequence[int] | None = None,
    ) -> _Stream:
        """Add ``count`` values; ``patterns`` gives their bits when they are written.

        ``dims`` is the weight's shape if these are all of its values.
        """
        shape = [count] if dims is None else list(dims)
        if values.packing is not None:
            keys = values.keys
            assert keys is not None

            def ranks() -> Array:
                if dims is not None:
                    return self.census.ranks()
                return np.searchsorted(keys, patterns())

            return self._unpack(draft, values.packing, count, ranks, keys, dims)
        if values.kind == "raw":
            name = draft.leaf(
                shape,
                self.data_type,
                count * self.item,
                lambda: patterns().view(self.census.dtype),
            )
            return _Stream(name, count, dims is None, dims is not None)
        small = cast_type(values.data_type)

        def narrowed() -> Array:
            with np.errstate(all="ignore"):
                if dims is None:
                    return patterns().view(self.census.dtype).astype(small)
                parts = [chunk.astype(small) for chunk in self.census.chunks()]
            return np.concatenate(parts)

        leaf = draft.leaf(shape, values.data_type, count * small.itemsize, narrowed)
        name = draft.node("Cast", leaf, to=self.data_type, nbytes=count * self.item)
        return _Stream(name, count, dims is None, dims is not None)

    # --- digits -------------------------------------------------------------------

    def _unpack(
        self,
        draft: _Draft,
        packing: Packing | Planes,
        count: int,
        digits: Callable[[], Array],
        keys: Array | None,
        dims: Sequence[int] | None = None,
    ) -> _Stream:
        """Add packed digits and what unpacks them, looked up in ``keys`` if given.

        ``keys`` are one value for each digit, or one vector.
        """
        words = packing.words(count)
        length = words * packing.group
        row = 1 if keys is None or keys.ndim == 1 else keys.shape[1]
        item = self.item * row if keys is not None else 4
        if isinstance(packing, Planes):
            name = self._planes(draft, packing, words, digits)
            if keys is not None:
                book = self._book(draft, keys)
                name = draft.node("Gather", book, name, nbytes=item * length)
            return _Stream(name, length * row, flat=False)
        divide = packing.word == "i4" or length <= _DIVIDE_UP_TO
        book = ""
        if keys is not None:
            if packing.group > 1 and not divide:
                # A table also has rows for words that hold digits nobody uses.
                more = ((0, packing.base - len(keys)), (0, 0))[: keys.ndim]
                keys = np.pad(keys, more, mode="edge")
            book = self._book(draft, keys)
        if packing.group == 1:
            shape = [count] if dims is None else list(dims)
        else:
            shape = [words, 1] if divide else [words]
        data_type = onnx.helper.np_dtype_to_tensor_dtype(packing.dtype)
        name = draft.leaf(
            shape, data_type, packing.nbytes(count), lambda: packing.pack(digits())
        )
        if packing.word != "i4":
            name = draft.node("Cast", name, to=_T.INT32, nbytes=4 * words)
        if packing.group == 1:
            if book:
                name = draft.node("Gather", book, name, nbytes=item * count)
            flat = dims is None and row == 1
            return _Stream(name, count * row, flat, dims is not None)
        if divide:
            name = self._divide(draft, packing, name, length)
            if book:
                name = draft.node("Gather", book, name, nbytes=item * length)
            return _Stream(name, length * row, flat=False)
        table = self._table(draft, packing)
        if book:
            table = draft.node("Gather", book, table)
        name = draft.node("Gather", table, name, nbytes=item * length)
        return _Stream(name, length * row, flat=False)

    def _book(self, draft: _Draft, keys: Array) -> str:
        """Add a codebook, in half precision where that holds it and saves bytes."""
        values = keys.view(self.census.dtype)
        halves = cast_type(_T.FLOAT16).itemsize * values.size
        worth = self.data_type in (_T.FLOAT, _T.DOUBLE) and (
            values.nbytes - halves > _CAST_NBYTES
        )
        if not worth or not survives(values, _T.FLOAT16):
            return draft.constant(values)
        half = draft.constant(values.astype(np.float16))
        return draft.node("Cast", half, to=self.data_type)

    def _planes(
        self, draft: _Draft, planes: Planes, words: int, digits: Callable[[], Array]
    ) -> str:
        """Return the sum of the digits of two streams, int32 [words, n, group]."""
        runs = planes.high.group // planes.low.group
        low = draft.leaf(
            [words, runs], _T.UINT8, words * runs, lambda: planes.pack(digits())[0]
        )
        high = draft.leaf([words], _T.UINT8, words, lambda: planes.pack(digits())[1])
        length = 4 * words * planes.group
        index = draft.node("Cast", low, to=_T.INT32, nbytes=4 * words * runs)
        table = self._table(draft, planes.low)
        small = draft.node("Gather", table, index, nbytes=length)
        index = draft.node("Cast", high, to=_T.INT32, nbytes=4 * words)
        table = self._table(draft, planes.high)
        table = draft.node("Mul", table, draft.int32(planes.low.base))
        shape = draft.int64(-1, runs, planes.low.group)
        table = draft.node("Reshape", table, shape)
        large = draft.node("Gather", table, index, nbytes=length)
        return draft.node("Add", small, large, nbytes=length)

    def _divide(self, draft: _Draft, packing: Packing, words: str, length: int) -> str:
        """Return the digits int32 [n, group] of int32 words [n, 1]."""
        powers = draft.constant(packing.powers)
        base = draft.int32(packing.base)
        name = draft.node("Div", words, powers, nbytes=4 * length)
        if self.opset >= 10:
            return draft.node("Mod", name, base, nbytes=4 * length)
        whole = draft.node("Div", name, base, nbytes=4 * length)
        rest = draft.node("Mul", whole, base, nbytes=4 * length)
        return draft.node("Sub", name, rest, nbytes=4 * length)

    def _table(self, draft: _Draft, packing: Packing) -> str:
        """Return the table int32 [rows, group] of the digits of each word."""
        if self.opset >= 11:
            zero, one = draft.int32(0), draft.int32(1)
            words = draft.node("Range", zero, draft.int32(packing.rows), one)
            column = draft.node("Reshape", words, draft.int64(-1, 1))
        else:
            rows = np.arange(256, dtype=np.uint8).reshape(-1, 1)
            column = draft.node("Cast", draft.constant(rows), to=_T.INT32)
        return self._divide(draft, packing, column, 0)

    def _flatten(self, draft: _Draft, stream: _Stream, item: int) -> _Stream:
        if stream.flat:
            return stream
        flat = draft.node(
            "Reshape", stream.name, draft.int64(-1), nbytes=item * stream.length
        )
        return _Stream(flat, stream.length)

    def _cut(self, draft: _Draft, stream: _Stream, count: int, item: int) -> _Stream:
        """Drop padding; the result is flat if there was some."""
        if stream.length == count:
            return stream
        name = self._flatten(draft, stream, item).name
        if self.opset >= 10:
            ends = draft.int64(0), draft.int64(count)
            name = draft.node("Slice", name, *ends, nbytes=item * count)
        else:
            name = draft.node("Slice", name, starts=[0], ends=[count], axes=[0])
        return _Stream(name, count)

    # --- forms --------------------------------------------------------------------

    def _draft(self, kind: str) -> _Draft:
        start = self.start
        return _Draft(start.opset, start.known, start.number, kind)

    def _finish(self, draft: _Draft, stream: _Stream) -> _Draft:
        stream = self._cut(draft, stream, self.size, self.item)
        if not stream.shaped and not (stream.flat and len(self.shape) == 1):
            shape = draft.int64(*self.shape)
            nbytes = self.size * self.item
            name = draft.node("Reshape", stream.name, shape, nbytes=nbytes)
            stream = _Stream(name, self.size)
        draft.finish(stream, self.name)
        return draft

    def _default(self) -> Array:
        """Return the default value, one-dimensional."""
        return np.array([self.census.default], self.census.unsigned).view(
            self.census.dtype
        )

    def _filled(self, draft: _Draft, shape: Sequence[int]) -> str:
        data = self._default()
        attrs = {}
        if self.census.default or self.data_type != _T.FLOAT:
            tensor = _T(dims=[1], data_type=self.data_type, raw_data=data.tobytes())
            attrs["value"] = tensor
        nbytes = self.size * self.item
        return draft.node(
            "ConstantOfShape", draft.int64(*shape), nbytes=nbytes, **attrs
        )

    def _fill(self) -> _Draft:
        draft = self._draft("fill")
        name = self._filled(draft, self.shape)
        stream = _Stream(name, self.size, flat=False, shaped=True)
        return self._finish(draft, stream)

    def _dense(self, values: _Values) -> _Draft:
        draft = self._draft(values.label)

        def never() -> Array:
            raise AssertionError("dense values are read chunk by chunk")

        return self._finish(
            draft, self._write(draft, values, self.size, never, self.shape)
        )

    def _vectors(self, packing: Packing | Planes, table: Array, ranks: Array) -> _Draft:
        draft = self._draft(f"vectors{table.shape[1]}x{packing.base}")
        count = self.size // table.shape[1]
        return self._finish(
            draft, self._unpack(draft, packing, count, lambda: ranks, table)
        )

    def _parts(self, packing: Packing | Planes, groups: Groups) -> _Draft:
        """Codes into one table, in which each part of the tensor has rows."""
        draft = self._draft(f"parts{groups.split[1]}x{packing.base}")
        before, parts, behind = groups.split
        size = 4 * self.size
        digits = self._unpack(
            draft, packing, self.size, lambda: groups.ranks.reshape(-1), None
        )
        digits = self._cut(draft, digits, self.size, 4)
        shaped = draft.node(
            "Reshape", digits.name, draft.int64(before, parts, behind), nbytes=size
        )
        height = groups.tables.shape[1]
        first = draft.constant(
            (height * np.arange(parts, dtype=np.int32)).reshape(-1, 1)
        )
        rows = draft.node("Add", shaped, first, nbytes=size)
        book = self._book(draft, groups.tables.reshape(-1))
        name = draft.node("Gather", book, rows, nbytes=self.size * self.item)
        return self._finish(draft, _Stream(name, self.size, flat=False))

    def _behind_default(self, draft: _Draft, values: _Stream, count: int) -> str:
        """Return flat values with the default in front."""
        flat = self._flatten(draft, values, self.item)
        default = draft.constant(self._default())
        nbytes = (count + 1) * self.item
        return draft.node("Concat", default, flat.name, axis=0, nbytes=nbytes)

    def _mask(self, values: _Values) -> _Draft:
        census = self.census
        draft = self._draft(f"mask+{values.label}")
        words = BITS.words(self.size)
        name = draft.leaf([words], _T.UINT8, words, census.mask)
        stored = self._write(draft, values, census.stored, census.entries)
        store = self._behind_default(draft, stored, census.stored)
        # Counting the ones of a byte first keeps CumSum to an eighth of the elements.
        index = draft.node("Cast", name, to=_T.INT32, nbytes=4 * words)
        bits = self._table(draft, BITS)
        one = draft.int32(1)
        ranks = draft.node("CumSum", bits, one)
        seven = draft.constant(np.array([7], np.int32))
        ones = draft.node("Gather", ranks, seven, axis=1)
        marks = draft.node("Cast", bits, to=_T.BOOL)
        own = draft.node("Gather", ones, index, nbytes=4 * words)
        zero = draft.int32(0)
        before = draft.node("CumSum", own, zero, exclusive=1, nbytes=4 * words)
        inside = draft.node("Gather", ranks, index, nbytes=32 * words)
        rank = draft.node("Add", inside, before, nbytes=32 * words)
        is_set = draft.node("Gather", marks, index, nbytes=8 * words)
        rank = draft.node("Where", is_set, rank, zero, nbytes=32 * words)
        nbytes = 8 * words * self.item
        whole = draft.node("Gather", store, rank, nbytes=nbytes)
        return self._finish(draft, _Stream(whole, 8 * words, flat=False))

    def _gap_forms(
        self, keys: Array | None
    ) -> Iterator[tuple[int, Callable[[], _Draft]]]:
        census = self.census
        steps = census.steps()
        few = np.bincount(steps[steps < 1 << 16])
        many = steps[steps >= 1 << 16].astype(np.int64)
        lengths = np.arange(few.size)

        def moves(base: int) -> int:
            """Return how many digits there are if one moves at most ``base - 1``."""
            reach = base - 1
            short = int((few * -(-lengths // reach)).sum())
            return short + int((-(-many // reach)).sum())

        ways = []
        for packing in PACKINGS:
            if packing.base > 2:
                count = moves(packing.base)
                ways.append((packing.nbytes(count), packing.base, packing, count))
        ways.sort(key=lambda way: way[:2])
        for nbytes, _, packing, count in ways[:3]:
            for values in self._best_values(keys, census.stored):
                floor = nbytes + values.floor(census.stored, self.item)
                yield floor, partial(self._skips, packing, values, steps, count)
        # Every stop costs a value here, so that a larger base may be better.
        best = self._best_values(keys, census.stored)[0]
        rate = best.payload(1 << 20, self.item) / (1 << 20)
        ways.sort(key=lambda way: (way[0] + rate * way[3], way[1]))
        for nbytes, _, packing, count in ways[:3]:
            more = keys
            if keys is not None and count > census.stored:
                default = np.array([census.default], census.unsigned)
                more = np.union1d(keys, default)
                more = more if more.size <= 256 else None
            for values in self._best_values(more, count):
                floor = nbytes + values.floor(count, self.item)
                yield floor, partial(self._gaps, packing, values, steps, count)

    def _moves(self, steps: Array, base: int, count: int) -> tuple[Array, Array]:
        """Return the last move of each step, and where it stands among all moves."""
        reach = base - 1
        stops = (steps.astype(np.int64) - 1) // reach
        last = steps - stops * reach
        places = np.cumsum(stops + 1) - 1
        assert int(places[-1]) + 1 == count
        return last, places

    def _scatter(self, draft: _Draft, places: str, values: str) -> _Draft:
        data = self._filled(draft, [self.size])
        nbytes = self.size * self.item
        name = draft.node("ScatterElements", data, places, values, nbytes=nbytes)
        return self._finish(draft, _Stream(name, self.size))

    def _gaps(
        self, packing: Packing, values: _Values, steps: Array, count: int
    ) -> _Draft:
        """Gap coding in which every digit is followed by a value.

        Padding repeats the last place and its value.
        """
        census = self.census
        draft = self._draft(f"gaps{packing.base}+{values.label}")
        group = values.packing.group if values.packing else 1
        block = math.lcm(packing.group, group)
        padded = -(-count // block) * block

        def digits() -> Array:
            last, places = self._moves(steps, packing.base, count)
            moves = np.zeros(padded, np.uint16)
            moves[:count] = packing.base - 1
            moves[places] = last
            moves[0] -= 1  # steps count from the element before the first
            return moves

        def patterns() -> Array:
            _, places = self._moves(steps, packing.base, count)
            entries = census.entries()
            found = np.full(padded, entries[-1], census.unsigned)
            found[:count] = census.default
            found[places] = entries
            return found

        moves = self._unpack(draft, packing, padded, digits, None)
        moves = self._flatten(draft, moves, 4)
        places = draft.node("CumSum", moves.name, draft.int32(0), nbytes=4 * padded)
        stored = self._write(draft, values, padded, patterns)
        stored = self._flatten(draft, stored, self.item)
        return self._scatter(draft, places, stored.name)

    def _skips(
        self, packing: Packing, values: _Values, steps: Array, count: int
    ) -> _Draft:
        """Gap coding in which the top digit moves ``base - 1`` on and has no value.

        Digit d below that moves d + 1 on. A skip writes the default where it lands,
        which is never a stored element.
        """
        census = self.census
        draft = self._draft(f"skips{packing.base}+{values.label}")
        top = packing.base - 1

        def digits() -> Array:
            last, places = self._moves(steps, packing.base, count)
            moves = np.full(count, top, np.uint16)
            moves[places] = last - 1
            return moves

        moves = self._unpack(draft, packing, count, digits, None)
        moves = self._cut(draft, self._flatten(draft, moves, 4), count, 4)
        size = 4 * count
        zero, one = draft.int32(0), draft.int32(1)
        below = draft.node("Less", moves.name, draft.int32(top), nbytes=count)
        stores = draft.node("Cast", below, to=_T.INT32, nbytes=size)
        steps_ = draft.node("Add", moves.name, stores, nbytes=size)
        places = draft.node("CumSum", steps_, zero, nbytes=size)
        places = draft.node("Sub", places, one, nbytes=size)
        stored = self._write(draft, values, census.stored, census.entries)
        store = self._behind_default(draft, stored, census.stored)
        ranks = draft.node("CumSum", stores, zero, nbytes=size)
        ranks = draft.node("Mul", ranks, stores, nbytes=size)
        found = draft.node("Gather", store, ranks, nbytes=count * self.item)
        return self._scatter(draft, places, found)


class Encoder:
    """Chooses encodings for the initializers of one graph, which share their tables."""

    def __init__(
        self,
        *,
        opset: int,
        fresh: Callable[[str], str],
        max_decode_ratio: float = MAX_DECODE_RATIO,
        min_bytes: int = 256,
    ) -> None:
        """Start a graph.

        Args:
            opset: Version of ai.onnx that the graph imports; below 7 all stays plain.
            fresh: Returns an unused value name, the given one if it is unused.
            max_decode_ratio: Keep a tensor plain if the tensors that onnxruntime
                computes to decode it take more than this multiple of its own bytes
                (and more than 16 MiB): it keeps them all until it has folded the
                last. A float32 weight needs 2 as codes, 3 to 9 where sparse.
            min_bytes: Keep tensors of fewer plain bytes plain: shapes, axes, scales.
        """
        self._opset = opset
        self._fresh = fresh
        self._max_decode_ratio = max_decode_ratio
        self._min_bytes = min_bytes
        self._known: dict[tuple[object, ...], str] = {}
        self._number = 0

    def encode(self, name: str, tensor: LazyTensor) -> Encoding | None:
        """Return the smallest exact encoding, or ``None`` if plain is best.

        Where decoding takes more than 16 MiB, the form that decodes in least memory
        wins among those within 2 % of the smallest. A form that saves less than 2 % of
        the plain bytes is not worth its nodes.

        The choice depends on the tensor, its name, and what was encoded before, never
        on chance. The tensor is read at most a few times, chunk by chunk.

        Args:
            name: Name of the initializer, which the last decoder node will produce.
            tensor: Its values.
        """
        if (
            tensor.data_type not in SUPPORTED
            or tensor.nbytes < max(self._min_bytes, 1)
            or self._opset < _MIN_OPSET
            or name.startswith(PREFIX)
        ):
            return None
        census = Census(tensor, self._opset)
        start = _Draft(self._opset, self._known, self._number)
        plain = plain_nbytes(name, tensor)
        limit = max(self._max_decode_ratio * tensor.nbytes, _SMALL_DECODE)
        worth = int(plain * (1 - _MIN_SAVED))
        smallest = worth
        drafts: list[_Draft] = []
        forms = _Forms(name, tensor, census, start)
        for floor, build in sorted(forms.candidates(), key=lambda found: found[0]):
            if floor >= min(worth, smallest * (1 + _CLOSE)):
                break
            draft = build()
            if draft.nbytes >= worth or draft.decode_nbytes > limit:
                continue
            if tensor.nbytes <= SLACK + MAX_INFLATION * _leaf_bytes(draft):
                drafts.append(draft)
                smallest = min(smallest, draft.nbytes)
        if not drafts:
            return None
        best = min(drafts, key=lambda draft: draft.nbytes)
        if best.decode_nbytes > _SMALL_DECODE:
            within = best.nbytes * (1 + _CLOSE)
            close = [draft for draft in drafts if draft.nbytes <= within]
            best = min(close, key=lambda draft: (draft.decode_nbytes, draft.nbytes))
        return self._commit(best, plain)

    def _commit(self, draft: _Draft, plain: int) -> Encoding:
        """Fill in the data, and ask for the names that the draft assumed."""
        names: dict[str, str] = {}
        taken = [leaf.header.name for leaf in draft.leaves]
        taken += [node.output[0] for node in draft.nodes[:-1]]
        for assumed in sorted(taken, key=lambda text: (len(text), text)):
            names[assumed] = self._fresh(assumed)
        nodes = []
        for node in draft.nodes:
            renamed = onnx.NodeProto()
            renamed.CopyFrom(node)
            del renamed.input[:], renamed.output[:]
            renamed.input.extend(names.get(text, text) for text in node.input)
            renamed.output.extend(names.get(text, text) for text in node.output)
            nodes.append(renamed)
        leaves = [leaf.proto(names[leaf.header.name]) for leaf in draft.leaves]
        for key, assumed in draft.added.items():
            self._known[key] = names[assumed]
        self._number = draft.number
        nbytes = sum(_framed(proto.ByteSize()) for proto in (*nodes, *leaves))
        return Encoding(
            tuple(nodes), tuple(leaves), nbytes, plain, draft.decode_nbytes, draft.kind
        )


def _leaf_bytes(draft: _Draft) -> int:
    return sum(leaf.nbytes for leaf in draft.leaves)
