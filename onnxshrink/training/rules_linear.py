"""Gradients of MatMul, Gemm and Einsum.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
import string
from typing import Any

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, given, rule

Grads = list[Any]


def swapped(ctx: GradContext, tensor: Tensor) -> Tensor:
    """Return the tensor with its last two axes exchanged."""
    rank = ctx.rank(tensor)
    return ctx.transpose(tensor, [*range(rank - 2), rank - 1, rank - 2])


def matmul(
    ctx: GradContext,
    a: Tensor,
    b: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Tensor:
    """Return the matrix product of two tensors, either of them transposed first."""
    if ctx.rank(a) == ctx.rank(b) == 2 and (trans_a or trans_b):
        return ctx.op("Gemm", a, b, transA=int(trans_a), transB=int(trans_b))
    # onnxruntime fuses the Transpose into the product.
    left = swapped(ctx, a) if trans_a else a
    right = swapped(ctx, b) if trans_b else b
    return ctx.op("MatMul", left, right)


@rule("MatMul")
def _matmul(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    a, b = node.inputs
    g = grads[0]
    shape_a, shape_b = ctx.shape(a), ctx.shape(b)
    # Vectors become matrices, as the operator itself does.
    if len(shape_a) == 1:
        a = ctx.reshape(a, (1, *shape_a))
        g = ctx.reshape(g, _with_row(ctx, g, len(shape_b)))
    if len(shape_b) == 1:
        b = ctx.reshape(b, (*shape_b, 1))
        g = ctx.reshape(g, (*ctx.shape(g), 1))
    found: Grads = [None, None]
    full_a, full_b = ctx.shape(a), ctx.shape(b)
    if len(full_b) == 2 and len(full_a) > 2:
        # One product of two matrices: all leading axes are rows.
        rows = math.prod(full_a[:-1])
        flat = ctx.reshape(g, (rows, full_b[1]))
        if ctx.wants(0):
            product = ctx.op("Gemm", flat, b, transB=1)
            found[0] = ctx.reshape(product, shape_a)
        if ctx.wants(1):
            left = ctx.reshape(a, (rows, full_a[-1]))
            product = ctx.op("Gemm", left, flat, transA=1)
            found[1] = ctx.reshape(product, shape_b)
        return found
    if ctx.wants(0):
        product = matmul(ctx, g, b, trans_b=True)
        found[0] = ctx.reshape(ctx.reduce_to(product, full_a), shape_a)
    if ctx.wants(1):
        product = matmul(ctx, a, g, trans_a=True)
        found[1] = ctx.reshape(ctx.reduce_to(product, full_b), shape_b)
    return found


def _with_row(ctx: GradContext, g: Tensor, rank: int) -> tuple[int, ...]:
    """Return the shape of the result had the first operand been a matrix of one row."""
    shape = ctx.shape(g)
    return (*shape, 1) if rank == 1 else (*shape[:-1], 1, shape[-1])


@rule("Gemm")
def _gemm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    a, b = node.inputs[:2]
    c = given(node, 2)
    g = grads[0]
    alpha = attribute(node, "alpha", 1.0)
    beta = attribute(node, "beta", 1.0)
    trans_a = bool(attribute(node, "transA", 0))
    trans_b = bool(attribute(node, "transB", 0))

    def product(x: Tensor, y: Tensor, trans_x: bool, trans_y: bool) -> Tensor:
        return ctx.op(
            "Gemm", x, y, alpha=alpha, transA=int(trans_x), transB=int(trans_y)
        )

    found: Grads = [None, None, None]
    if ctx.wants(0):
        found[0] = (
            product(b, g, trans_b, True)
            if trans_a
            else product(g, b, False, not trans_b)
        )
    if ctx.wants(1):
        found[1] = (
            product(g, a, True, trans_a)
            if trans_b
            else product(a, g, not trans_a, False)
        )
    if c is not None and ctx.wants(2):
        total = ctx.reduce_to(g, c)
        found[2] = total if beta == 1.0 else ctx.op("Mul", total, beta)
    return found


@rule("Einsum")
def _einsum(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    terms, result = _terms(ctx, node)
    g = grads[0]
    found: Grads = []
    for index, (tensor, term) in enumerate(zip(node.inputs, terms, strict=True)):
        if not ctx.wants(index):
            found.append(None)
            continue
        if len(set(term)) < len(term):
            raise ctx.refused(node, f"{term!r} takes a diagonal")
        others = [
            (read, other)
            for i, (read, other) in enumerate(zip(node.inputs, terms, strict=True))
            if i != index
        ]
        there = set(result).union(*(other for _, other in others))
        kept = "".join(letter for letter in term if letter in there)
        equation = ",".join([result, *(other for _, other in others)]) + "->" + kept
        reads = [read for read, _ in others]
        made = g
        if equation != f"{result}->{result}":
            made = ctx.op("Einsum", g, *reads, equation=equation)
        # Along what only this operand has, it was summed: one gradient for all.
        shape = ctx.shape(tensor)
        sizes = iter(ctx.shape(made))
        laid = [next(sizes) if letter in there else 1 for letter in term]
        made = ctx.reshape(made, laid)
        full = [
            size if letter not in there else now
            for letter, size, now in zip(term, shape, laid, strict=True)
        ]
        found.append(ctx.reduce_to(ctx.expand(made, full), tensor))
    return found


def _terms(ctx: GradContext, node: Node) -> tuple[list[str], str]:
    """Return the equation with a letter for every axis, ellipses written out."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    used = set(equation)
    free = [c for c in string.ascii_letters if c not in used]
    ranks = [
        ctx.rank(t) - len(term.replace("...", ""))
        for t, term in zip(node.inputs, terms, strict=True)
    ]
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        once = sorted(c for c in set(letters) if letters.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    most = max(
        [r for r, term in zip(ranks, terms, strict=True) if "..." in term], default=0
    )
    if most > len(free):
        raise ctx.refused(node, "it has too many axes")
    middle = "".join(free[:most])
    written = [
        term.replace("...", middle[most - r :] if r else "")
        for term, r in zip(terms, ranks, strict=True)
    ]
    return written, result.replace("...", middle)
