"""Laws that hold for every pass, example models, and golden cases in ONNX text.

They serve the project's own tests and those of a pass in another package::

    from onnxshrink.testing import check_case, check_laws, example_models

    @pytest.mark.parametrize("name", example_models())
    def test_laws(name: str) -> None:
        check_laws(MyPass(), {name: example_models()[name]})

    @pytest.mark.parametrize("path", Path("tests/cases").rglob("*.onnxtxt"), ids=str)
    def test_case(path: Path) -> None:
        check_case(path)
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink._examples import EXAMPLES
from onnxshrink.base import Context, Pass, Promise, Site, SitePass
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.model.topology import is_onnx
from onnxshrink.options import build, options
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits

__all__ = [
    "make_context",
    "Case",
    "apply",
    "check_case",
    "check_laws",
    "example_models",
    "normalised",
]

Array = np.ndarray[Any, np.dtype[Any]]

_NOISE = {"float16": 4e-3, "bfloat16": 3e-2, "double": 1e-9}
"""Largest relative change that counts as float noise; 1e-5 for other floats."""
_MOST_SITES = 8


def example_models() -> dict[str, onnx.ModelProto]:
    """Return small models that hold one difficulty each, by name.

    All are valid, run in onnxruntime, and have seeded weights: weights that are shared,
    graph inputs, graph outputs, Constant nodes, behind Identity, in branches, loops and
    functions; convolutions with uneven pads, groups and strides; recurrent layers, a
    transformer, half precision, quantized weights, an opset 9 model, and more.
    """
    return {name: make() for name, make in EXAMPLES.items()}


def apply(
    pass_: Pass,
    model: Model,
    *,
    seed: int = 0,
    splits: Splits | None = None,
) -> tuple[Model, Context]:
    """Apply a pass to a copy, as the manager does, without judging the outcome.

    Args:
        pass_: The pass.
        model: The model; it is not changed.
        seed: Seed of the context and of the random samples.
        splits: Samples to use instead of random ones.

    Returns:
        The rewritten copy, and the context with what was done and left alone.

    Raises:
        ModelError: The model cannot be brought to the opset the pass needs.
    """
    copy = model.copy()
    copy.require_opset(pass_.opset)
    context = _context(model, seed, splits)
    pass_.apply(copy, context)
    return copy, context


def check_laws(
    pass_: Pass | type[Pass],
    models: Mapping[str, onnx.ModelProto | Model | Path] | None = None,
    *,
    seed: int = 0,
    data: bool = False,
) -> None:
    """Check what must hold for every pass, on each model.

    - Its options print as pipeline text and TOML that read back as the same pass, and
      every option has a description.
    - It leaves the model it is given the copy of untouched.
    - The rewritten model passes onnx.checker, loads in onnxruntime, and keeps names,
      types and shapes of inputs and outputs.
    - ``Promise.SAME``: outputs on random inputs stay the same up to float noise;
      otherwise they stay finite where they were, and an output that is a weight itself
      stays as it is.
    - The same model, options and seed give the same bytes.
    - It takes random samples, or refuses them with a ``UsageError`` that names
      ``--data``; then none of the laws about what it did can be checked here.
    - It says that it did something exactly if it changed something.
    - A ``SitePass`` lists its sites without changing the model, twice the same, each
      under a name of its own; leaving any one out leaves a valid model; ``only`` and
      ``skip`` choose among them; without sites it says why.

    Args:
        pass_: A pass, or a class all of whose options have defaults.
        models: The models by name; by default ``example_models()``, and one of them
            with external data.
        seed: Seed of the inputs and of the pass.
        data: Whether the pass is told that its samples are data, with some to train
            on and some to choose by, and not random inputs that only smoke. Then it
            may refuse a model for other reasons.

    Raises:
        AssertionError: A law does not hold; says which, and on which model.
    """
    if isinstance(pass_, type):
        pass_ = build(pass_, {})
    _check_options(pass_)
    if models is not None:
        for name, source in models.items():
            _check_model(pass_, name, _loaded(source), seed, data)
        return
    for name, proto in example_models().items():
        _check_model(pass_, name, Model.load(proto), seed, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        Model.load(EXAMPLES["convolutions"]()).save(
            path, storage="plain", external="always"
        )
        _check_model(pass_, "external_data", Model.load(path), seed, data)


def _loaded(source: onnx.ModelProto | Model | Path) -> Model:
    return source if isinstance(source, Model) else Model.load(source)


def _data(model: Model, seed: int) -> Splits:
    """Return random inputs that pass for data; each sample is a whole feed."""
    drawn = Samples.random_for(model, seed=seed, count=20)
    return Splits(
        calibration=drawn.take(slice(0, 8)),
        training=drawn.take(slice(8, 14)),
        validation=drawn.take(slice(14, 16)),
        evaluation=drawn.take(slice(16, 20)),
    )


def _context(model: Model, seed: int, splits: Splits | None = None) -> Context:
    if splits is None:
        splits = Splits.build(model, seed=seed)
    return make_context(samples=splits, reference=model.copy(), seed=seed, threads=1)


def _check_options(pass_: Pass) -> None:
    cls = type(pass_)
    known = {cls.name: cls}
    pipeline = Pipeline((pass_,))
    text = str(pipeline)
    _law(
        Pipeline.parse(text, known) == pipeline,
        f"{cls.name}: the text {text!r} does not read back as the same pass",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(pipeline.to_toml(), encoding="utf-8")
        _law(
            Pipeline.from_toml(path, known) == pipeline,
            f"{cls.name}: the recipe does not read back as the same pass",
        )
    for option in options(cls).values():
        _law(
            bool(option.doc),
            f"{cls.name}: option {option.name} is missing from the docstring's "
            "Attributes section",
        )


def _check_model(pass_: Pass, name: str, model: Model, seed: int, data: bool) -> None:
    where = f"{pass_.name} on {name}"
    splits = _data(model, seed) if data else None
    before = model.to_bytes()
    try:
        start = model.copy()
        start.require_opset(pass_.opset)
    except ModelError:
        return  # the manager refuses it in the same words
    start_bytes = start.to_bytes()

    try:
        after, context = apply(pass_, model, seed=seed, splits=splits)
    except UsageError as error:
        _law(data or "--data" in str(error), f"{where}: {error}")
        _law(model.to_bytes() == before, f"{where}: the original model was changed")
        return
    _law(model.to_bytes() == before, f"{where}: the original model was changed")
    _check_valid(where, model, after)
    _check_outputs(pass_, where, model, after, context)

    again, _ = apply(pass_, model, seed=seed, splits=splits)
    _law(
        again.to_bytes() == after.to_bytes(),
        f"{where}: the same model, options and seed gave other bytes",
    )
    changed = after.to_bytes() != start_bytes
    _law(
        changed == bool(context.done),
        f"{where}: the model was {'' if changed else 'not '}changed, and the pass "
        f"says it did {context.done or 'nothing'}",
    )
    for said in [*context.done, *context.skips]:
        _law(bool(said[1].strip()), f"{where}: {said!r} says nothing")
    if isinstance(pass_, SitePass):
        _check_sites(pass_, where, start, lambda: _context(model, seed, splits))


def _check_valid(where: str, reference: Model, model: Model) -> None:
    try:
        model.check()
        onnx.checker.check_model(model.to_proto())
        model.copy()
        runtime.session(model, threads=1)
    except (ModelError, onnx.checker.ValidationError) as error:
        raise AssertionError(f"{where}: the model is broken: {error}") from error
    for side in ("inputs", "outputs"):
        was, now = getattr(reference, side), getattr(model, side)
        _law(was == now, f"{where}: {side} were {was} and are {now}")


def _check_outputs(
    pass_: Pass, where: str, reference: Model, model: Model, context: Context
) -> None:
    kept = {tensor.name for tensor in reference.graph.outputs} & {
        weight.name for weight in reference.weights() if weight.is_output
    }
    # A wrong answer must not hide in a single lucky batch.
    for feeds in _batches(context.samples):
        wanted = runtime.session(reference, threads=1, optimize="off").run(feeds)
        got = runtime.session(model, threads=1, optimize="off").run(feeds)
        for name, value in wanted.items():
            promise = Promise.SAME if name in kept else pass_.promise
            _check_output(promise, f"{where}: output {name}", value, got[name])


def _batches(splits: Splits) -> Iterator[dict[str, Array]]:
    for samples in (splits.validation, splits.evaluation):
        if samples is not None:
            yield from samples.batches(4)


def _check_output(promise: Promise, where: str, wanted: Any, got: Any) -> None:
    if not isinstance(wanted, np.ndarray):
        _law(promise is not Promise.SAME or wanted == got, f"{where} changed")
        return
    _law(
        got.dtype == wanted.dtype and got.shape == wanted.shape,
        f"{where} was {wanted.dtype}{wanted.shape} and is {got.dtype}{got.shape}",
    )
    if wanted.dtype.kind not in "fcV" and wanted.dtype.name != "bfloat16":
        _law(
            promise is not Promise.SAME or bool((wanted == got).all()),
            f"{where} changed",
        )
        return
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(wanted)
    _law(bool(np.isfinite(got[finite]).all()), f"{where} is no longer finite")
    if promise is not Promise.SAME or not finite.any():
        return
    limit = _NOISE.get(str(got.dtype), 1e-5) * max(1e-3, np.abs(wanted[finite]).max())
    error = np.abs(wanted - got)[finite].max()
    _law(error <= limit, f"{where} moved by {error:.3g}, more than {limit:.3g}")


def _check_sites(
    pass_: SitePass, where: str, start: Model, fresh: Callable[[], Context]
) -> None:
    context = fresh()
    before = start.to_bytes()
    sites = list(pass_.sites(start, context))
    _law(start.to_bytes() == before, f"{where}: sites() changed the model")
    _law(
        list(pass_.sites(start, fresh())) == sites,
        f"{where}: sites() gave other sites the second time",
    )
    for site in sites:
        _law(isinstance(site, Site), f"{where}: {site!r} is not a Site")
        _law(" at 0x" not in repr(site), f"{where}: site {site.where} does not print")
        gentler = pass_.weaken(site, 0.5)
        _law(
            gentler is None or gentler.where == site.where,
            f"{where}: weakening {site.where} gave a site elsewhere",
        )
    names = [site.where for site in sites]
    _law(len(set(names)) == len(names), f"{where}: two sites have one name: {names}")

    weights = [weight for weight in start.weights() if weight.size > 0]
    if weights and not sites and pass_.promise is not Promise.SAME:
        _law(bool(context.skips), f"{where}: no weight was taken, and nothing says why")

    for chosen in (
        dataclasses.replace(pass_, skip=("*",)),
        dataclasses.replace(pass_, only=("no such name",)),
    ):
        left = chosen.sites(start, fresh())
        _law(not left, f"{where}: {Pipeline((chosen,))} still lists {left}")

    for site in sites[:_MOST_SITES]:
        copy = start.copy()
        rest = [other for other in sites if other is not site]
        pass_.rewrite_all(copy, rest, fresh())
        _check_valid(f"{where} without site {site.where}", fresh().reference, copy)


def _law(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


# --- golden cases ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A golden case: a file of ONNX text with the pipeline in its first line.

    ::

        # prune:sparsity=0.5
        <ir_version: 8, opset_import: ["" : 17]>
        example (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}>
        { y = MatMul(x, w) }
        # output
        <ir_version: 8, opset_import: ["" : 17]>
        example (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {0, 0, 3, 4}>
        { y = MatMul(x, w) }

    Without ``# output`` the pipeline must leave the model alone. Further lines may
    follow the first:

    - ``# skipped w: is shared``: the pass says so of ``w``;
    - ``# calibration: {"x": [[1, 0], [0, 1]]}``: the samples the pass sees.

    Attributes:
        path: The file.
        pipeline: Text of the pipeline.
        before: Text of the model.
        after: Text of the expected model.
        skipped: (where, part of why) that must have been said.
        calibration: Samples by input name, or none.
    """

    path: Path
    pipeline: str
    before: str
    after: str
    skipped: tuple[tuple[str, str], ...] = ()
    calibration: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Case:
        """Read a case file.

        Raises:
            UsageError: It is not a case.
        """
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        if not first.startswith("# "):
            raise UsageError(f"{path}: the first line must be '# ' and a pipeline")
        skipped: list[tuple[str, str]] = []
        calibration = None
        parts: list[list[str]] = [[]]
        for line in lines:
            if line == "# output":
                parts.append([])
            elif match := re.fullmatch(r"# skipped (.+?): (.+)", line):
                skipped.append((match[1], match[2]))
            elif match := re.fullmatch(r"# calibration: (.+)", line):
                calibration = json.loads(match[1])
            elif not line.startswith("#"):
                parts[-1].append(line)
        texts = ["\n".join(part) for part in parts]
        if len(texts) > 2:
            raise UsageError(f"{path}: there is more than one '# output'")
        return cls(
            path, first[2:].strip(), texts[0], texts[-1], tuple(skipped), calibration
        )


