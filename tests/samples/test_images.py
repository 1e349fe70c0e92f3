"""Folders of images: pixels, labels by folder or list, sizes, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import ValueInfo
from onnxshrink.samples import Samples

pytest.importorskip("PIL")
F32 = onnx.TensorProto.FLOAT
INPUT = (ValueInfo("input", F32, ("N", 3, 4, 4)),)


def drawn(path: Path, wide: int = 4, high: int = 4, color: Any = (10, 20, 30)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(color, tuple) else "L", (wide, high), color).save(
        path
    )
    return path


def test_class_folders_give_labels_by_name(tmp_path: Path):
    for number, kind in enumerate(("cat", "dog", "dog")):
        drawn(tmp_path / kind / f"{number}.png", color=(number, 0, 0))
    samples = Samples.from_path(f"{tmp_path}:input=rgb/255@chw").bind(INPUT)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 1]
    fed = samples.read([0, 1, 2])["input"]
    assert fed[:, 0, 0, 0].tolist() == [0, np.float32(1 / 255), np.float32(2 / 255)]
    assert samples.notes[0] == "labels of the images, by name: 0 cat, 1 dog"


def test_a_labels_file_names_files(tmp_path: Path):
    for name in ("a.png", "b.jpg", "c.bmp"):
        drawn(tmp_path / name)
    (tmp_path / "labels.csv").write_text("file,label\na.png,7\nb.jpg,8\nc.bmp,9\n")
    samples = Samples.from_path(f"{tmp_path}:input=rgb/255@chw").bind(INPUT)
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 8, 9]
    (tmp_path / "labels.csv").write_text("a.png,7\n")
    with pytest.raises(ModelError, match=r"no label for b\.jpg"):
        Samples.from_path(tmp_path)


def test_edge_scales_the_shorter_side_and_cuts_the_middle(tmp_path: Path):
    from PIL import Image

    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 200  # the middle of a wide image
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    drawn(tmp_path / "tall.png", 4, 40, 90)
    samples = Samples.from_path(f"{tmp_path}:input=rgb/1@chw,edge=4").bind(INPUT)
    tall, wide = samples.read([0, 1])["input"]
    assert (tall == 90).all()
    assert (wide[:, :, 1:3] == 200).all()
    with pytest.raises(UsageError, match=r"40x4|4x40.*edge=224"):
        Samples.from_path(f"{tmp_path}:input=rgb/255@chw")
    with pytest.raises(UsageError, match="whole number"):
        Samples.from_path(f"{tmp_path}:input=rgb/255@chw,edge=x")


def test_channels_have_numbers_of_their_own(tmp_path: Path):
    drawn(tmp_path / "a.png", color=(10, 20, 30))
    words = "input=rgb-10:20:20/1:2:5@chw"
    fed = Samples.from_path(f"{tmp_path}:{words}").bind(INPUT).read([0])["input"]
    assert fed[0, :, 0, 0].tolist() == [0, 0, 2]
    with pytest.raises(UsageError, match="2 numbers for 3 values"):
        Samples.from_path(f"{tmp_path}:input=rgb-1:2@chw").bind(INPUT)


def test_grey_turned_and_deep_images_are_read(tmp_path: Path):
    from PIL import Image

    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    gray = (ValueInfo("x", F32, ("N", 1, 4, 4)),)
    fed = Samples.from_path(f"{tmp_path}:x=gray/1").bind(gray).read([0])["x"]
    assert (fed == 40_000 >> 8).all()


def test_damaged_and_huge_images_are_one_clear_error(tmp_path: Path):
    good = drawn(tmp_path / "a.png", 64, 64).read_bytes()
    info = (ValueInfo("input", F32, ("N", 3, 8, 8)),)
    for cut in (0, 9, 30, len(good) - 30):
        (tmp_path / "a.png").write_bytes(good[:cut])
        samples = Samples.from_path(f"{tmp_path}:input=rgb/255@chw,edge=8").bind(info)
        with pytest.raises(ModelError, match=r"a\.png cannot be read as an image"):
            samples.read([0])
    bomb = good[:16] + (50_000).to_bytes(4, "big") * 2 + good[24:]
    (tmp_path / "a.png").write_bytes(bomb)
    samples = Samples.from_path(f"{tmp_path}:input=rgb/255@chw,edge=8").bind(info)
    with pytest.raises(ModelError, match=r"a\.png"):
        samples.read([0])
