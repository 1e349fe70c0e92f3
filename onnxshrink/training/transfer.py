"""Transfer between tensors inside of a student and of its teacher.

A tensor of the student is to predict one of the teacher (Romero et al., FitNets: Hints
for Thin Deep Nets, ICLR 2015, section 2.2). Where it is what the teacher's tensor was
but for channels that were removed, the others are compared. Where widths differ in
another way, a map is learned between them, and thrown away afterwards. Maps of where
the energy lies can be compared instead (Zagoruyko and Komodakis, Paying More Attention
to Attention, ICLR 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from onnxshrink.errors import UsageError, nearest
from onnxshrink.lineage import Origin
from onnxshrink.model import Model, Variable
from onnxshrink.training.gradients import GradContext, Tensor
from onnxshrink.training.losses import attention, cosine, mse

__all__ = ["AUTO", "Link", "Pair", "blocks", "link", "pairs"]

Array = np.ndarray[Any, Any]
Kind = Literal["mse", "cosine", "attention"]

AUTO = "auto"
_BLOCKS = 4
"""How many values ``blocks`` chooses at most."""
_ACTIVATIONS = frozenset(
    {
        "Clip",
        "Elu",
        "Gelu",
        "HardSwish",
        "LayerNormalization",
        "LeakyRelu",
        "Mish",
        "PRelu",
        "Relu",
        "Selu",
        "Tanh",
    }
)


# --- what is compared -------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two values that are to be alike.

    Attributes:
        student: Name of a value of the model.
        teacher: Name of a value of the teacher.
        kind: How they are compared.
        weight: What that is multiplied with in the loss.
        origin: What the model's value was, if that is the teacher's value: of a model
            that lost channels, the channels that are left are compared.
    """

    student: str
    teacher: str
    kind: Kind = "mse"
    weight: float = 1.0
    origin: Origin | None = None

    def wanted(self, rows: Array) -> Array:
        """Return what the model's value should be, from the teacher's."""
        return rows if self.origin is None else self.origin.take(rows)


def pairs(
    texts: Iterable[str],
    students: Sequence[str],
    teachers: Sequence[str],
    weight: float,
    origins: Mapping[str, Origin] | None = None,
) -> list[Pair]:
    """Read pairs written as ``student:teacher``, ``...:kind`` or ``...:kind:weight``.

    One name alone stands for a value of the model and what that was in the teacher.
    Names may hold colons: the text is cut where both sides are known.

    Args:
        texts: The pairs.
        students: Names of the model's values.
        teachers: Names of the teacher's.
        weight: Weight of those that state none.
        origins: What values of the model were in the teacher.

    Raises:
        UsageError: A pair names no value, or its kind or weight cannot be.
    """
    found = []
    known = dict(origins or {})
    for text in texts:
        words = text.split(":")
        kind, number = "mse", weight
        for length in (2, 1):
            if len(words) > length and words[-length] in get_args(Kind):
                kind = words[-length]
                number = _weight(text, words[-1]) if length == 2 else weight
                words = words[:-length]
                break
        student, teacher = _cut(text, words, students, teachers, known)
        origin = known.get(student)
        if origin is not None and origin.name != teacher:
            origin = None
        found.append(Pair(student, teacher, cast("Kind", kind), number, origin))
    return found


def _weight(text: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"match={text}: a weight is above 0, not {word!r}")
    return number


def _cut(
    text: str,
    words: Sequence[str],
    students: Sequence[str],
    teachers: Sequence[str],
    origins: Mapping[str, Origin],
) -> tuple[str, str]:
    whole = ":".join(words)
    if whole in origins:
        return whole, origins[whole].name
    if whole in students and whole in teachers:
        return whole, whole
    cuts = [(":".join(words[:at]), ":".join(words[at:])) for at in range(1, len(words))]
    for one, two in cuts:
        if one in students and two in teachers:
            return one, two
    one, two = cuts[0] if cuts else (whole, whole)
    for name, known, who in ((one, students, "model"), (two, teachers, "teacher")):
        if name not in known:
            raise UsageError(
                f"match={text}: the {who} has no value {name!r}.{nearest(name, known)}"
            )
    raise AssertionError(text)  # the first cut would have been taken


