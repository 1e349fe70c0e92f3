"""Tables: columns by name; what cannot be read is one clear error."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import ValueInfo
from onnxshrink.samples import Samples

F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
PAIR = (ValueInfo("x", F32, ("N", 2)),)


def written(tmp_path: Path, text: str, name: str = "d.csv") -> Path:
    (tmp_path / name).write_bytes(text.encode())
    return tmp_path / name


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_feeds_features_and_labels(tmp_path: Path, mark: str):
    rows = ["a,b,target", "1,2.5,0", '3,"4",1', "", "5,6,1"]
    path = written(tmp_path, "\ufeff" + "\r\n".join(rows).replace(",", mark))
    samples = Samples.from_path(path).bind(PAIR)
    assert samples.read([0, 1, 2])["x"].tolist() == [[1, 2.5], [3, 4], [5, 6]]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 1]


def test_a_csv_without_names_is_one_array(tmp_path: Path):
    samples = Samples.from_path(written(tmp_path, "1,2\n3,4.5\n")).bind(PAIR)
    assert samples.read([1])["x"].tolist() == [[3, 4.5]]


def test_columns_are_named_in_words_after_the_path(tmp_path: Path):
    path = written(tmp_path, "ids,kind\n7,a\n8,b\n")
    info = [ValueInfo("n", I64, ("N", 1))]
    samples = Samples.from_path(f"{path}:n=ids-7,labels=ids").bind(info)
    assert samples.read([1])["n"].tolist() == [[1]]
    text = [ValueInfo("s", onnx.TensorProto.STRING, ("N",))]
    fed = Samples.from_path(f"{path}:s=kind").bind(text).read([0, 1])["s"]
    assert fed.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "no samples"),
        ("a,b\n1\n", "1 cells where the first line has 2"),
        ("a,a\n1,2\n", "empty or equal"),
        ("1,2\n3,x\n", "no line of names"),
        ('a,b\n"1,2\n', "cannot be read"),
        ("a,b\n" + "1" * (1 << 20) + "2,3\n", "cannot be read"),
    ],
)
def test_a_csv_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ModelError, match=message):
        Samples.from_path(written(tmp_path, text))


def test_a_csv_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "d.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ModelError, match="not UTF-8"):
        Samples.from_path(tmp_path / "d.csv")


def test_parquet_gives_columns_and_lists_of_any_length(tmp_path: Path):
    arrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {
            "ids": [[1, 2, 3], [4], [5, 6]],
            "x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
            "label": [0, 1, 1],
        }
    )
    path = tmp_path / "d.parquet"
    parquet.write_table(table, path, row_group_size=2)
    samples = Samples.from_path(path).bind(PAIR)
    assert samples.read([2])["x"].tolist() == [[5, 6]]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 1]
    inputs = [ValueInfo("ids", I64, ("N", "t")), ValueInfo("mask", I64, ("N", "t"))]
    masked = Samples.from_path(f"{path}:ids=ids,mask=ids@mask").bind(inputs)
    assert masked.read([0, 1])["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert masked.read([0, 1])["mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_damaged_parquet_is_one_clear_error(tmp_path: Path):
    arrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(arrow.table({"x": np.arange(100.0)}), path)
    raw = path.read_bytes()
    for cut in (0, 3, 40, len(raw) // 2, len(raw) - 5):
        path.write_bytes(raw[:cut])
        with pytest.raises(ModelError, match=r"d\.parquet cannot be read"):
            Samples.from_path(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = builtins.__import__

    def without(name: str, *args: Any, **words: Any) -> Any:
        if name.startswith(("pyarrow", "PIL")):
            raise ImportError(name)
        return real(name, *args, **words)

    monkeypatch.setattr(builtins, "__import__", without)
    path = written(tmp_path, "PAR1", "d.parquet")
    with pytest.raises(UsageError, match=r"pip install 'onnxshrink\[data\]'"):
        Samples.from_path(path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"Pillow: pip install 'onnxshrink\[data\]'"):
        Samples.from_path(tmp_path / "photos")