def check_case(
    source: Case | Path, passes: Mapping[str, type[Pass]] | None = None
) -> None:
    """Check a golden case.

    Models are compared by what they compute from: opsets, inputs, outputs, weights,
    nodes and attributes; not by the names of nodes, documentation or recorded shapes.

    Args:
        source: The case or its file.
        passes: The passes there are; by default those of the registry.

    Raises:
        AssertionError: The model is another one; shows the difference.
    """
    case = source if isinstance(source, Case) else Case.read(source)
    model = Model.load(_parsed(case.path, case.before))
    wanted = _parsed(case.path, case.after)
    # An expectation that cannot run would never be met outside this test.
    runtime.session(Model.load(wanted), threads=1)
    skipped: list[tuple[str, str]] = []
    for pass_ in Pipeline.parse(case.pipeline, passes):
        model, context = apply(pass_, model, splits=_samples(case, model))
        skipped += context.skips
    expected, found = normalised(wanted), normalised(model.to_proto())
    if expected != found:
        difference = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), "expected", "found", lineterm=""
        )
        raise AssertionError("\n".join([f"{case.path}:", *difference]))
    for where, why in case.skipped:
        _law(
            any(name == where and why in said for name, said in skipped),
            f"{case.path}: no pass said of {where} that it {why!r}; said: {skipped}",
        )


