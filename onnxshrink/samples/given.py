"""What Python hands over: arrays and tensors of any framework, batches, rows, frames.

Everything is known by what it can do (``__array__``, ``__dlpack__``, ``detach``,
``column_names``), so that no framework is imported here.

Tested in tests/samples/test_given.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.samples.columns import UNNAMED, Array, Column, Stored
from onnxshrink.samples.records import Records

__all__ = ["columns_of", "is_array", "to_array"]

Transform = Callable[[Any], Any]


def is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor of some framework."""
    if isinstance(value, (np.ndarray, np.generic)):
        return True
    return (
        hasattr(value, "__array__")
        or hasattr(value, "__dlpack__")
        or hasattr(value, "__array_interface__")
    ) and not isinstance(value, type)


def to_array(value: Any, what: str = "the data") -> Array:
    """Return a numpy array of a tensor, wherever it lies and whatever tracks it.

    Args:
        value: An array, a tensor that may need gradients or lie on a device, an image,
            a number, or nested lists of numbers.
        what: How to call it in an error.

    Raises:
        ModelError: It is none, or its values do not form a box.
    """
    if isinstance(value, np.ndarray):
        return value
    given = value
    try:
        if callable(getattr(value, "detach", None)):  # tracked, as PyTorch does it
            value = value.detach()
            if callable(getattr(value, "cpu", None)):
                value = value.cpu()
            if getattr(value, "is_sparse", False) is True:
                value = value.to_dense()
            if str(getattr(value, "dtype", "")).endswith("bfloat16"):
                value = value.float()
        elif callable(getattr(value, "get", None)) and hasattr(
            value, "__cuda_array_interface__"
        ):
            value = value.get()
        tries: list[Callable[[], Any]] = []
        if not isinstance(value, (list, tuple, int, float, complex, str, bytes, bool)):
            if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
                tries.append(lambda: np.asarray(value))
            if callable(getattr(value, "numpy", None)):
                tries.append(lambda: np.asarray(value.numpy()))
            if hasattr(value, "__dlpack__"):
                tries.append(lambda: np.from_dlpack(value))
            if callable(getattr(value, "to_numpy", None)):
                tries.append(lambda: np.asarray(value.to_numpy()))
        first: Exception | None = None
        for one in tries:
            try:
                found = one()
            except (TypeError, ValueError, RuntimeError, BufferError) as error:
                first = first or error
                continue
            if found.dtype != object or found.ndim:
                return np.asarray(found)
        if first is not None:
            raise first
        if isinstance(value, (list, tuple)) and any(is_array(entry) for entry in value):
            return np.stack([to_array(entry, what) for entry in value])
        return np.asarray(value)
    except ModelError:
        raise
    except Exception as error:  # whatever another library raises
        raise ModelError(
            f"{what}: {type(given).__name__} cannot be read as an array: {error}"
        ) from error


# --- kinds of data ----------------------------------------------------------------


def columns_of(
    data: Any, transform: Transform | None = None
) -> tuple[str, dict[str, Column]]:
    """Return where data comes from, in words, and its columns by name.

    A column without names has its place as a name: ``#0`` is the first.

    Args:
        data: Arrays by name, one array, a pair ``(x, y)`` of arrays, a frame, a table,
            or an iterable of batches or rows.
        transform: What to do to each item of an iterable or, where there are columns,
            to each row; it returns what an item may be.

    Raises:
        UsageError: It is none of these.
        ModelError: It cannot be read.
    """
    if transform is not None:
        return _items(map(transform, _rows(data)))
    if _is_frame(data):
        return "a frame", _frame(data)
    if isinstance(data, Mapping):
        if data and all(hasattr(part, "column_names") for part in data.values()):
            parts = ", ".join(map(repr, data))
            raise UsageError(
                f"the data has the parts {parts}; give one of them as data= and, to "
                "measure, another as evaluation="
            )
        return "arrays", {str(n): _column(str(n), v) for n, v in data.items()}
    if is_array(data) and not hasattr(data, "column_names"):
        return "arrays", {UNNAMED: _column(UNNAMED, data)}
    if isinstance(data, tuple) and data and _same_count(data):
        return "arrays", {
            f"#{number}": _column(f"#{number}", part)
            for number, part in enumerate(data)
        }
    return _items(_rows(data))


def _same_count(parts: tuple[Any, ...]) -> bool:
    """Whether a tuple is ``(x, y)``: arrays over the same samples."""
    if len(parts) > 8 or not all(is_array(part) for part in parts):
        return False
    shapes = [tuple(getattr(part, "shape", ())) for part in parts]
    return all(len(s) for s in shapes) and len({s[0] for s in shapes}) == 1


def _rows(data: Any) -> Iterator[Any]:
    """Yield the items of data one by one."""
    if _is_frame(data):
        columns = _frame(data)
        yield from _column_rows(columns)
        return
    if isinstance(data, Mapping):
        columns = {str(n): _column(str(n), v) for n, v in data.items()}
        yield from _column_rows(columns)
        return
    if isinstance(data, (str, bytes)):
        raise UsageError("text is no data")
    if hasattr(data, "__iter__"):
        yield from data
        return
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        # A data set that knows its length but not where it ends.
        for index in range(len(data)):
            yield data[index]
        return
    raise UsageError(
        f"cannot read samples from {type(data).__name__}; give a path, arrays by "
        "input name, one array, a frame, or an iterable of batches or rows"
    )


