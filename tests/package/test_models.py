"""Packages where a model goes: load, save, sessions, runs and the command line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import Budget, Model, cli, open_session, runtime, shrink
from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.measuring import measure
from onnxshrink.package import Package, PackedTensor, pack_file
from onnxshrink.runtime import file_bytes

Array = np.ndarray[Any, Any]
MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "latencies", lambda one, two, *feeds: (0.1, 1.0))


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def mlp(path: Path, *, width: int = 200) -> Path:
    """Two layers: one large enough to stay in its file, one pruned, small biases."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(100, width)).astype(np.float32)
    second = rng.normal(size=(width, 10)).astype(np.float32)
    second[rng.random(second.shape) < 0.8] = 0
    weights = {"w1": first, "b1": np.ones(width, np.float32), "w2": second}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mlp(tmp_path / "m.onnx")


def outputs(path: Path) -> Array:
    feed = {"x": np.random.default_rng(1).normal(size=(3, 100)).astype(np.float32)}
    return np.asarray(open_session(path, threads=1).run(None, feed)[0])


def kept(path: Path) -> Path:
    """A package of a file, byte for byte."""
    target = path.with_suffix(".onnxz")
    target.write_bytes(b"".join(pack_file(path)))
    return target


# --- load and save ----------------------------------------------------------------


def test_a_package_loads_as_the_model_it_was_made_of(model: Path) -> None:
    package = kept(model)
    loaded = Model.load(package)
    assert loaded.to_bytes() == model.read_bytes()
    assert loaded.source == package
    assert Model.load(package.read_bytes()).to_bytes() == model.read_bytes()


def test_large_weights_stay_in_the_package_until_they_are_read(model: Path) -> None:
    loaded = Model.load(kept(model))
    weight = loaded.weight("w1")
    assert isinstance(weight.tensor, PackedTensor)
    first = weight.read()
    assert weight.read() is first  # decoded once while somebody holds it
    want = numpy_helper.to_array(onnx.load(str(model)).graph.initializer[0])
    assert np.array_equal(first, want)


def test_a_weight_in_a_package_goes_to_another_process(model: Path) -> None:
    package = kept(model)
    for source in (package, package.read_bytes()):
        tensor = Model.load(source).weight("w1").tensor
        values = tensor.read()
        again = pickle.loads(pickle.dumps(tensor))
        assert np.array_equal(again.read(), values)


@pytest.mark.parametrize("storage", ["auto", "plain", "tiny"])
def test_a_model_is_saved_as_a_package_by_its_suffix(model: Path, storage: Any) -> None:
    target = model.with_name("out.onnxz")
    assert Model.load(model).save(target, storage=storage) == (target,)
    assert target.stat().st_size < 0.87 * model.stat().st_size
    assert Model.load(target).to_bytes() == model.read_bytes()


def test_saving_plain_weights_is_packing_their_file(model: Path) -> None:
    target = model.with_name("out.onnxz")
    Model.load(model).save(target)
    assert target.read_bytes() == b"".join(pack_file(model))
    again = model.with_name("again.onnxz")
    Model.load(target).save(again)
    assert again.read_bytes() == target.read_bytes()


def test_encodings_in_the_graph_are_not_packed_twice(model: Path) -> None:
    encoded = model.with_name("encoded.onnx")
    Model.load(model).save(encoded)
    assert encoded.stat().st_size < model.stat().st_size
    target = model.with_name("out.onnxz")
    Model.load(encoded).save(target)
    assert len(Model.load(target).graph.nodes) == 3
    assert target.stat().st_size < len(b"".join(pack_file(encoded)))


def test_an_edited_package_saves_what_was_edited(model: Path) -> None:
    loaded = Model.load(kept(model))
    loaded.set_weight("w2", np.zeros((200, 10), np.float32))
    target = model.with_name("edited.onnxz")
    loaded.save(target)
    assert not outputs(target).any()
    loaded.save(model.with_name("edited.onnx"))
    assert not outputs(model.with_name("edited.onnx")).any()


def test_a_package_is_not_written_over_itself(model: Path) -> None:
    package = kept(model)
    with pytest.raises(OutputError):
        Model.load(package).save(package)


