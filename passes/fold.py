"""Fold: simplify a model, with its outputs left as they are, before other passes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Pass, Promise
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.rewriting.constants import (
    adopt_constant_nodes,
    file_bytes,
    flush_subnormals,
    fold_constants,
    fold_known_values,
    merge_constants,
    merge_nodes,
    merge_values,
    unfold_uniform,
)
from onnxshrink.rewriting.expansion import expand, is_fused
from onnxshrink.rewriting.inlining import inline_branches, inline_functions
from onnxshrink.rewriting.rewriter import Budget, Rewriter, Rule
from onnxshrink.rewriting.rules_arithmetic import ARITHMETIC, FUSION, OUTPUTS
from onnxshrink.rewriting.rules_layout import LAYOUT
from onnxshrink.rewriting.rules_linear import LINEAR
from onnxshrink.structure.layers import FOLD_HELPS, find

__all__ = ["Fold", "fold_first", "why_fold"]

_ROUNDS = 12
_TRACES = ("pkg.torch.", "namespace")
"""How the keys begin of what PyTorch's exporters note about nodes and values."""


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Compute what is constant and drop what does nothing, so that less is left.

    Constant parts of the graph are computed by onnxruntime, BatchNormalization and
    other arithmetic on channels goes into the weights of Conv, ConvTranspose, Gemm and
    MatMul, Pad into Conv and pools; shapes that are known are written down, equal nodes
    and equal constants become one, and what nothing reads goes. Model-local functions
    are inlined. Weights too small to be normal numbers become zero, which saves time.
    Outputs stay the same up to the rounding of floats.

    Attributes:
        bytes: Share of its bytes that the file may grow to for constants that are
            computed: 1, the default, lets them take what the pass saves elsewhere; 0
            computes only what adds nothing. What does not fit is computed at load.
        fuse: Put one operator in place of several (LayerNormalization, Gelu, Softmax,
            ReduceMean) where the model's opset has it.
        inline: Inline model-local functions and branches that are always taken.
        keep_defaults: Leave inputs that have a default value as inputs; their default
            is not folded then. Before IR version 4 every weight had to be listed as an
            input, so that these lists go all the same.
        keep_traces: Keep what PyTorch's exporter notes about every node (stack traces,
            names of classes and files): nothing reads it when the model runs, and it
            can be half of a small file.
    """

    name: ClassVar[str] = "fold"
    promise: ClassVar[Promise] = Promise.SAME
    example: ClassVar[str] = "fold:bytes=2"
    renamed: ClassVar[Mapping[str, str]] = {
        "limit": "bytes=SHARE, a share of the file's bytes: 1 lets it stay as large"
    }

    bytes: float = 1.0
    fuse: bool = True
    inline: bool = True
    keep_defaults: bool = True
    keep_traces: bool = False

    def __post_init__(self) -> None:
        """Refuse a share that means nothing."""
        if not 0 <= self.bytes < math.inf:
            raise UsageError(f"fold: bytes is a share from 0 on, not {self.bytes}")

    def rules(self) -> tuple[Rule, ...]:
        """Return the table of rewrites, in the order they are tried."""
        sets = [LAYOUT, ARITHMETIC, LINEAR, OUTPUTS]
        if self.fuse:
            sets.append(FUSION)
        return tuple(rule for chosen in sets for rule in chosen.rules)

    def apply(self, model: Model, ctx: Context) -> None:
        """Rewrite the model until there is nothing left to do."""
        size = file_bytes(model)
        if model.ir_version < 4:
            # Until then each initializer had to be listed as an input.
            ctx.did("model", f"IR version {model.ir_version} -> 4")
            model.require_ir(4)
        if not self.keep_defaults:
            frozen = model.freeze_inputs()
            if frozen:
                ctx.did("inputs", f"made constant: {_few(frozen)}")
        if self.inline and model.graph.functions:
            try:
                ctx.did("functions", f"inlined: {_few(inline_functions(model))}")
            except ModelError as error:
                ctx.skipped("functions", str(error))
        if not self.keep_traces:
            traces = sum(model.drop_metadata(prefix) for prefix in _TRACES)
            if traces:
                ctx.did("stack traces of the exporter", f"{traces:,} bytes dropped")
        before = sum(1 for _ in model.nodes())
        unused = model.drop_unused()
        rewriter = Rewriter(model, ctx.skipped)
        adopted = self._rounds(rewriter, Budget(0, is_final=False))
        # What was saved so far, computed constants may take.
        saved = int(size * self.bytes) - file_bytes(model, uniform=False)
        adopted += self._rounds(rewriter, Budget(max(0, saved)))
        merge_constants(rewriter)
        merge_nodes(rewriter)
        rewriter.flush()
        unused += model.drop_unused()
        unfold_uniform(rewriter, file_bytes(model) - int(size * max(1, self.bytes)))
        model._adopt_strays()
        flushed = flush_subnormals(model)
        if flushed:
            ctx.did("subnormal weights", f"{flushed:,} made zero")
        for what, count in rewriter.counts.items():
            ctx.did(what, f"{count} time{'s' if count > 1 else ''}")
        after = sum(1 for _ in model.nodes())
        if unused:
            ctx.did("unused nodes and initializers dropped", f"{unused} of them")
        if adopted:
            ctx.did("Constant nodes made initializers", f"{adopted} of them")
        if after < before:
            ctx.did("nodes", f"{before} -> {after}")

    def _rounds(self, rewriter: Rewriter, budget: Budget) -> int:
        """Rewrite until nothing is left to do; return how many Constant nodes went."""
        rules = self.rules()
        rewriter.budget = budget
        adopted = 0
        for _ in range(_ROUNDS):
            adopted += adopt_constant_nodes(rewriter)
            rewriter.refresh()
            done = fold_known_values(rewriter)
            done += fold_constants(rewriter)
            if self.inline:
                done += inline_branches(rewriter)
            done += merge_values(rewriter)
            done += rewriter.run(rules)
            done += merge_nodes(rewriter)
            if not done:
                break
        return adopted


def _few(names: list[str], most: int = 5) -> str:
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


@dataclass(frozen=True, eq=False)
class _Folded:
    """A folded model, for all attempts of a step; it is never changed.

    Attributes:
        model: The model.
        words: What folding did.
    """

    model: Model
    words: str

    @property
    def nbytes(self) -> int:
        """Bytes that count for the memory of the step: values are shared."""
        return 1024 * sum(1 for _ in self.model.nodes())


def fold_first(model: Model, ctx: Context, *, expands: bool = True) -> str:
    """Fold a model, so that layers stand beside each other; return what that did.

    Args:
        model: The model, changed in place.
        ctx: Of the step, which remembers the folded model.
        expands: Write what onnxruntime's optimizer put together as ONNX operators.
    """

    def fold() -> _Folded:
        folded = model.copy()
        before = sum(1 for _ in folded.nodes())
        apart = 0
        if expands:
            apart = sum(is_fused(node) for node in folded.nodes())
            apart -= len(expand(folded)) if apart else 0
        quiet = dataclasses.replace(ctx, done=[], skips=[])
        Fold().apply(folded, quiet)
        after = sum(1 for _ in folded.nodes())
        words = f"folded first: {before} nodes -> {after}" if after != before else ""
        if apart:
            words += f"{'; ' if words else ''}{apart} of onnxruntime's optimizer apart"
        return _Folded(folded, words)

    names = tuple(str(node.name) for node in model.nodes())
    key = ("folded", fingerprint(model), model.opset, names, expands)
    found = ctx.remember(key, fold)
    model.become(found.model)
    return found.words


def why_fold(model: Model, *, expands: bool) -> str:
    """Say why a pass that wants plain weights and operators should see a folded model.

    Args:
        model: The model.
        expands: Whether the pass wants ONNX operators where onnxruntime's optimizer
            put several together.

    Returns:
        Nothing where folding would bring no layer to light.
    """
    if expands:
        for node in model.nodes():
            if is_fused(node):
                return f"{node.op} {node.name!r} is made of several operators"
    for layer in find(model, fused=True):
        if layer.why_not.endswith(FOLD_HELPS):
            return f"{layer.name}: {layer.why_not.removesuffix(FOLD_HELPS)}"
    return ""