def blocks(model: Model, shared: Iterable[str]) -> list[str]:
    """Choose values at the ends of blocks, evenly spread, four at most.

    Ends of blocks are sums of two computed values, as residual connections make them;
    in a model without such, outputs of activations and normalisations.

    Args:
        model: The model.
        shared: Names to choose among.
    """
    allowed = set(shared) - {info.name for info in model.outputs}
    sums, others = [], []
    for node in model.graph.nodes:
        name = node.outputs[0].name if node.outputs else ""
        if name not in allowed:
            continue
        if node.op == "Add" and all(
            tensor.inputs and model.constant(tensor) is None for tensor in node.inputs
        ):
            sums.append(name)
        elif node.op in _ACTIVATIONS:
            others.append(name)
    found = sums or others
    count = min(_BLOCKS, len(found))
    return [found[(at + 1) * len(found) // count - 1] for at in range(count)]


# --- how --------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A pair, made concrete for tensors of given shapes.

    Attributes:
        pair: The pair.
        number: Its place among all.
        axis: The axis of channels or features.
        widths: How many the student and the teacher have.
        rank: Number of axes, with that of samples.
        scale: What a squared error is multiplied with: 1 / variance of the teacher.
    """

    pair: Pair
    number: int
    axis: int
    widths: tuple[int, int]
    rank: int
    scale: float

    @property
    def target(self) -> str:
        """Name under which a step is fed with the teacher's tensor."""
        return f"match/{self.number}/teacher"

    @property
    def is_projected(self) -> bool:
        """Whether a map to the teacher's width is learned."""
        return self.pair.kind != "attention" and self.widths[0] != self.widths[1]

    def attach(self, model: Model, seed: int) -> list[str]:
        """Add to a training copy what the loss reads; return weights to be learned.

        The map is linear with a shift, from seeded normal values that keep the
        variance.
        """
        (tensor,) = (
            made
            for node in model.graph.nodes
            for made in node.outputs
            if made.name == self.pair.student
        )
        learned: list[str] = []
        if self.is_projected:
            tensor, learned = self._projected(model, tensor, seed)
        end = Variable(self._end, np.dtype(np.float32))
        model.add_node("Identity", [tensor], outputs=[end])
        model.graph.outputs.append(end)
        return learned

    def _projected(
        self, model: Model, tensor: Tensor, seed: int
    ) -> tuple[Tensor, list[str]]:
        mine, theirs = self.widths
        random = np.random.default_rng((seed, 2, self.number))
        matrix = random.normal(0, mine**-0.5, (mine, theirs)).astype(np.float32)
        shift = np.zeros(theirs, np.float32)
        if self.axis == self.rank - 1:
            weight = model.add_weight(f"{self._end}/projection", matrix)
            added = model.add_weight(f"{self._end}/shift", shift)
            product = model.add_node("MatMul", [tensor, weight]).outputs[0]
            made = model.add_node("Add", [product, added]).outputs[0]
        else:
            kernel = matrix.T.reshape(theirs, mine, *[1] * (self.rank - 2))
            weight = model.add_weight(f"{self._end}/projection", kernel.copy())
            added = model.add_weight(f"{self._end}/shift", shift)
            made = model.add_node("Conv", [tensor, weight, added]).outputs[0]
        return made, [weight.name, added.name]

    @property
    def _end(self) -> str:
        return f"match/{self.number}/student"

    def loss(self, ctx: GradContext, values: Mapping[str, Tensor]) -> Tensor:
        """Append the loss."""
        mine, theirs = values[self._end], values[self.target]
        if self.pair.kind == "attention":
            return attention(ctx, mine, theirs, self.axis)
        if self.pair.kind == "cosine":
            return cosine(ctx, mine, theirs, self.axis)
        return ctx.op("Mul", mse(ctx, mine, theirs), self.scale)


def link(pair: Pair, number: int, mine: Array, theirs: Array) -> Link:
    """Find out how two tensors can be compared.

    Args:
        pair: Their names and how to compare them.
        number: The place of the pair among all.
        mine: The student's values for some samples, the first axis.
        theirs: What the teacher's values say they should be, for the same samples.

    Raises:
        UsageError: They differ in more than the number of channels or features.
    """
    one, two = mine.shape, theirs.shape
    rank = len(one)
    axis = 1 if rank > 3 else rank - 1
    same_rank = rank == len(two)
    differing = [at for at in range(rank) if same_rank and one[at] != two[at]]
    if len(differing) == 1 and differing[0] in (1, rank - 1):
        axis = differing[0]
    elif differing or not same_rank or rank < 2:
        raise UsageError(
            f"{pair.student!r} is {list(one[1:])} for a sample and the teacher's "
            f"{pair.teacher!r} is {list(two[1:])}; only the number of channels or "
            "features may differ"
        )
    if pair.kind == "attention" and rank < 3:
        raise UsageError(
            f"{pair.student!r} is {list(one[1:])} for a sample; maps of attention need "
            "channels and positions"
        )
    if one[axis] != two[axis] and axis != rank - 1 and rank > 5:
        raise UsageError(
            f"{pair.student!r} is {list(one[1:])} for a sample; such a tensor cannot "
            f"be mapped to {two[axis]} channels"
        )
    spread = float(theirs.astype(np.float64).var())
    scale = 1 / spread if spread > 1e-12 else 1.0
    return Link(pair, number, axis, (one[axis], two[axis]), rank, scale)