def _samples(case: Case, model: Model) -> Splits | None:
    if case.calibration is None:
        return None
    types = {info.name: info.data_type for info in model.inputs}
    arrays = {
        name: np.asarray(
            values, onnx.helper.tensor_dtype_to_np_dtype(types.get(name, 1))
        )
        for name, values in case.calibration.items()
    }
    samples = Samples.from_arrays(arrays).bind(model.inputs)
    return Splits(
        calibration=samples, training=samples, validation=samples, evaluation=samples
    )


def _parsed(path: Path, text: str) -> onnx.ModelProto:
    try:
        proto = onnx.parser.parse_model(text)
        onnx.checker.check_model(proto)
    except (onnx.parser.ParseError, onnx.checker.ValidationError) as error:
        raise UsageError(f"{path}: {error}") from error
    return proto


def normalised(proto: onnx.ModelProto) -> str:
    """Return a text that is equal for models that differ in documentation only.

    Left out are versions of IR and producer, metadata, documentation, node names and
    recorded shapes; weights come in the order of their names. Function bodies and
    subgraphs are part of it.
    """
    imports = sorted((entry.domain, entry.version) for entry in proto.opset_import)
    lines = [f"opset {domain or 'ai.onnx'} {version}" for domain, version in imports]
    lines += _graph_lines(proto.graph, "")
    for function in sorted(proto.functions, key=lambda f: (f.domain, f.name)):
        lines.append(
            f"function {function.domain}.{function.name}"
            f"({', '.join(function.input)}) => ({', '.join(function.output)})"
        )
        for node in function.node:
            lines += _node_lines(node, "  ")
    return "\n".join(lines)