def _column_rows(columns: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
    made = {
        name: column.column("row") if isinstance(column, Records) else column
        for name, column in columns.items()
    }
    count = min((column.count for column in made.values()), default=0)
    for index in range(count):
        at = np.array([index])
        yield {name: column.rows(at)[0] for name, column in made.items()}


def _column(name: str, value: Any) -> Column:
    """Return a column of an array, or of a list of arrays of different shapes."""
    if isinstance(value, (list, tuple)):
        try:
            return Stored(to_array(value))
        except (ModelError, ValueError):
            return _recorded(name, value)
    array = to_array(value, f"array {name!r}")
    if array.dtype.kind == "O" and array.ndim:
        entries = list(array.flat) if array.ndim == 1 else list(array)
        if not all(isinstance(entry, str) for entry in array.flat):
            if any(isinstance(entry, (dict, set)) for entry in entries):
                raise ModelError(
                    f"array {name!r}: an array of samples cannot hold Python objects"
                )
            return _recorded(name, entries)
    try:
        return Stored(array)
    except ModelError as error:
        raise ModelError(f"array {name!r}: {error}") from error


def _recorded(name: str, entries: Iterable[Any]) -> Column:
    records = Records(name)
    for number, entry in enumerate(entries):
        what = f"array {name!r}, entry {number}"
        if entry is None or isinstance(entry, (Mapping, set)):
            raise ModelError(
                f"{what} is {type(entry).__name__}: an array of samples cannot hold "
                "Python objects"
            )
        records.add(to_array(entry, what))
    if not records.items:
        raise ModelError(f"array {name!r} is empty")
    return records


# --- frames and tables ------------------------------------------------------------


def _is_frame(data: Any) -> bool:
    """Whether data has named columns that can be had one by one."""
    if isinstance(data, (Mapping, np.ndarray, type)):
        return False
    if hasattr(data, "features") and hasattr(data, "column_names"):
        return False  # rows of a data set, which need not fit into memory
    return _names(data) is not None and (
        hasattr(data, "__getitem__") or hasattr(data, "column")
    )


def _names(data: Any) -> list[Any] | None:
    for attribute in ("column_names", "columns"):
        found = getattr(data, attribute, None)
        if found is not None and not callable(found):
            if hasattr(data, "to_numpy") or hasattr(data, "to_pydict"):
                return list(found) if attribute == "columns" or found else None
            return None
    return None


def _frame(data: Any) -> dict[str, Column]:
    names = _names(data) or []
    columns: dict[str, Column] = {}
    for name in names:
        part = data.column(name) if hasattr(data, "to_pydict") else data[name]
        if callable(getattr(part, "to_pylist", None)):
            # Arrow says by its type which columns hold lists.
            listed = "list" in str(getattr(part, "type", ""))
            value: Any = part.to_pylist() if listed else part.to_numpy()
        else:
            value = part.to_numpy() if hasattr(part, "to_numpy") else part
        columns[str(name)] = _column(str(name), value)
    if not columns:
        raise ModelError("the frame has no columns")
    return columns


# --- items ------------------------------------------------------------------------


def _items(items: Iterable[Any]) -> tuple[str, dict[str, Column]]:
    """Keep items in temporary files: samples are read more than once."""
    spools: dict[str, Records] = {}
    count = 0
    for number, item in enumerate(items):
        given = _named(item, number)
        if number and given.keys() != spools.keys():
            raise ModelError(
                f"batch {number} has arrays {sorted(given)}, the first had "
                f"{sorted(spools)}"
            )
        for name, value in given.items():
            if name not in spools:
                spools[name] = Records(name)
            spools[name].add(to_array(value, f"batch {number}, array {name!r}"))
        count += 1
    if not count:
        raise ModelError("the iterable gave no batch")
    return f"{count} batches", dict(spools)


def _named(item: Any, number: int) -> dict[str, Any]:
    """Return the arrays of an item by name, or by place: ``#0``."""
    if isinstance(item, Mapping):
        return {str(n): v for n, v in item.items() if v is not None}
    if hasattr(item, "ids") and hasattr(item, "attention_mask"):  # an Encoding
        return {
            "input_ids": item.ids,
            "attention_mask": item.attention_mask,
            "token_type_ids": getattr(item, "type_ids", [0] * len(item.ids)),
        }
    if is_array(item):
        return {UNNAMED: item}
    if hasattr(item, "_asdict"):
        return dict(item._asdict())
    if isinstance(item, (tuple, list)):
        if not item:
            raise ModelError(f"batch {number} is empty")
        if isinstance(item, list) and not any(
            is_array(part) or isinstance(part, (Mapping, list, tuple)) for part in item
        ):
            return {UNNAMED: item}  # a row of numbers
        if isinstance(item, list) and _is_box(item):
            return {UNNAMED: item}  # nested lists of numbers
        named: dict[str, Any] = {}
        for place, part in enumerate(item):
            if isinstance(part, Mapping):
                named |= {str(n): v for n, v in part.items() if v is not None}
            elif isinstance(part, tuple) and any(is_array(p) for p in part):
                for inner in part:
                    named[f"#{len(named)}"] = inner
            elif place and len(item) > 1 and any(n[:1] != "#" for n in named):
                named["labels"] = part
            else:
                named[f"#{len(named)}"] = part
        return named if len(named) > 1 or "#0" not in named else {UNNAMED: named["#0"]}
    if isinstance(item, (int, float, str)):
        return {UNNAMED: item}
    raise ModelError(
        f"batch {number} is {type(item).__name__}; an item is a mapping of arrays, a "
        "pair (x, y), or one array"
    )


def _is_box(item: list[Any]) -> bool:
    """Whether nested lists hold numbers only, and not ``[x, y]`` as lists."""

    def numbers(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(numbers(entry) for entry in value)
        return isinstance(value, (int, float, bool))

    if not all(isinstance(part, (list, tuple)) for part in item) or not numbers(item):
        return False
    try:
        np.asarray(item)
    except ValueError:
        return False
    return True
