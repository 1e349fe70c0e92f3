"""Tables in files: CSV (and TSV) and Parquet, a column a name.

Tested in tests/samples/test_tables.py.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.samples.columns import UNNAMED, Column, Stored
from onnxshrink.samples.records import Records

__all__ = ["open_csv", "open_parquet"]

_CHUNK = 4096
_LONGEST_FIELD = 1 << 20
_MOST_BYTES = 1 << 34
"""Bytes that a Parquet file may say it unpacks to; it is read column by column."""


def open_csv(path: Path) -> dict[str, Column]:
    """Read a CSV file: columns by the names of the first line, if it holds names.

    Numbers stay numbers (empty cells are NaN), whole numbers are int64, anything else
    is text. Separators are comma, semicolon or tab.

    Raises:
        ModelError: It cannot be read, or its lines differ in length.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(_LONGEST_FIELD)
            mark = max(",;\t", key=first.count)
            file.seek(0)
            old = csv.field_size_limit(_LONGEST_FIELD)
            try:
                return _table(path, csv.reader(file, delimiter=mark, strict=True))
            finally:
                csv.field_size_limit(old)
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: {error.reason}") from error
    except (OSError, csv.Error, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{path} cannot be read: {why}") from error


def _table(path: Path, reader: Any) -> dict[str, Column]:
    lines: Iterator[list[str]] = (line for line in reader if line)
    head = next(lines, None)
    if head is None:
        raise ModelError(f"{path} is empty")
    width = len(head)
    named = not all(_is_number(cell) for cell in head)
    chunks: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(width)]
    if not named:
        lines = itertools.chain([head], lines)
    while block := list(itertools.islice(lines, _CHUNK)):
        for line in block:
            if len(line) != width:
                raise ModelError(
                    f"{path}, line {reader.line_num} or before: {len(line)} cells "
                    f"where the first line has {width}"
                )
        for place, cells in enumerate(zip(*block, strict=True)):
            chunks[place].append(_typed(cells))
    if not chunks[0]:
        raise ModelError(f"{path} holds names and no samples")
    arrays = [_joined(parts) for parts in chunks]
    if not named:
        if any(a.dtype.kind == "U" for a in arrays):
            raise ModelError(f"{path} has no line of names, and not only numbers")
        return {UNNAMED: Stored(np.stack(arrays, axis=1))}
    names = [name.strip() for name in head]
    if len(set(names)) < width or not all(names):
        raise ModelError(f"{path}: the names of the columns are empty or equal")
    return {name: Stored(array) for name, array in zip(names, arrays, strict=True)}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _typed(cells: tuple[str, ...]) -> np.ndarray[Any, Any]:
    try:
        return np.array([int(cell) for cell in cells], np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        numbers = [float(cell) if cell.strip() else float("nan") for cell in cells]
    except ValueError:
        return np.array(cells, np.str_)
    return np.array(numbers, np.float64)


def _joined(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if any(part.dtype.kind == "U" for part in parts):
        parts = [part.astype(np.str_) for part in parts]
    return np.concatenate(parts)


def open_parquet(path: Path) -> dict[str, Column]:
    """Read a Parquet file, a group of rows at a time; lists may differ in length.

    Raises:
        UsageError: pyarrow is not installed.
        ModelError: It cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: Parquet is read with pyarrow: pip install 'onnxshrink[data]'"
        ) from error
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            found = file.metadata
            claimed = sum(
                found.row_group(group).total_byte_size
                for group in range(found.num_row_groups)
            )
            if not 0 <= claimed <= _MOST_BYTES or not 0 < found.num_rows < 1 << 40:
                raise ModelError(
                    f"{path} claims {found.num_rows:,} rows and {claimed:,} bytes"
                )
            spools: dict[str, Records] = {}
            nested = {
                field.name: pyarrow.types.is_nested(field.type)
                for field in file.schema_arrow
            }
            for batch in file.iter_batches(batch_size=_CHUNK):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    spool = spools.setdefault(name, Records(name))
                    _add(path, name, spool, column, nested[name])
    except ModelError:
        raise
    except Exception as error:  # Arrow's errors have many kinds
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} cannot be read: {words}") from error
    if not spools:
        raise ModelError(f"{path} holds no columns")
    return {
        name: spool.column("row" if nested[name] else "batch")
        for name, spool in spools.items()
    }


def _add(path: Path, name: str, spool: Records, column: Any, nested: bool) -> None:
    if not nested:
        values = column.to_numpy(zero_copy_only=False)
        if values.dtype.kind == "O" and not all(isinstance(v, str) for v in values):
            raise ModelError(
                f"{path}: column {name!r} holds {column.type} with gaps or other "
                "things than numbers and text"
            )
        if values.dtype.kind == "O":
            values = values.astype(np.str_)
        spool.add(values)
        return
    for entry in column.to_pylist():
        try:
            array = np.asarray(entry)
        except ValueError as error:
            raise ModelError(f"{path}: column {name!r} holds uneven lists") from error
        if array.dtype.kind not in "biufU" or entry is None:
            raise ModelError(
                f"{path}: column {name!r} holds {column.type}; samples are numbers, "
                "text, or lists of them"
            )
        spool.add(array)
