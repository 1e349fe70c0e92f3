"""Laws that hold for every pass, on example models or on those given.

Tested in tests/test_laws.py.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxshrink import runtime
from onnxshrink.base import Context, Pass, Promise, Site, SitePass
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.options import build, options
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing.examples import EXAMPLES, example_models

__all__ = ["apply", "check_laws"]

Array = np.ndarray[Any, np.dtype[Any]]

_NOISE = {"float16": 4e-3, "bfloat16": 3e-2, "double": 1e-9}
"""Largest relative change that counts as float noise; 1e-5 for other floats."""
_MOST_SITES = 8


def apply(
    pass_: Pass,
    model: Model,
    *,
    seed: int = 0,
    splits: Splits | None = None,
    reference: Model | None = None,
) -> tuple[Model, Context]:
    """Apply a pass to a copy, as the manager does, without judging the outcome.

    Args:
        pass_: The pass.
        model: The model; it is not changed.
        seed: Seed of the context and of the random samples.
        splits: Samples to use instead of random ones.
        reference: The model that a run of several passes started from; by default
            ``model``.

    Returns:
        The rewritten copy, and the context with what was done and left alone.

    Raises:
        ModelError: The model cannot be brought to the opset the pass needs.
    """
    copy = model.copy()
    copy.require_opset(pass_.opset)
    context = context_of(reference or model, seed, splits)
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
    - The model stays untouched; the pass works on a copy.
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


def context_of(model: Model, seed: int, splits: Splits | None = None) -> Context:
    """Return a context with these samples, by default random ones."""
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
        _check_sites(pass_, where, start, lambda: context_of(model, seed, splits))


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
