"""Inlining: functions where they are called, branches that are always taken.

Tested in tests/passes/test_fold.py.
"""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError
from onnxshrink.model import MAX_IR_VERSION, Model
from onnxshrink.model.topology import is_onnx, own
from onnxshrink.model.versions import take_over
from onnxshrink.rewriting.rewriter import Rewriter

__all__ = ["inline_branches", "inline_functions"]


def inline_functions(model: Model) -> list[str]:
    """Put the bodies of model-local functions where they are called.

    Returns:
        The names of the functions.

    Raises:
        ModelError: onnx's inliner cannot; the model is left as it was.
    """
    names = [function.name for function in model.graph.functions]
    if not names:
        return []
    hint = "the model's functions cannot be inlined"
    stripped, kept = model._skeleton()
    try:
        inlined = onnx.inliner.inline_local_functions(stripped, convert_version=True)
        onnx.checker.check_model(inlined)
    except (RuntimeError, TypeError, ValueError, onnx.checker.ValidationError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{hint} ({lines[0]})") from error
    if [info.name for info in inlined.graph.output] != [
        tensor.name for tensor in model.graph.outputs
    ]:
        raise ModelError(f"{hint} (its outputs would change)")
    inlined.ir_version = min(max(inlined.ir_version, 4), MAX_IR_VERSION)
    take_over(model, inlined, kept, hint)
    return names


def inline_branches(rewriter: Rewriter) -> int:
    """Put the branch of an If with a constant condition in its place."""
    count = 0
    for node in rewriter.nodes():
        if node.op != "If" or not rewriter.is_live(node) or not is_onnx(node.domain):
            continue
        condition = rewriter.array(node.inputs[0])
        if condition is None or condition.size != 1:
            continue
        taken = "then_branch" if condition.reshape(-1)[0] else "else_branch"
        branch = node.attrs.get(taken)
        if not isinstance(branch, gs.Graph) or not _movable(rewriter, node, branch):
            continue
        _move_out(rewriter, node, branch)
        rewriter.note("branches inlined")
        count += 1
    rewriter.flush()
    return count


def _movable(rewriter: Rewriter, node: gs.Node, branch: gs.Graph) -> bool:
    """Whether what a branch returns can stand where the If's outputs are read."""
    home = rewriter.home[node]
    for mine, theirs in zip(node.outputs, branch.outputs, strict=True):
        if not rewriter.is_result(mine):
            continue
        computed = not isinstance(theirs, gs.Constant) and any(
            rewriter.home.get(source) is branch for source in theirs.inputs
        )
        alone = sum(theirs is other for other in branch.outputs) == 1
        if not computed or not alone or home not in rewriter._results[mine]:
            return False
    return True


def _move_out(rewriter: Rewriter, node: gs.Node, branch: gs.Graph) -> None:
    model, home = rewriter.model, rewriter.home[node]
    taken: set[str] = set()
    for graph in model.graphs():
        if graph is not branch:
            taken.update(graph.initializers)
            taken.update(tensor.name for tensor in graph.inputs)
            taken.update(t.name for other in graph.nodes for t in other.outputs)
    for name, constant in list(branch.initializers.items()):
        if name in taken:
            constant.name = model.fresh(name)
        own(home, constant)
        home.used_at_load |= {constant.name}
    branch.initializers.clear()
    moved = [inner for inner in branch.nodes if rewriter.is_live(inner)]
    for inner in moved:
        for tensor in inner.outputs:
            if tensor.name and tensor.name in taken:
                tensor.name = model.fresh(tensor.name)
        rewriter.home[inner] = home
    rewriter.is_sorted = False
    home.nodes.extend(moved)
    branch.nodes.clear()
    returned = list(branch.outputs)
    for tensor in returned:
        homes = rewriter._results.get(tensor, [])
        if branch in homes:
            homes.remove(branch)
        if not homes:
            rewriter._results.pop(tensor, None)
    branch.outputs.clear()
    for mine, theirs in zip(list(node.outputs), returned, strict=True):
        rewriter.replace(mine, theirs)
    if rewriter.is_live(node):
        rewriter.erase(node)
