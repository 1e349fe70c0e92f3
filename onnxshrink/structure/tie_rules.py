"""What each operator ties: positions of its inputs to positions of its outputs.

Tested in tests/structure/test_channels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs

from onnxshrink.model import Node, attribute
from onnxshrink.model.topology import returned_by
from onnxshrink.structure.symbolic import Dims, static
from onnxshrink.structure.tie_sizes import Sizes, fix_sizes_read
from onnxshrink.structure.ties import Role, Rule, Ties, UnknownError

__all__ = [
    "RULES",
    "align",
    "conv",
    "fix_spatial",
    "gemm",
    "input_at",
    "layer_norm",
    "outputs_read",
    "pointwise",
    "product",
    "same",
    "same_axes",
]


def input_at(node: Node, index: int) -> gs.Tensor | None:
    """Return an input, or ``None`` where it is left out."""
    if index < len(node.inputs) and node.inputs[index].name:
        tensor: gs.Tensor = node.inputs[index]
        return tensor
    return None


def outputs_read(node: Node) -> list[gs.Tensor]:
    """Return the outputs that somebody reads; the first in any case."""
    named = [tensor for tensor in node.outputs if tensor.name]
    return named[:1] + [t for t in named[1:] if t.outputs or returned_by(t)]


def pointwise(ties: Ties, node: Node) -> None:
    """Every input is broadcast to every output."""
    for out in outputs_read(node):
        for tensor in node.inputs:
            if tensor.name:
                align(ties, tensor, out)
    role = _POINTWISE_ROLES.get(node.op)
    if role is None:
        return
    for tensor in node.inputs:
        for axis in range(len(ties.shape(tensor))):
            ties.use(node, tensor, axis, role)


def align(ties: Ties, tensor: gs.Tensor, out: gs.Tensor) -> None:
    """Tie the axes of an operand to those of the result, counted from the right."""
    rank, whole = len(ties.shape(tensor)), len(ties.shape(out))
    if rank > whole:
        raise UnknownError(f"broadcasts {tensor.name!r} in a way that is not known")
    for axis in range(rank):
        ties.tie(tensor, axis, out, whole - rank + axis)


def same(ties: Ties, node: Node) -> None:
    """The first input keeps its shape; further inputs are settings."""
    x = node.inputs[0]
    for out in outputs_read(node):
        same_axes(ties, x, out, range(len(ties.shape(x))))
    for tensor in node.inputs[1:]:
        ties.fix(tensor, f"{node.op} takes it as a setting")


def same_axes(ties: Ties, x: gs.Tensor, y: gs.Tensor, axes: Iterable[int]) -> None:
    """Tie axes one to one; the ranks have to be equal."""
    if len(ties.shape(x)) != len(ties.shape(y)):
        raise UnknownError("changes the rank in a way that is not known")
    for axis in axes:
        ties.tie(x, axis, y, axis)


def fix_spatial(ties: Ties, node: Node, *tensors: gs.Tensor) -> None:
    """Fix all axes behind the first two."""
    for tensor in tensors:
        axes = range(2, len(ties.shape(tensor)))
        if axes:
            ties.fix(tensor, f"{node.op} moves along it", *axes)


def conv(ties: Ties, node: Node) -> None:
    """Channels of Conv and ConvTranspose, whole groups or those inside of groups."""
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    is_transposed = node.op == "ConvTranspose"
    group = int(attribute(node, "group", 1))
    into, out = (0, 1) if is_transposed else (1, 0)
    sizes = ties.sizes(x)[1], ties.sizes(y)[1]
    if len(ties.shape(x)) < 3 or None in sizes or None in ties.sizes(w):
        raise UnknownError("has channels whose number is unknown")
    ties.tie(x, 0, y, 0)
    fix_spatial(ties, node, x, y, w)
    bias = input_at(node, 2)
    if bias is not None:
        ties.tie(bias, 0, y, 1)
        ties.use(node, bias, 0, "shift")
    if group == 1:
        ties.tie(x, 1, w, into)
        ties.tie(w, out, y, 1)
        ties.use(node, w, into, "consumer")
        ties.use(node, w, out, "producer")
        return
    inputs, outputs = sizes
    if group < 1 or not inputs or not outputs or inputs % group or outputs % group:
        raise UnknownError("has groups that do not divide its channels")
    each, makes = inputs // group, outputs // group
    before, after, rows = ties.axis(x, 1), ties.axis(y, 1), ties.axis(w, 1)
    assert before is not None
    assert after is not None
    assert rows is not None
    if is_transposed:
        ties.tie(x, 1, w, 0)
    else:
        ties.tie(w, 0, y, 1)
    whole = ties.extra(group)
    why = f"{node.op} has {group} groups of it"
    if makes == 1 or each == 1:
        # Whole groups go: their inputs, outputs and rows of the weight.
        ties.fix(w, why, 1)
        ties.use(node, w, 0, "filter")
        ties.join(ties.positions(before), np.repeat(ties.positions(whole), each))
        ties.join(ties.positions(after), np.repeat(ties.positions(whole), makes))
    else:
        # Whole groups, or the same channels of each group.
        ties.has_choice = True
        ties.use(node, w, 0, "consumer" if is_transposed else "producer")
        ties.use(node, w, 1, "producer" if is_transposed else "consumer")
        inside, made = ties.extra(each), ties.extra(makes)
        ties.merge(before, (whole, inside), why)
        ties.merge(after, (whole, made), why)
        other = made if is_transposed else inside
        ties.join(ties.positions(rows), ties.positions(other))

    def edit(size: Callable[[int], int]) -> None:
        if size(whole) != group:
            node.attrs["group"] = size(whole)

    ties.edits.append(edit)


def _batch_norm(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    if len(outputs_read(node)) > 1 or attribute(node, "training_mode", 0):
        raise UnknownError("is in training mode")
    if len(ties.shape(x)) < 2:
        raise UnknownError("has no channels")
    same_axes(ties, x, y, range(len(ties.shape(x))))
    roles: tuple[Role, ...] = ("scale", "shift", "shift", "variance")
    for tensor, role in zip(node.inputs[1:], roles, strict=False):
        ties.tie(tensor, 0, y, 1)
        ties.use(node, tensor, 0, role)


def _group_norm(ties: Ties, node: Node) -> None:
    """Whole groups go; the statistics of the others do not change."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    count = int(attribute(node, "num_groups", 0))
    number, size = ties.axis(x, 1), ties.sizes(x)[1]
    if number is None or not size or count < 1 or size % count:
        raise UnknownError("has channels whose number is unknown")
    same_axes(ties, x, y, range(rank))
    fix_spatial(ties, node, x)
    whole = ties.extra(count)
    ties.join(ties.positions(number), np.repeat(ties.positions(whole), size // count))
    roles: tuple[Role, ...] = ("scale", "shift")
    for tensor, role in zip(node.inputs[1:], roles, strict=False):
        given = ties.axis(tensor, 0)
        if given is None or ties.axes.sizes[given] not in (size, count):
            raise UnknownError("has scales that are not followed")
        # Before opset 21 there is one for each group.
        each = ties.axes.sizes[given] // count
        ties.join(ties.positions(given), np.repeat(ties.positions(whole), each))
        ties.use(node, tensor, 0, role)

    def edit(size: Callable[[int], int]) -> None:
        if size(whole) != count:
            node.attrs["num_groups"] = size(whole)

    ties.edits.append(edit)


def _local_response(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    same_axes(ties, x, y, range(len(ties.shape(x))))
    ties.mix(x, 1, f"{node.op} divides by what neighbours have")


def _recurrent(ties: Ties, node: Node) -> None:
    """Hidden units go, with their rows of all gates."""
    gates = _GATES[node.op]
    x, w, r = node.inputs[0], node.inputs[1], node.inputs[2]
    if attribute(node, "layout", 0):
        raise UnknownError("counts samples first")
    sizes = ties.sizes(r)
    hidden = sizes[2] if len(sizes) == 3 else None
    if hidden is None or sizes[1] != gates * hidden:
        raise UnknownError("has a number of hidden units that is not known")
    units = ties.extra(hidden)

    def tie_units(tensor: gs.Tensor, axis: int, role: Role) -> None:
        number = ties.axis(tensor, axis)
        if number is None or ties.axes.sizes[number] % hidden:
            raise UnknownError("has a number of hidden units that is not known")
        times = ties.axes.sizes[number] // hidden
        ties.join(ties.positions(number), np.tile(ties.positions(units), times))
        ties.use(node, tensor, axis, role)

    ties.tie(x, 2, w, 2)
    ties.use(node, w, 2, "consumer")
    tie_units(w, 1, "producer")
    tie_units(r, 1, "producer")
    tie_units(r, 2, "consumer")
    for index in (3, 5, 6, 7):  # biases, first states, peepholes
        tensor = input_at(node, index)
        if tensor is not None:
            last = len(ties.shape(tensor)) - 1
            tie_units(tensor, last, "scale" if index == 7 else "shift")
    lengths = input_at(node, 4)
    if lengths is not None:
        ties.fix(lengths, f"{node.op} takes it as lengths")
    for tensor in outputs_read(node):
        if not tensor.name:
            continue
        rank = len(ties.shape(tensor))
        number = ties.axis(tensor, rank - 1)
        if number is None or ties.axes.sizes[number] != hidden:
            raise UnknownError("gives states of a size that is not known")
        ties.join(ties.positions(number), ties.positions(units))
        ties.fix(tensor, f"{node.op} moves along it", *range(rank - 1))
    ties.fix(x, f"{node.op} moves along it", 0)

    def edit(size: Callable[[int], int]) -> None:
        if size(units) != hidden:
            node.attrs["hidden_size"] = size(units)

    ties.edits.append(edit)


def _instance_norm(ties: Ties, node: Node) -> None:
    _batch_norm(ties, node)
    fix_spatial(ties, node, node.inputs[0])


def layer_norm(ties: Ties, node: Node) -> None:
    """Scales follow the input, whose channels share a mean and a variance."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    same_axes(ties, x, y, range(rank))
    for tensor in outputs_read(node)[1:]:
        ties.fix(tensor, f"{node.op} gives it out")
    for axis in range(int(attribute(node, "axis", -1)) % rank, rank):
        ties.mix(x, axis, f"{node.op} takes the variance along it")
    roles: tuple[Role, ...] = ("scale", "shift")
    for tensor, role in zip(node.inputs[1:], roles, strict=False):
        if tensor.name:
            align(ties, tensor, y)
            for axis in range(len(ties.shape(tensor))):
                ties.use(node, tensor, axis, role)


def _pool(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    same_axes(ties, x, y, (0, 1))
    fix_spatial(ties, node, x, y)
    for tensor in outputs_read(node)[1:]:
        ties.fix(tensor, f"{node.op} counts positions in it")


def product(
    ties: Ties, node: Node, a: gs.Tensor, b: gs.Tensor, axes: Sequence[int | None]
) -> None:
    """Tie a matrix product's axes.

    Args:
        ties: The ties.
        node: The node, whose first output is the product.
        a: Left operand.
        b: Right operand.
        axes: (row of a, inner of a, inner of b, column of b); ``None`` if there is none
            because the operand is a vector.
    """
    row, left, right, column = axes
    assert left is not None
    assert right is not None
    y = node.outputs[0]
    last = len(ties.shape(y)) - 1
    ties.tie(a, left, b, right)
    if row is not None:
        ties.tie(a, row, y, last if column is None else last - 1)
        ties.use(node, a, row, "producer")
    if column is not None:
        ties.tie(b, column, y, last)
        ties.use(node, b, column, "producer")
    ties.use(node, a, left, "consumer")
    ties.use(node, b, right, "consumer")
    if not ties.is_constant(a) and not ties.is_constant(b):
        ties.mix(a, left, f"{node.op} sums products of two values along it")


def gemm(ties: Ties, node: Node) -> None:
    """A product of two matrices, either transposed, and a bias."""
    a, b = node.inputs[0], node.inputs[1]
    left = 0 if attribute(node, "transA", 0) else 1
    right = 1 if attribute(node, "transB", 0) else 0
    product(ties, node, a, b, (1 - left, left, right, 1 - right))
    bias = input_at(node, 2)
    if bias is not None:
        align(ties, bias, node.outputs[0])
        for axis in range(len(ties.shape(bias))):
            ties.use(node, bias, axis, "shift")


def _matmul(ties: Ties, node: Node) -> None:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ranks = len(ties.shape(a)), len(ties.shape(b))
    if 0 in ranks:
        raise UnknownError("multiplies a scalar")
    row = ranks[0] - 2 if ranks[0] > 1 else None
    column = ranks[1] - 1 if ranks[1] > 1 else None
    right = ranks[1] - 2 if ranks[1] > 1 else 0
    product(ties, node, a, b, (row, ranks[0] - 1, right, column))
    matrix = (row is not None) + (column is not None)
    batch = len(ties.shape(y)) - matrix
    for tensor, rank in zip((a, b), ranks, strict=True):
        for axis in range(rank - 2):
            ties.tie(tensor, axis, y, batch - (rank - 2) + axis)
            ties.use(node, tensor, axis, "producer")


def _einsum(ties: Ties, node: Node) -> None:
    equation = attribute(node, "equation", "")
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    left, arrow, right = text.replace(" ", "").partition("->")
    sides = left.split(",")
    if not arrow or len(sides) != len(node.inputs):
        raise UnknownError("has an equation that is not followed")
    tensors = [*node.inputs, node.outputs[0]]
    labels = [
        _letters(term, len(ties.shape(tensor)))
        for tensor, term in zip(tensors, [*sides, right], strict=True)
    ]
    if any(len(set(names)) < len(names) for names in labels):
        raise UnknownError("has an equation that is not followed")
    terms, kept = labels[:-1], labels[-1]
    places: dict[str, tuple[gs.Tensor, int]] = {
        letter: (node.outputs[0], axis) for axis, letter in enumerate(kept)
    }
    for tensor, term in zip(node.inputs, terms, strict=True):
        for axis, letter in enumerate(term):
            ties.tie(tensor, axis, *places.setdefault(letter, (tensor, axis)))
            role: Role = "producer" if letter in kept else "consumer"
            ties.use(node, tensor, axis, role)
    weighed = {
        letter
        for tensor, term in zip(node.inputs, terms, strict=True)
        if ties.is_constant(tensor)
        for letter in term
    }
    for letter in {name for term in terms for name in term} - set(kept) - weighed:
        ties.mix(*places[letter], "Einsum sums products of two values along it")


def _letters(term: str, rank: int) -> list[str]:
    """Return a name for each axis; those of an ellipsis are counted from the right."""
    before, dots, after = term.partition("...")
    rest = rank - len(before) - len(after)
    if rest < 0 or (rest and not dots):
        raise UnknownError("has an equation that is not followed")
    return [*before, *(f".{number}" for number in range(rest, 0, -1)), *after]


def _transpose(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    order = attribute(node, "perm", None) or list(range(rank))[::-1]
    for axis, source in enumerate(order):
        ties.tie(x, source, y, axis)


def _concat(ties: Ties, node: Node) -> None:
    y = node.outputs[0]
    axis = int(attribute(node, "axis", 1)) % len(ties.shape(y))
    _consecutive(ties, node, [t for t in node.inputs if t.name], y, axis)


def _split(ties: Ties, node: Node) -> None:
    x, parts = node.inputs[0], list(node.outputs)
    axis = int(attribute(node, "axis", 0)) % len(ties.shape(x))
    if any(not part.name for part in parts):
        raise UnknownError("leaves out an output")
    _consecutive(ties, node, parts, x, axis)
    sizes = input_at(node, 1)
    if sizes is not None:
        ties.fix(sizes, "Split takes it as sizes")
    numbers = [ties.axis(part, axis) for part in parts]
    known = [number for number in numbers if number is not None]
    old = [ties.axes.sizes[number] for number in known]

    def edit(size: Callable[[int], int]) -> None:
        new = [size(number) for number in known]
        if new == old:
            return
        node.attrs.pop("num_outputs", None)
        if ties.model.opset < 13:
            node.attrs["split"] = new
            return
        given = ties.model.add_weight(f"{parts[0].name}_sizes", np.array(new, np.int64))
        list_inputs = [node.inputs[0], given]
        node.inputs.clear()
        node.inputs.extend(list_inputs)

    ties.edits.append(edit)


def _consecutive(
    ties: Ties, node: Node, parts: Sequence[gs.Tensor], whole: gs.Tensor, axis: int
) -> None:
    """Tie parts of an axis to the whole, and all other axes one to one."""
    rank = len(ties.shape(whole))
    for part in parts:
        same_axes(ties, part, whole, (a for a in range(rank) if a != axis))
    target = ties.axis(whole, axis)
    sources = [ties.axis(part, axis) for part in parts]
    if target is None or None in sources:
        for tensor in (whole, *parts):
            ties.fix(tensor, f"{node.op} has parts of unknown size", axis)
        return
    start = 0
    positions = ties.positions(target)
    for source in sources:
        assert source is not None
        size = ties.axes.sizes[source]
        ties.join(ties.positions(source), positions[start : start + size])
        start += size


def _gather(ties: Ties, node: Node) -> None:
    data, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rank, more = len(ties.shape(data)), len(ties.shape(indices))
    axis = int(attribute(node, "axis", 0)) % max(rank, 1)
    ties.fix(data, "Gather picks from it by number", axis)
    ties.fix(indices, "Gather takes it as numbers")
    for place in range(more):
        ties.fix(y, "Gather makes it", axis + place)
    for place in range(rank):
        if place != axis:
            ties.tie(data, place, y, place if place < axis else place + more - 1)
            ties.use(node, data, place, "producer")


def _constant_axes(
    ties: Ties, node: Node, index: int, name: str = "axes"
) -> list[int] | None:
    """Return axes from an attribute or a constant input; ``None`` if absent."""
    given = attribute(node, name, None)
    if given is not None:
        return [int(axis) for axis in given]
    tensor = input_at(node, index)
    if tensor is None:
        return None
    ties.fix(tensor, f"{node.op} takes it as a setting")
    found = ties.ints(tensor)
    if found is None or None in found:
        raise UnknownError("computes its settings")
    return [entry for entry in found if entry is not None]


def _reduce(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    given = _constant_axes(ties, node, 1)
    if not given and attribute(node, "noop_with_empty_axes", 0):
        same_axes(ties, x, y, range(rank))
        return
    axes = {axis % rank for axis in given} if given else set(range(rank))
    keeps = bool(attribute(node, "keepdims", 1))
    place = 0
    for axis in range(rank):
        if axis in axes:
            ties.mix(x, axis, f"{node.op} runs along it")
        else:
            ties.tie(x, axis, y, axis if keeps else place)
            place += 1


def _softmax(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    axis = int(attribute(node, "axis", -1 if ties.model.opset >= 13 else 1)) % rank
    same_axes(ties, x, y, range(rank))
    last = rank if ties.model.opset < 13 else axis + 1
    ties.fix(x, f"{node.op} divides by the sum along it", *range(axis, last))


def _pad(ties: Ties, node: Node) -> None:
    """Channels of zeros may be added around those of the input."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    pads = _constant_axes(ties, node, 1, "pads" if ties.model.opset < 11 else "-")
    axes = _constant_axes(ties, node, 3, "-")
    value = input_at(node, 2)
    if value is not None:
        ties.fix(value, "Pad takes it as a setting")
    cut = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    if pads is None or len(pads) != 2 * len(cut):
        raise UnknownError("has pads that are not followed")
    mode = attribute(node, "mode", "constant")
    is_constant = mode in ("constant", b"constant")
    parts: list[tuple[int, int, int]] = []
    for axis in range(rank):
        place = cut.index(axis) if axis in cut else -1
        front, back = (pads[place], pads[place + len(cut)]) if axis in cut else (0, 0)
        if front == back == 0:
            ties.tie(x, axis, y, axis)
            continue
        inner, whole = ties.axis(x, axis), ties.axis(y, axis)
        if inner is None or whole is None or min(front, back) < 0 or not is_constant:
            ties.fix(x, "Pad extends it", axis)
            ties.fix(y, "Pad extends it", axis)
            continue
        positions, size = ties.positions(whole), ties.axes.sizes[inner]
        if len(positions) != front + size + back:
            raise UnknownError("has pads that are not followed")
        ties.join(ties.positions(inner), positions[front : front + size])
        spans = (positions[:front], positions[front + size :])
        for at, span in zip((place, place + len(cut)), spans, strict=True):
            added = ties.extra(len(span))
            ties.join(ties.positions(added), span)
            parts.append((at, added, len(span)))

    def edit(size: Callable[[int], int]) -> None:
        if all(size(number) == old for _, number, old in parts):
            return
        new = list(pads)
        for at, number, _ in parts:
            new[at] = size(number)
        if ties.model.opset < 11:
            node.attrs["pads"] = new
            return
        node.inputs[1] = ties.model.add_weight(
            f"{y.name}_pads", np.array(new, np.int64)
        )

    ties.edits.append(edit)


def _slice(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    for tensor in node.inputs[1:]:
        ties.fix(tensor, "Slice takes it as a setting")
    starts, ends = _bounds(ties, node, 1, "starts"), _bounds(ties, node, 2, "ends")
    axes = _constant_axes(ties, node, 3)
    steps = _constant_axes(ties, node, 4, "steps") or [1] * len(starts)
    cut = [a % rank for a in (range(len(starts)) if axes is None else axes)]
    if not len(starts) == len(ends) == len(cut) == len(steps):
        raise UnknownError("computes its settings")
    for axis in range(rank):
        if axis not in cut:
            ties.tie(x, axis, y, axis)
    parts: list[tuple[int, int, int]] = []
    for place, axis in enumerate(cut):
        whole, part = ties.axis(x, axis), ties.axis(y, axis)
        begin, end = starts[place], ends[place]
        is_known = begin is not None and end is not None
        if whole is None or part is None or steps[place] != 1 or not is_known:
            ties.fix(x, "Slice takes a part of it", axis)
            ties.fix(y, "Slice takes a part of it", axis)
            continue
        size = ties.axes.sizes[whole]
        first, last, _ = slice(begin, end).indices(size)
        taken = ties.positions(whole)[first:last]
        if len(taken) != ties.axes.sizes[part]:
            raise UnknownError("takes a part of a size that is not known")
        ties.join(taken, ties.positions(part))
        # What stays in front of the part, and in it, says where it begins and ends.
        front = ties.extra(first)
        ties.join(ties.positions(front), ties.positions(whole)[:first])
        parts.append((place, front, part))

    def edit(size: Callable[[int], int]) -> None:
        new = [
            (place, size(front), size(front) + size(part))
            for place, front, part in parts
            if size(front) != ties.axes.sizes[front]
            or size(part) != ties.axes.sizes[part]
        ]
        if not new:
            return
        begins, stops = list(starts), list(ends)
        for place, first, last in new:
            begins[place], stops[place] = first, last
        if len(node.inputs) == 1:
            node.attrs["starts"], node.attrs["ends"] = begins, stops
            return
        for index, values in ((1, begins), (2, stops)):
            label = f"{y.name}_{'starts' if index == 1 else 'ends'}"
            if None not in values:
                node.inputs[index] = ties.model.add_weight(
                    label, np.array(values, np.int64)
                )
                continue
            # Only the bounds of other axes are computed.
            sizes = Sizes(index, tuple(values))
            sizes.change(ties, node, {p: values[p] or 0 for p, _, _ in new})

    ties.edits.append(edit)


def _bounds(ties: Ties, node: Node, index: int, name: str) -> list[int | None]:
    """Return where a Slice begins or ends, ``None`` where that is computed."""
    given = attribute(node, name, None)
    if given is not None:
        return [int(bound) for bound in given]
    tensor = node.inputs[index]
    found = ties.ints(tensor)
    if found is not None:
        return found
    size = ties.facts.shape(tensor)
    if size is None or len(size) != 1 or not isinstance(size[0], int):
        raise UnknownError("computes its settings")
    return [None] * size[0]


def _resize(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    axes = [int(a) % rank for a in attribute(node, "axes", None) or range(rank)]
    before, after = ties.sizes(x), ties.sizes(y)
    for tensor in node.inputs[1:]:
        ties.fix(tensor, "Resize takes it as a setting")
    sizes = None
    if input_at(node, 3) is not None and min(axes) < 2:
        sizes = Sizes.of(ties, node, 3, len(axes))
        if sizes is None:
            raise UnknownError("states sizes")
    stated: list[tuple[int, int]] = []
    for axis in (0, 1):
        entry = axes.index(axis) if axis in axes else -1
        if sizes is None or entry < 0:
            if axis and (before[1] != after[1] or before[1] is None):
                raise UnknownError("may change the number of channels")
            ties.tie(x, axis, y, axis)
            continue
        ties.tie(x, axis, y, axis)
        number = ties.axis(y, axis)
        source = sizes.source(entry)
        if source is not None:
            ties.tie(y, axis, *source)
        elif sizes.number(entry) is not None and number is not None:
            stated.append((entry, number))
        elif axis:
            raise UnknownError("states sizes")
    fix_spatial(ties, node, x, y)
    if sizes is not None:
        ties.edits.append(_restated(ties, node, sizes, stated))


def _restated(
    ties: Ties, node: Node, sizes: Sizes, stated: Sequence[tuple[int, int]]
) -> Callable[[Callable[[int], int]], None]:
    """Return an edit that states new sizes; ``stated`` pairs entries with axes."""

    def edit(size: Callable[[int], int]) -> None:
        changes = {
            entry: size(number)
            for entry, number in stated
            if size(number) != ties.axes.sizes[number]
        }
        if changes:
            sizes.change(ties, node, changes)

    return edit


def _expand(ties: Ties, node: Node) -> None:
    """An axis keeps its size where Expand asks for it, or for size 1.

    Copies may become fewer; a size that is asked for is rewritten.
    """
    x, y = node.inputs[0], node.outputs[0]
    ties.fix(node.inputs[1], "Expand takes it as sizes")
    rank, whole = len(ties.shape(x)), len(ties.shape(y))
    known = static(ties.facts.shape(node.inputs[1])) or (0,)
    sizes = Sizes.of(ties, node, 1, known[0])
    if sizes is None or known[0] > whole:
        raise UnknownError("computes sizes that are not followed")
    inner = ties.sizes(x)
    stated: list[tuple[int, int]] = []
    for axis in range(whole):
        before, entry = axis - whole + rank, axis - whole + len(sizes.entries)
        given = sizes.number(entry) if entry >= 0 else 1
        if before >= 0:
            ties.tie(x, before, y, axis)
        source = sizes.source(entry) if entry >= 0 else None
        if source is not None:
            ties.tie(y, axis, *source)
            continue
        if given == 1 and before >= 0:
            continue
        number = ties.axis(y, axis)
        if given is None and before >= 0 and inner[before] not in (1, None):
            # Whatever it computes, it cannot differ from a size above 1, or is 1.
            ties.fix(y, "Expand computes its size", axis)
        elif given is None or number is None:
            ties.fix(y, "Expand states its size", axis)
        elif given > 1:
            stated.append((entry, number))
    ties.edits.append(_restated(ties, node, sizes, stated))


def _constant_of_shape(ties: Ties, node: Node) -> None:
    """A tensor of one value has channels wherever its sizes are stated."""
    y = node.outputs[0]
    ties.fix(node.inputs[0], "ConstantOfShape takes it as sizes")
    rank = len(ties.shape(y))
    sizes = Sizes.of(ties, node, 0, rank)
    stated: list[tuple[int, int]] = []
    for axis in range(rank):
        number = ties.axis(y, axis)
        source = None if sizes is None else sizes.source(axis)
        if source is not None:
            ties.tie(y, axis, *source)
        elif (
            sizes is not None and sizes.number(axis) is not None and number is not None
        ):
            stated.append((axis, number))
        else:
            ties.fix(y, "ConstantOfShape computes its size", axis)
    if sizes is not None:
        ties.edits.append(_restated(ties, node, sizes, stated))


def _tile(ties: Ties, node: Node) -> None:
    """Each channel is repeated, wherever the repeats stand."""
    x, y = node.inputs[0], node.outputs[0]
    repeats = _constant_axes(ties, node, 1, "-")
    if len(node.inputs) != 2 or repeats is None or len(repeats) != len(ties.shape(x)):
        raise UnknownError("repeats in a way that is not followed")
    for axis, count in enumerate(repeats):
        inner, outer = ties.axis(x, axis), ties.axis(y, axis)
        if inner is None or outer is None or count == 1:
            ties.tie(x, axis, y, axis)
            continue
        positions = np.tile(ties.positions(inner), count)
        if len(positions) != ties.axes.sizes[outer]:
            raise UnknownError("repeats in a way that is not followed")
        ties.join(positions, ties.positions(outer))


def _depth_space(ties: Ties, node: Node) -> None:
    """Blocks of pixels become channels, or channels blocks of pixels."""
    x, y = node.inputs[0], node.outputs[0]
    block = int(attribute(node, "blocksize", 0)) ** 2
    is_split = node.op == "DepthToSpace"
    deep, flat = (x, y) if is_split else (y, x)
    whole, part = ties.axis(deep, 1), ties.axis(flat, 1)
    if whole is None or part is None or not block:
        raise UnknownError("has channels whose number is unknown")
    size = ties.axes.sizes[part]
    if ties.axes.sizes[whole] != block * size:
        raise UnknownError("has channels whose number is unknown")
    ties.tie(x, 0, y, 0)
    fix_spatial(ties, node, x, y)
    inner = attribute(node, "mode", "DCR") in ("CRD", b"CRD") and is_split
    positions = ties.positions(part)
    spread = np.repeat(positions, block) if inner else np.tile(positions, block)
    ties.join(ties.positions(whole), spread)


def _sampled(ties: Ties, node: Node) -> None:
    """GridSample and RoiAlign take values at places; channels stay apart."""
    x, y = node.inputs[0], node.outputs[0]
    if node.op == "GridSample":
        ties.tie(x, 0, y, 0)
    else:
        ties.fix(x, f"{node.op} picks from it by number", 0)
        ties.fix(y, f"{node.op} makes it", 0)
    ties.tie(x, 1, y, 1)
    fix_spatial(ties, node, x, y)
    for tensor in node.inputs[1:]:
        ties.fix(tensor, f"{node.op} takes it as places")


def _ordered(ties: Ties, node: Node) -> None:
    """The order along one axis counts; channels along others stay apart."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    same_axes(ties, x, y, range(rank))
    for tensor in node.inputs[1:]:
        ties.fix(tensor, f"{node.op} takes it as a setting")
    if node.op == "Trilu":
        axes = [rank - 2, rank - 1]
    else:
        axes = [a % rank for a in _constant_axes(ties, node, 1, "-") or range(rank)]
    ties.fix(x, f"{node.op} counts along it", *axes)
    ties.fix(y, f"{node.op} counts along it", *axes)


def _normalised(ties: Ties, node: Node) -> None:
    """MeanVarianceNormalization and LpNormalization, along their axes."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    same_axes(ties, x, y, range(rank))
    axes = attribute(node, "axes", [0, 2, 3])
    if node.op == "LpNormalization":
        axes = [attribute(node, "axis", -1)]
    for axis in axes:
        ties.mix(x, int(axis) % rank, f"{node.op} runs along it")


def _quantize(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    same_axes(ties, x, y, range(rank))
    axis = int(attribute(node, "axis", 1)) % max(rank, 1)
    block = int(attribute(node, "block_size", 0))
    for tensor in node.inputs[1:]:
        if not tensor.name or not ties.shape(tensor):
            continue
        if not block:
            if ties.sizes(tensor) != [1]:
                ties.tie(tensor, 0, y, axis)
            continue
        if len(ties.shape(tensor)) != rank:
            raise UnknownError("has blocks that are not followed")
        for place in range(rank):
            if place != axis:
                ties.tie(tensor, place, y, place)
        # A block has one scale, so that only whole blocks can go.
        given, whole = ties.axis(tensor, axis), ties.axis(y, axis)
        if given is None or whole is None:
            raise UnknownError("has blocks that are not followed")
        blocks = np.arange(ties.axes.sizes[whole]) // block
        if blocks[-1] + 1 != ties.axes.sizes[given]:
            raise UnknownError("has blocks that are not followed")
        ties.join(ties.positions(whole), ties.positions(given)[blocks])


# --- Reshape and its kin --------------------------------------------------------------


def _reshape_kin(ties: Ties, node: Node) -> None:
    """Flatten, Squeeze, Unsqueeze: the new shape follows from the old."""
    for tensor in node.inputs[1:]:
        ties.fix(tensor, f"{node.op} takes it as a setting")
    _regroup(ties, node, node.inputs[0], node.outputs[0])


def _reshape(ties: Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    ties.fix(node.inputs[1], "Reshape takes it as sizes")
    pairs = _regroup(ties, node, x, y)
    sizes = Sizes.of(ties, node, 1, len(ties.shape(y)))
    keeps_zero = not attribute(node, "allowzero", 0)
    stated: list[tuple[int, int]] = []
    for axis, size in enumerate(ties.sizes(y)):
        if size is None or size == 1:
            continue
        entry = None if sizes is None else sizes.number(axis)
        if entry == -1 or (entry == 0 and keeps_zero and (axis, axis) in pairs):
            continue  # Reshape works the size out from the others
        source = None if sizes is None else sizes.source(axis)
        number = ties.axis(y, axis)
        if source is not None:
            ties.tie(y, axis, *source)
        elif entry == size and number is not None:
            stated.append((axis, number))
        else:
            ties.fix(y, f"Reshape ({node.name or y.name}) computes its size", axis)
    if sizes is not None:
        ties.edits.append(_restated(ties, node, sizes, stated))


def _regroup(
    ties: Ties, node: Node, x: gs.Tensor, y: gs.Tensor
) -> set[tuple[int, int]]:
    """Tie the axes that a row-major regrouping keeps, splits or merges.

    Where axes are merged or split, one is followed: see ``Ties._tie_merged``.

    Returns:
        The pairs of axes that are tied one to one.
    """
    before, after = ties.shape(x), ties.shape(y)
    pairs: set[tuple[int, int]] = set()
    i, j = len(before), len(after)
    while (block := _block(before[:i], after[:j])) is not None:
        _tie_block(ties, node, (x, range(block[0], i)), (y, range(block[1], j)), pairs)
        i, j = block
    start = 0
    while start < min(i, j) and before[start] == after[start]:
        ties.tie(x, start, y, start)
        pairs.add((start, start))
        start += 1
    for tensor, end in ((x, i), (y, j)):
        rest = range(start, end)
        if rest:
            ties.fix(tensor, f"{node.op} regroups sizes that are unknown", *rest)
    return pairs


def _block(before: Dims, after: Dims) -> tuple[int, int] | None:
    """Return where the shortest last axes with equally many positions begin.

    Returns:
        The first of those axes in each of the two shapes, or ``None``.
    """
    i, j = len(before) - 1, len(after) - 1
    if i < 0 or j < 0:
        return None
    one, two = before[i], after[j]
    if one == two and one != 0:
        return i, j  # also where the size is a symbol
    while True:
        if not isinstance(one, int) or not isinstance(two, int) or 0 in (one, two):
            return None
        if one == two:
            return i, j
        if one < two:
            i -= 1
            one = one * before[i] if i >= 0 else 0
        else:
            j -= 1
            two = two * after[j] if j >= 0 else 0


def _tie_block(
    ties: Ties,
    node: Node,
    one: tuple[gs.Tensor, range],
    two: tuple[gs.Tensor, range],
    pairs: set[tuple[int, int]],
) -> None:
    (x, before), (y, after) = one, two
    ours = [a for a in before if ties.sizes(x)[a] != 1]
    theirs = [a for a in after if ties.sizes(y)[a] != 1]
    if not ours or not theirs:
        return
    if len(ours) == len(theirs) == 1:
        ties.tie(x, ours[0], y, theirs[0])
        pairs.add((ours[0], theirs[0]))
        return
    why = f"{node.op} merges or splits it with another axis"
    sides = [
        [ties.axis(tensor, axis) for axis in axes]
        for tensor, axes in ((x, ours), (y, theirs))
    ]
    known = [[n for n in side if n is not None] for side in sides]
    cuts = [_cuts([ties.axes.sizes[n] for n in side]) for side in known]
    bounds = sorted({*cuts[0], *cuts[1]})
    if any(after % before for before, after in pairwise(bounds)):
        ties.fix(x, why, *ours)
        ties.fix(y, why, *theirs)
        return
    # Both sides are made of the same factors, the innermost first.
    factors: list[int | None] = [None] * (len(bounds) - 1)
    merged: list[tuple[int, range]] = []
    for side, ends in zip(known, cuts, strict=True):
        for number, (low, high) in zip(reversed(side), pairwise(ends), strict=True):
            span = range(bounds.index(low), bounds.index(high))
            if len(span) > 1:
                merged.append((number, span))
                continue
            other = factors[span[0]]
            if other is not None:
                ties.join(ties.positions(other), ties.positions(number))
            factors[span[0]] = number
    for place, (low, high) in enumerate(pairwise(bounds)):
        if factors[place] is None:
            factors[place] = ties.extra(high // low)
    for number, span in merged:
        parts = [factors[place] for place in reversed(span)]
        ties.merge(number, tuple(p for p in parts if p is not None), why)


def _cuts(sizes: Sequence[int]) -> list[int]:
    """Return how many positions the innermost axes have, from none of them to all."""
    return [int(size) for size in np.cumprod([1, *reversed(sizes)], dtype=object)]


_GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
_SAME = """
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf
    Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not
    Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish
    Tan Tanh ThresholdedRelu
"""
_POINTWISE = """
    Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or
    PRelu Pow Sub Sum Where Xor
"""
_POINTWISE_ROLES: dict[str, Role] = {"Add": "shift", "Mul": "scale", "Sub": "shift"}
"""What a constant operand does."""
_POOLS = """
    AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool
"""
_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceSum ReduceSumSquare
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(_POOLS.split(), _pool),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(["Conv", "ConvTranspose"], conv),
    **dict.fromkeys(["LayerNormalization", "RMSNormalization"], layer_norm),
    **dict.fromkeys(["LogSoftmax", "Softmax"], _softmax),
    **dict.fromkeys(["Resize", "Upsample"], _resize),
    **dict.fromkeys(_GATES, _recurrent),
    **dict.fromkeys(["DequantizeLinear", "QuantizeLinear"], _quantize),
    **dict.fromkeys(["DepthToSpace", "SpaceToDepth"], _depth_space),
    **dict.fromkeys(["GridSample", "RoiAlign"], _sampled),
    **dict.fromkeys(["CumSum", "Trilu"], _ordered),
    **dict.fromkeys(["LpNormalization", "MeanVarianceNormalization"], _normalised),
    **dict.fromkeys(["Flatten", "Squeeze", "Unsqueeze"], _reshape_kin),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": fix_sizes_read,
    "ConstantOfShape": _constant_of_shape,
    "Tile": _tile,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