@pytest.mark.parametrize("external", ["auto", "always"])
def test_weights_beyond_a_protobuf_are_external_inside_the_package(
    model: Path, external: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxshrink.model.saving.INLINE_LIMIT", 50_000)
    target = model.with_name("large.onnxz")
    assert Model.load(model).save(target, external=external) == (target,)
    names = [file.name for file in Package(target).files]
    assert len(names) == 2
    assert names[1].startswith("large.onnx.")
    loaded = Model.load(target)
    assert loaded.external
    assert np.array_equal(
        loaded.weight("w1").read(), Model.load(model).weight("w1").read()
    )
    assert np.array_equal(outputs(target), outputs(model))
    out = model.with_name("out")
    out.mkdir()
    assert run("unpack", target, "-o", out / "large.onnx").exit_code == 0
    assert np.array_equal(outputs(out / "large.onnx"), outputs(model))
    with pytest.raises(ModelError, match="do not fit into one protobuf"):
        Model.load(model).save(model.with_name("no.onnxz"), external="never")


def test_tiny_storage_is_for_packages(model: Path) -> None:
    with pytest.raises(UsageError, match=r"write a \.onnxz file"):
        Model.load(model).save(model.with_name("out.onnx"), storage="tiny")


def test_a_package_without_a_model_is_refused(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"no protobuf, just words")):
        path = tmp_path / name
        path.write_bytes(content)
        target = tmp_path / f"{name}.onnxz"
        target.write_bytes(b"".join(pack_file(path)))
        with pytest.raises(ModelError, match=rf"{name}.onnxz .* ONNX model"):
            Model.load(target)


def test_damage_is_found_when_the_weight_is_read(model: Path) -> None:
    package = kept(model)
    data = bytearray(package.read_bytes())
    data[30_000] ^= 1
    package.write_bytes(data)
    loaded = Model.load(package)
    with pytest.raises(ModelError, match="is damaged: tensor 0, block 0"):
        loaded.weight("w1").read()
    with pytest.raises(ModelError, match="is damaged: tensor 0, block 0"):
        open_session(package)


# --- sessions ---------------------------------------------------------------------


