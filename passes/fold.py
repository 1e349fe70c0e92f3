"""Fold: what every later pass wants done first, with the outputs left as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from onnxshrink._importer import Importer
from onnxshrink._topology import subgraphs_of
from onnxshrink.analysis.constants import (
    Budget,
    adopt_constant_nodes,
    fold_constants,
    fold_known_values,
    merge_constants,
    merge_nodes,
    merge_values,
)
from onnxshrink.analysis.rewriter import Rewriter, Rule
from onnxshrink.analysis.rules_arithmetic import ARITHMETIC, FUSION, OUTPUTS
from onnxshrink.analysis.rules_layout import LAYOUT
from onnxshrink.analysis.rules_linear import LINEAR
from onnxshrink.base import Context, Pass, Promise
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import MAX_IR_VERSION, Model

__all__ = ["Fold"]

_ROUNDS = 12


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Compute what is constant and drop what does nothing, so that less is left.

    Constant parts of the graph are computed by onnxruntime, BatchNormalization and
    other arithmetic on channels goes into the weights of Conv, ConvTranspose, Gemm and
    MatMul, Pad into Conv and pools; shapes that are known are written down, equal nodes
    and equal constants become one, and what nothing reads goes. Model-local functions
    are inlined. Outputs stay the same up to the rounding of floats.

    Attributes:
        limit: Bytes that computed constants may add to the file in all. A tensor of
            one repeated value counts as one value, as storage writes it.
        fuse: Put one operator in place of several (LayerNormalization, Gelu, Softmax,
            ReduceMean) where the model's opset has it.
        inline: Inline model-local functions and branches that are always taken.
        keep_defaults: Leave inputs that have a default value as inputs; their default
            is not folded then.
    """

    name: ClassVar[str] = "fold"
    promise: ClassVar[Promise] = Promise.SAME
    example: ClassVar[str] = "fold:limit=0"

    limit: int = 1 << 20
    fuse: bool = True
    inline: bool = True
    keep_defaults: bool = False

    def __post_init__(self) -> None:
        """Refuse a limit that means nothing."""
        if self.limit < 0:
            raise UsageError(f"fold: limit is a number of bytes, not {self.limit}")

    def rules(self) -> tuple[Rule, ...]:
        """Return the table of rewrites, in the order they are tried."""
        sets = [LAYOUT, ARITHMETIC, LINEAR, OUTPUTS]
        if self.fuse:
            sets.append(FUSION)
        return tuple(rule for chosen in sets for rule in chosen.rules)

    def apply(self, model: Model, ctx: Context) -> None:
        """Rewrite the model until there is nothing left to do."""
        if model.ir_version < 4:
            # Until then each initializer had to be listed as an input.
            model.require_ir(4)
        if not self.keep_defaults:
            frozen = model.freeze_inputs()
            if frozen:
                ctx.did("inputs", f"made constant: {_few(frozen)}")
        if self.inline and model.graph.functions:
            _inline_functions(model, ctx)
        before = sum(1 for _ in model.nodes())
        model.drop_unused()
        rewriter = Rewriter(model, ctx.skipped)
        adopted = adopt_constant_nodes(rewriter)
        budget = Budget(self.limit)
        rules = self.rules()
        for _ in range(_ROUNDS):
            rewriter.refresh()
            done = fold_known_values(rewriter)
            done += fold_constants(rewriter, budget)
            if self.inline:
                done += inline_branches(rewriter)
            done += merge_values(rewriter)
            done += rewriter.run(rules)
            done += merge_nodes(rewriter)
            if not done:
                break
        merge_constants(rewriter)
        merge_nodes(rewriter)
        rewriter.flush()
        model.drop_unused()
        model._adopt_strays()
        for what, count in rewriter.counts.items():
            ctx.did(what, f"{count} time{'s' if count > 1 else ''}")
        after = sum(1 for _ in model.nodes())
        if adopted:
            ctx.did("Constant nodes made initializers", f"{adopted} of them")
        if after < before:
            ctx.did("nodes", f"{before} -> {after}")


def _few(names: list[str], most: int = 5) -> str:
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


# --- functions and branches -------------------------------------------------------


def _inline_functions(model: Model, ctx: Context) -> None:
    """Put the bodies of model-local functions where they are called."""
    stripped, kept = model._skeleton(inputs_only=False)
    names = [f.name for f in model.graph.functions]
    try:
        inlined = onnx.inliner.inline_local_functions(stripped, convert_version=True)
        onnx.checker.check_model(inlined)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        ctx.skipped("functions", f"not inlined: {reason}")
        return
    if [info.name for info in inlined.graph.output] != [
        tensor.name for tensor in model.graph.outputs
    ]:
        ctx.skipped("functions", "not inlined: the outputs would change")
        return
    try:
        graph = Importer(inlined, None, {}).model()
    except ModelError as error:
        ctx.skipped("functions", f"not inlined: {error}")
        return
    for constant, was_input in kept:
        model._put_back(graph, constant, was_input)
    model.graph = graph
    model.ir_version = min(max(inlined.ir_version, 4), MAX_IR_VERSION)
    origin = onnx.ModelProto()
    origin.CopyFrom(model._origin)
    origin.ClearField("graph")
    origin.ClearField("functions")
    del origin.opset_import[:]
    origin.opset_import.extend(inlined.opset_import)
    model._origin = origin
    model._names = None
    ctx.did("functions", f"inlined: {_few(names)}")


def inline_branches(rewriter: Rewriter) -> int:
    """Put the branch of an If with a constant condition in its place."""
    count = 0
    for node in rewriter.nodes():
        if node.op != "If" or not rewriter.is_live(node) or node.domain:
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
        home.initializers[constant.name] = constant
        home.used_at_load |= {constant.name}
    branch.initializers.clear()
    moved = [inner for inner in branch.nodes if rewriter.is_live(inner)]
    for inner in moved:
        for tensor in inner.outputs:
            if tensor.name and tensor.name in taken:
                tensor.name = model.fresh(tensor.name)
        rewriter.home[inner] = home
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


_ = subgraphs_of
