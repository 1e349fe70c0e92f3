"""Saving and external data: atomic, contained, and never over the input."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelError, OnnxshrinkError, OutputError
from onnxshrink.model import Model
from onnxshrink.tensors import FileTensor

ROWS = 300
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, ROWS)).astype(np.float32)
X = np.ones((1, ROWS), np.float32)


def matmul(weight: np.ndarray[Any, Any] = WEIGHT) -> onnx.ModelProto:
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", ROWS])
        for name in "xy"
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.ones(ROWS, np.float32), "b"),
    ]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    return helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


def external(folder: Path, **entries: str) -> Path:
    """Write a model whose weight says where it is with exactly these entries."""
    proto = matmul()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    if not (folder / "w.bin").exists():
        (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    return path


def outputs(path: Path) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- external data that is read ---------------------------------------------------


def test_external_data_is_read_lazily_and_written_inline_on_request(
    tmp_path: Path,
) -> None:
    source = external(tmp_path)
    model = Model.load(source)
    tensor = model.weight("w").tensor
    assert isinstance(tensor, FileTensor)
    np.testing.assert_array_equal(tensor.read(), WEIGHT)
    assert model.external
    inline = tmp_path / "inline.onnx"
    assert model.save(inline, storage="plain", external="never") == (inline,)
    assert inline.read_bytes() == matmul().SerializeToString(deterministic=True)
    assert model.to_bytes() == inline.read_bytes()


def test_one_file_may_hold_many_tensors_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"head" + WEIGHT.tobytes() + b"tail")
    source = external(
        tmp_path, location="data/w.bin", offset="4", length=str(WEIGHT.nbytes)
    )
    np.testing.assert_array_equal(Model.load(source).weight("w").read(), WEIGHT)


def test_a_model_outlives_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = Model.load("m.onnx")
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(model.weight("w").read(), WEIGHT)
    with pytest.raises(OutputError, match="is the input itself"):
        model.save("../m.onnx")


# --- external data that is refused ------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": ""}, "empty or not a file name"),
        ({"location": "a\0b"}, "not a file name"),
        ({"location": "/etc/passwd"}, "absolute"),
        ({"location": "../w.bin"}, "climbs out"),
        ({"location": "data/../../w.bin"}, "climbs out"),
        ({"location": "data/../w.bin"}, "climbs out"),
        ({"location": "C:w.bin"}, "absolute or not portable"),
        ({"location": "C:/w.bin"}, "absolute or not portable"),
        ({"location": "data\\w.bin"}, "absolute or not portable"),
        ({"location": "\\\\host\\w.bin"}, "absolute or not portable"),
        ({"location": "missing.bin"}, "does not exist"),
        ({"location": "m.onnx/w.bin"}, "does not exist"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": "."}, "not a regular file"),
        ({"location": "fifo"}, "not a regular file"),
        ({"location": "link.bin"}, "symbolic link 'link.bin'"),
        ({"location": "linked/w.bin"}, "symbolic link 'linked'"),
        ({"location": "loop"}, "symbolic link 'loop'"),
        ({"location": "x" * 5000}, "cannot be read"),
        ({"offset": "-4"}, "offset or length '-4'"),
        ({"offset": "four"}, "offset or length 'four'"),
        ({"offset": "4.0"}, "offset or length '4.0'"),
        ({"offset": " 4"}, "offset or length ' 4'"),
        ({"offset": "1_0"}, "offset or length '1_0'"),
        ({"offset": "\u0664"}, "offset or length"),
        ({"offset": "9" * 5000}, "offset or length '9999"),
        ({"offset": "4"}, "lies at bytes 4 to"),
        ({"offset": str(1 << 62)}, "lies at bytes"),
        ({"length": "-1"}, "offset or length '-1'"),
        ({"length": "8"}, "has 8 bytes of data"),
        ({"length": str(1 << 62)}, "bytes of data in w.bin"),
    ],
)
def test_a_harmful_or_wrong_location_is_refused_in_one_line(
    entries: dict[str, str], words: str, tmp_path: Path
) -> None:
    source = external(tmp_path, **entries)
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "w.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "link.bin").symlink_to("w.bin")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelError) as caught:
        Model.load(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_location_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    source = external(tmp_path)
    data = source.read_bytes()
    assert data.count(b"w.bin") == 1
    source.write_bytes(data.replace(b"w.bin", b"\x80.bin"))
    with pytest.raises(ModelError, match="UTF-8"):
        Model.load(source, check=False)


def test_external_data_beside_data_in_the_model_is_refused(tmp_path: Path) -> None:
    for value in (WEIGHT.tobytes(), b"small"):
        source = external(tmp_path)
        proto = onnx.load(source, load_external_data=False)
        proto.graph.initializer[0].raw_data = value
        source.write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError, match=r"in the model itself|two places"):
            Model.load(source)


def test_external_data_without_a_file_to_look_beside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="load the model by its path"):
        Model.load(external(tmp_path).read_bytes())


@pytest.mark.parametrize("kind", ["tensors", "sparse_tensor", "training"])
def test_external_data_where_nothing_carries_it_is_refused(
    kind: str, tmp_path: Path
) -> None:
    source = external(tmp_path)
    proto = onnx.load(source, load_external_data=False)
    tensor = proto.graph.initializer[0]
    node = onnx.NodeProto(op_type="Thing", domain="vendor", output=["t"])
    if kind == "tensors":
        node.attribute.append(helper.make_attribute("t", [tensor]))
    elif kind == "sparse_tensor":
        attr = node.attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR)
        attr.sparse_tensor.values.CopyFrom(tensor)
    holder = proto.graph
    if kind == "training":
        holder = proto.training_info.add().algorithm
        node.attribute.append(helper.make_attribute("t", tensor))
    holder.node.append(node)
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="only initializers"):
        Model.load(source, check=False)


# --- model files that are none ----------------------------------------------------


def test_a_model_path_must_be_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    (tmp_path / "empty.onnx").touch()
    for name, words in {
        "fifo.onnx": "not a regular file",
        "loop.onnx": "loop",
        "": "not a regular file",
        "missing.onnx": "does not exist",
        "empty.onnx": "is empty",
        "x" * 5000: "cannot read",
        "a\0b": "a",
    }.items():
        with pytest.raises(ModelError) as caught:
            Model.load(f"{tmp_path}/{name}")
        assert words in str(caught.value)
    with pytest.raises(ModelError, match="not a regular file"):
        Model.load("/dev/zero")
    with pytest.raises(ModelError, match="empty"):
        Model.load(b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_model_is_refused(tmp_path: Path) -> None:
    source = external(tmp_path)
    source.chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        Model.load(source)


def test_a_model_cut_short_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    data = matmul(
        np.ones((200, 200), np.float32)[:4, :4].repeat(75, 0)
    ).SerializeToString()
    path = tmp_path / "m.onnx"
    for end in [*range(0, 200), *range(200, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:end])
        for source in (path, data[:end]):
            with pytest.raises(ModelError) as caught:
                Model.load(source)
            assert "\n" not in str(caught.value)


# --- saving -----------------------------------------------------------------------


def test_external_data_that_is_written_runs(tmp_path: Path) -> None:
    inline = tmp_path / "inline.onnx"
    inline.write_bytes(matmul().SerializeToString())
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    files = Model.load(inline).save(target, storage="plain", external="always")
    assert files[0] == target
    assert len(files) == 2
    assert set(target.parent.iterdir()) == set(files)
    assert files[1].name.startswith("m.onnx.")
    np.testing.assert_array_equal(outputs(target), outputs(inline))
    again = Model.load(target)
    np.testing.assert_array_equal(again.weight("w").read(), WEIGHT)
    assert again.to_bytes() == Model.load(inline).to_bytes()
    entries = {
        e.key: e.value
        for e in onnx.load(target, load_external_data=False)
        .graph.initializer[0]
        .external_data
    }
    assert int(entries["offset"]) % 4096 == 0


def test_an_external_pair_is_replaced_without_leaving_the_old_data(
    tmp_path: Path,
) -> None:
    target = tmp_path / "m.onnx"
    first = Model.load(matmul()).save(target, storage="plain", external="always")
    same = Model.load(matmul()).save(target, storage="plain", external="always")
    assert first == same
    second = Model.load(matmul(-WEIGHT)).save(
        target, storage="plain", external="always"
    )
    assert second[1] != first[1]
    assert set(tmp_path.iterdir()) == set(second)
    np.testing.assert_array_equal(Model.load(target).weight("w").read(), -WEIGHT)
    Model.load(matmul()).save(target, storage="plain")
    assert set(tmp_path.iterdir()) == {target}


def test_replacing_a_model_leaves_data_of_others_alone(tmp_path: Path) -> None:
    target = external(tmp_path)
    Model.load(matmul()).save(target, storage="plain")
    assert (tmp_path / "w.bin").read_bytes() == WEIGHT.tobytes()


def test_a_model_keeps_its_external_form_and_the_input_stays(tmp_path: Path) -> None:
    source = external(tmp_path)
    before = listing(tmp_path)
    out = tmp_path / "out.onnx"
    files = Model.load(source).save(out, storage="plain")
    assert len(files) == 2
    np.testing.assert_array_equal(outputs(out), outputs(source))
    for name, data in before.items():
        assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("through", ["path", "hard link", "symbolic link", "data"])
def test_the_input_is_never_overwritten(through: str, tmp_path: Path) -> None:
    source = external(tmp_path)
    target = tmp_path / "other.onnx"
    if through == "path":
        target = source
    elif through == "hard link":
        os.link(source, target)
    elif through == "symbolic link":
        target.symlink_to("m.onnx")
    else:
        target = tmp_path / "w.bin"
    before = listing(tmp_path)
    for model in (Model.load(source), Model.load(source).copy()):
        with pytest.raises(OutputError, match="is the input itself"):
            model.save(target)
    assert listing(tmp_path) == before


def test_permission_bits_follow_what_is_replaced_or_the_source(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(matmul().SerializeToString())
    old = os.umask(0o027)
    try:
        for mode, want in ((0o600, 0o600), (0o666, 0o640), (0o755, 0o750)):
            source.chmod(mode)
            target = tmp_path / f"{mode:o}.onnx"
            for file in Model.load(source).save(target, external="always"):
                assert stat.S_IMODE(file.stat().st_mode) == want
        target.chmod(0o644)
        Model.load(source).save(target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.onnx"
    link.symlink_to("real/m.onnx")
    for _ in range(2):  # dangling first, then to a file
        (written,) = Model.load(matmul()).save(link, storage="plain")
        assert link.is_symlink()
        assert written.samefile(tmp_path / "real" / "m.onnx")
    assert set((tmp_path / "real").iterdir()) == {tmp_path / "real" / "m.onnx"}


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    model = Model.load(matmul())
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "null").symlink_to("/dev/null")
    for name, words in {
        "": "it is a folder",
        "missing/m.onnx": "there is no such folder",
        "file/m.onnx": "there is no such folder",
        "fifo": "not a regular file",
        "null": "not a regular file",
        "x" * 300: "too long",
        "a\0b": "cannot write",
    }.items():
        with pytest.raises(OutputError) as caught:
            model.save(f"{tmp_path}/{name}")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="not a regular file"):
        model.save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "file", "null"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        Model.load(matmul()).save(tmp_path / "m.onnx")


@pytest.mark.parametrize("external", ["never", "always"])
@pytest.mark.parametrize("unnamed", [True, False])
def test_a_full_disk_is_said_and_leaves_the_old_file(
    external: Any, unnamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with pytest.raises(OutputError, match="the disk is full; nothing was written"):
        Model.load(matmul()).save(target, external=external)
    assert listing(tmp_path) == {"m.onnx": b"old"}


def test_systems_without_nameless_files_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    files = Model.load(matmul()).save(tmp_path / "m.onnx", external="always")
    assert set(tmp_path.iterdir()) == set(files)
    np.testing.assert_array_equal(Model.load(files[0]).weight("w").read(), WEIGHT)


def test_a_limit_on_file_sizes_is_an_error_of_the_output(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OutputError, match="cannot write"):
            Model.load(matmul()).save(tmp_path / "m.onnx", storage="plain")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_source_that_changes_during_the_save_leaves_no_output(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(matmul().SerializeToString())
    model = Model.load(source)
    source.write_bytes(matmul(-WEIGHT).SerializeToString() + b"")
    os.utime(source, ns=(1, 1))
    with pytest.raises(ModelError, match="was changed while it was in use"):
        model.save(tmp_path / "out.onnx", storage="plain")
    assert list(tmp_path.iterdir()) == [source]


def test_weights_above_the_limit_go_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxshrink.model.saving.INLINE_LIMIT", 100_000)
    model = Model.load(matmul())
    assert len(model.save(tmp_path / "m.onnx", storage="plain")) == 2
    with pytest.raises(ModelError, match="do not fit into one file"):
        model.save(tmp_path / "n.onnx", storage="plain", external="never")
    with pytest.raises(OutputError, match="text has no external data"):
        model.save(tmp_path / "n.onnxtxt", storage="plain")
    assert not (tmp_path / "n.onnx").exists()


def test_publish_moves_a_saved_model_into_place(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    source = external(tmp_path)
    model = Model.load(source)
    target = tmp_path / "out.onnx"
    for weight in (WEIGHT, -WEIGHT):
        model.set_weight("w", weight)
        files = model.save(tmp_path / "scratch" / "out.onnx", storage="plain")
        published = model.publish(files, target)
        assert published[0] == target
        np.testing.assert_array_equal(Model.load(target).weight("w").read(), weight)
    assert len(list(tmp_path.glob("out.onnx*"))) == 2
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(OutputError, match="is the input itself"):
        model.publish(published, source)


# --- killed at any moment ---------------------------------------------------------


CHILD = """
import os, sys
import numpy as np
from onnxshrink.model import Model
source, target, external, die_after = sys.argv[1:]
model = Model.load(source)
model.set_weight("w", -model.weight("w").read())
calls = int(die_after)
def dying(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    setattr(os, name, call)
if calls:
    for name in ("fsync", "link", "replace", "chmod"):
        dying(name)
print("ready", flush=True)
for _ in range(1 if calls else 1000):
    model.save(target, storage="plain", external=external)
"""


def _check_after_kill(folder: Path, source: Path, was: bytes, new: bool) -> None:
    assert source.read_bytes() == was
    target = folder / "out.onnx"
    if target.exists():
        expected = (-WEIGHT, WEIGHT)
        read = Model.load(target).weight("w").read()
        assert any(np.array_equal(read, weight) for weight in expected)
        outputs(target)
    else:
        assert new


def _child(source: Path, target: Path, external: str, after: int) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(target), external, str(after)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("external", ["never", "always"])
@pytest.mark.parametrize("new", [True, False])
def test_a_save_killed_at_any_system_call_leaves_all_or_nothing(
    external: str, new: bool, tmp_path: Path
) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(matmul().SerializeToString())
    was = source.read_bytes()
    killed = 0
    for after in range(1, 12):
        folder = tmp_path / str(after)
        folder.mkdir()
        target = folder / "out.onnx"
        if not new:
            Model.load(source).save(target, storage="plain", external=external)  # type: ignore[arg-type]
        child = _child(source, target, external, after)
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        _check_after_kill(folder, source, was, new)
        if child.returncode == 0:
            break
    assert killed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("external", ["never", "always"])
def test_a_save_killed_at_random_leaves_all_or_nothing(
    external: str, tmp_path: Path
) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(matmul().SerializeToString())
    was = source.read_bytes()
    rng = random.Random(0)
    for _ in range(12):
        child = _child(source, tmp_path / "out.onnx", external, 0)
        child.stdout.readline()
        time.sleep(rng.random() * 0.2)
        child.kill()
        child.communicate()
        _check_after_kill(tmp_path, source, was, new=True)


def test_every_refusal_is_an_error_of_ours() -> None:
    assert issubclass(OutputError, OnnxshrinkError)
    assert issubclass(ModelError, OnnxshrinkError)