@pytest.mark.parametrize("spill", [0, 1 << 30])
def test_a_session_on_a_package_gives_the_same_bits(
    model: Path, spill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_SPILL", spill)
    assert np.array_equal(outputs(kept(model)), outputs(model))


def test_values_inside_a_package_can_be_looked_at(model: Path) -> None:
    feed = {"x": np.ones((1, 100), np.float32)}
    session = runtime.session(kept(model), expose=["h"], only_exposed=True)
    plain = runtime.session(model, expose=["h"], only_exposed=True)
    assert np.array_equal(session.run(feed)["h"], plain.run(feed)["h"])


def test_what_loading_a_package_costs_is_measured(model: Path) -> None:
    cost = runtime.load_cost(kept(model))
    assert cost is not None
    assert 0 < cost.seconds < 60
    assert file_bytes(kept(model)) == kept(model).stat().st_size


# --- runs -------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "load_cost", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("quick")
def test_a_run_writes_a_package_and_reports_its_bytes(model: Path) -> None:
    target = model.with_name("small.onnxz")
    data = {"x": np.random.default_rng(2).normal(size=(64, 100)).astype(np.float32)}
    result = shrink(
        model,
        "fold,prune:sparsity=0.5",
        data=data,
        budget=Budget(min_sqnr=0.1),
        output=target,
    )
    assert result.files == (target,)
    assert result.report.final.file_bytes == target.stat().st_size
    assert result.report.steps[-1].after.nonzeros < 0.7 * 22000
    zeros = Model.load(target).weight("w1").read() == 0
    assert 0.3 < zeros.mean() < 0.8
    # And on from there: a package goes in where a model does.
    again = shrink(target, "fold", data=data, output=model.with_name("again.onnx"))
    assert again.report.baseline.file_bytes == target.stat().st_size
    assert np.array_equal(outputs(target), outputs(model.with_name("again.onnx")))


@pytest.mark.usefixtures("quick")
def test_slow_coders_are_for_the_file_that_is_written(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    save = Model.save

    def saved(self: Model, path: Path, **options: Any) -> Any:
        seen.append(options.get("storage", "auto"))
        return save(self, path, **options)

    monkeypatch.setattr(Model, "save", saved)
    target = model.with_name("small.onnxz")
    shrink(model, "fold,prune", storage="tiny", output=target)
    assert len(seen) > 2
    assert seen.count("tiny") == 1
    assert seen[-1] == "tiny"


@pytest.mark.usefixtures("quick")
def test_the_same_run_writes_the_same_package(model: Path) -> None:
    found = []
    for name in ("a.onnxz", "b.onnxz"):
        target = model.with_name(name)
        result = run(model, "--passes", "fold", "-o", target)
        assert result.exit_code == 0, result.output
        found.append(target.read_bytes())
    assert found[0] == found[1]


# --- the command line -------------------------------------------------------------


def test_pack_and_unpack_give_the_file_back(model: Path) -> None:
    before = model.read_bytes()
    done = run("pack", model)
    assert done.exit_code == 0, done.output
    package = model.with_suffix(".onnxz")
    assert package.is_file()
    model.unlink()
    done = run("unpack", package)
    assert done.exit_code == 0, done.output
    assert model.read_bytes() == before


def test_pack_undoes_encodings_where_it_is_asked_to(model: Path) -> None:
    encoded = model.with_name("encoded.onnx")
    Model.load(model).save(encoded)
    keep, plain = model.with_name("keep.onnxz"), model.with_name("plain.onnxz")
    assert run("pack", encoded, "-o", keep).exit_code == 0
    assert run("pack", encoded, "-o", plain, "--storage", "plain").exit_code == 0
    assert plain.stat().st_size < keep.stat().st_size
    assert len(Model.load(plain).graph.nodes) == 3
    assert np.array_equal(outputs(plain), outputs(encoded))


def test_inspect_and_compare_take_packages(model: Path) -> None:
    package = kept(model)
    assert "22 k" in run("inspect", package).output.replace("22.2", "22")
    assert run("compare", model, package).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "{m}", "-o", "{d}/out.onnx"], "a package is called *.onnxz"),
        (["pack", "{z}"], "is a package already"),
        (["pack", "{d}/none.onnx"], "does not exist"),
        (["pack", "{m}", "-o", "{d}/no/out.onnxz"], "no such folder"),
        (["unpack", "{m}", "-o", "{d}/x.onnx"], "is no package"),
        (["unpack", "{d}/none.onnxz"], "does not exist"),
        (["unpack", "{z}", "-o", "{d}/x.onnxz"], "is called like a package"),
        (["unpack", "{z}", "-o", "{d}/no/x.onnx"], "there is no folder"),
        (["unpack", "{cut}"], "is damaged: it is cut short"),
        (["{cut}", "-o", "{d}/x.onnx"], "is damaged: it is cut short"),
        (["{m}", "--storage", "tiny", "-o", "{d}/x.onnx"], "is for packages"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_what_cannot_be_done_is_one_line(
    words: list[str], message: str, model: Path
) -> None:
    package = kept(model)
    cut = model.with_name("cut.onnxz")
    cut.write_bytes(package.read_bytes()[:-9])
    names = {"m": model, "z": package, "cut": cut, "d": model.parent}
    done = run(*[word.format(**names) for word in words])
    assert done.exit_code == 1
    text = " ".join(done.output.split())
    assert message in text
    assert "Traceback" not in text
    assert "bug" not in text
    assert not model.with_name("x.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "residual-cnn", "lenet-300-100"])
def test_trained_models_answer_alike_from_a_package(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.onnx"
    path.write_bytes((MODELS / f"{name}.onnx").read_bytes())
    package = kept(path)
    assert package.stat().st_size < 0.87 * path.stat().st_size
    plain, packed = open_session(path, threads=1), open_session(package, threads=1)
    info = plain.get_inputs()[0]
    shape = [dim if isinstance(dim, int) else 2 for dim in info.shape]
    feed = {info.name: np.random.default_rng(0).random(shape).astype(np.float32)}
    for a, b in zip(plain.run(None, feed), packed.run(None, feed), strict=True):
        assert np.array_equal(a, b)
