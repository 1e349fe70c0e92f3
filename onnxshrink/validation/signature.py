"""The form of a model file, and how its inputs and outputs compare with another's.

Tested in tests/validation/test_validator.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.model import Model, ValueInfo
from onnxshrink.package import is_package, skeleton_of

__all__ = ["Source", "check_form", "signature_of", "signature_problem"]

Source = Model | Path | bytes | onnx.ModelProto


def check_form(candidate: Source) -> None:
    """Run onnx.checker over a candidate.

    onnxruntime is the judge of a model as it comes; but a pass that turned a valid
    model into one that the checker refuses has broken it.

    Raises:
        ModelError: What the checker refuses.
    """
    try:
        if isinstance(candidate, Model):
            candidate.check()
        elif isinstance(candidate, (bytes, onnx.ModelProto)):
            onnx.checker.check_model(candidate)
        elif not candidate.is_file():
            raise ModelError(f"{candidate} does not exist or is not a file")
        elif (
            candidate.suffix == ".onnxtxt"
            or is_package(candidate)
            or candidate.stat().st_size > 1 << 29
        ):
            loaded = Model.load(candidate)
            if loaded.objection:
                raise ModelError(f"onnx.checker refuses it: {loaded.objection}")
        else:
            onnx.checker.check_model(str(candidate))
    except (onnx.checker.ValidationError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "invalid"
        raise ModelError(f"onnx.checker refuses it: {reason}") from error


def signature_of(
    source: Source, session: runtime.Session
) -> tuple[tuple[ValueInfo, ...], tuple[ValueInfo, ...]]:
    """Return inputs and outputs as the model declares them.

    onnxruntime reports shapes that it inferred, which can be sharper in a candidate
    that declares the same.
    """
    if isinstance(source, Model):
        return source.inputs, source.outputs
    if isinstance(source, Path) and source.suffix != ".onnxtxt":
        graph = skeleton_of(source).graph
    elif isinstance(source, onnx.ModelProto):
        graph = source.graph
    else:
        return session.inputs, session.outputs
    defaults = {tensor.name for tensor in graph.initializer}
    defaults |= {tensor.values.name for tensor in graph.sparse_initializer}
    inputs = [info for info in graph.input if info.name not in defaults]
    return (
        tuple(ValueInfo.from_proto(info) for info in inputs),
        tuple(ValueInfo.from_proto(info) for info in graph.output),
    )


def signature_problem(
    inputs: Sequence[ValueInfo],
    outputs: Sequence[ValueInfo],
    new_inputs: Sequence[ValueInfo],
    new_outputs: Sequence[ValueInfo],
) -> str:
    """Return the first difference between two signatures, or ``""``.

    Names and their order, types and fixed dimensions must be the same. A dynamic
    dimension stays dynamic, whatever its symbol; an output dimension about which the
    reference says nothing may become known.
    """
    for what, old, new in (
        ("input", inputs, new_inputs),
        ("output", outputs, new_outputs),
    ):
        before = [info.name for info in old]
        after = [info.name for info in new]
        if before != after:
            lost = [name for name in before if name not in after]
            added = [name for name in after if name not in before]
            if lost:
                return f"{what} {lost[0]!r} is gone"
            if added:
                return f"{what} {added[0]!r} is new"
            return f"the order of the {what}s changed to {', '.join(after)}"
        for one, two in zip(old, new, strict=True):
            if not _same_type(one, two, what == "output"):
                return f"{what} {runtime.describe(one)} became {runtime.describe(two)}"
    return ""


def _same_type(old: ValueInfo, new: ValueInfo, is_output: bool) -> bool:
    if (old.kind, old.data_type) != (new.kind, new.data_type):
        return False
    if old.shape is None:
        return is_output or new.shape is None
    if new.shape is None or len(old.shape) != len(new.shape):
        return False
    for before, after in zip(old.shape, new.shape, strict=True):
        if isinstance(before, int):
            if before != after:
                return False
        elif isinstance(after, int) and not (before is None and is_output):
            return False
    return True