def _graph_lines(graph: onnx.GraphProto, indent: str) -> list[str]:
    lines = [f"{indent}input {_value(info)}" for info in graph.input]
    lines += [f"{indent}output {_value(info)}" for info in graph.output]
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        lines.append(f"{indent}weight {tensor.name} = {_tensor(tensor)}")
    for sparse in sorted(graph.sparse_initializer, key=lambda s: s.values.name):
        lines.append(
            f"{indent}sparse {sparse.values.name} = {_tensor(sparse.values)} "
            f"at {_tensor(sparse.indices)} of {list(sparse.dims)}"
        )
    for node in graph.node:
        lines += _node_lines(node, indent)
    return lines


def _node_lines(node: onnx.NodeProto, indent: str) -> list[str]:
    domain = f"{node.domain}." if not is_onnx(node.domain) else ""
    plain, nested = [], []
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        if attribute.ref_attr_name:
            plain.append(f"{attribute.name} = @{attribute.ref_attr_name}")
            continue
        value: Any = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.GraphProto):
            nested.append(f"{indent}  {attribute.name}:")
            nested += _graph_lines(value, indent + "    ")
        else:
            plain.append(f"{attribute.name} = {_attribute(value)}")
    options_ = f"<{', '.join(plain)}>" if plain else ""
    inputs, outputs = ", ".join(node.input), ", ".join(node.output)
    return [f"{indent}{outputs} = {domain}{node.op_type}{options_}({inputs})", *nested]


def _attribute(value: Any) -> str:
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    if isinstance(value, bytes):
        return repr(value.decode("utf-8", "backslashreplace"))
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str | int):
        return repr(value)
    if hasattr(value, "SerializeToString"):
        return " ".join(str(value).split())
    return "[" + ", ".join(_attribute(entry) for entry in value) + "]"


def _tensor(tensor: onnx.TensorProto) -> str:
    array = numpy_helper.to_array(tensor)
    show: Callable[[Any], str] = str
    if array.dtype.kind == "f" or array.dtype.kind == "V":
        show = _shortest
    values = ", ".join(show(value) for value in array.reshape(-1))
    return f"{_type(tensor.data_type)}{list(tensor.dims)} {{{values}}}"


def _shortest(value: Any) -> str:
    return f"{float(value):.9g}"


def _value(info: onnx.ValueInfoProto) -> str:
    if not info.type.HasField("tensor_type"):
        return f"{info.name}: {' '.join(str(info.type).split())}"
    tensor = info.type.tensor_type
    dims = "?"
    if tensor.HasField("shape"):
        dims = ", ".join(
            dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?")
            for dim in tensor.shape.dim
        )
    return f"{info.name}: {_type(tensor.elem_type)}[{dims}]"


def _type(data_type: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(data_type)
    return name.lower()
