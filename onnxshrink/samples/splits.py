"""Splits: disjoint samples, so that what calibrates or trains never measures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxshrink.errors import UsageError
from onnxshrink.samples.random_inputs import MAX_INPUT_BYTES
from onnxshrink.samples.samples import Samples

if TYPE_CHECKING:
    from onnxshrink.model import Model

__all__ = ["Splits"]


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint samples: what calibrates or trains a pass never measures it.

    Attributes:
        calibration: For statistics of activations.
        training: For gradients.
        validation: For choices inside a pass, such as a learning rate.
        evaluation: For the validator only.
        random: Whether all of it is random: then a verdict is a smoke test.
        made_up: Whether what measures is made up, random or synthetic, so that it
            proves nothing.
        how: How the samples were divided, in words.
    """

    calibration: Samples | None = None
    training: Samples | None = None
    validation: Samples | None = None
    evaluation: Samples | None = None
    random: bool = False
    made_up: bool = False
    how: str = ""

    @classmethod
    def build(
        cls,
        model: Model,
        data: Any = None,
        evaluation: Any = None,
        *,
        labels: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        calibration_size: int = 512,
        evaluation_size: int | None = None,
        evaluation_share: float = 0.4,
        shapes: Mapping[str, Sequence[int]] | None = None,
        max_input_bytes: int = MAX_INPUT_BYTES,
        trains: bool = True,
        values: Mapping[str, Sequence[float]] | None = None,
        batch: int | None = None,
    ) -> Splits:
        """Divide data by a seeded permutation.

        Samples given as ``evaluation`` measure, and ``data`` serves the rest. Of
        ``data`` alone, a share is held out to measure. Without either, seeded random
        inputs serve as a smoke test.

        Args:
            model: The model to feed.
            data: What ``Samples.of`` takes, or ``synthetic`` (``synthetic:words``)
                for ``Samples.synthetic_for``.
            evaluation: The same.
            labels: Key of the labels; ``None`` takes ``labels`` if there is such.
            transform: What to do to each item of ``data`` and ``evaluation``, see
                ``Samples.of``.
            seed: Seed of the permutation or of the random inputs.
            calibration_size: Most samples for calibration.
            evaluation_size: Most samples for evaluation; ``None`` takes all.
            evaluation_share: Share of ``data`` held out where ``evaluation`` is not
                given.
            shapes: Shapes of random inputs by name.
            max_input_bytes: Most bytes of one set of random inputs, see
                ``Samples.random_for``.
            trains: Whether anything trains. Otherwise calibration and validation get
                all they can use, and training what is left.
            values: Numbers for inputs by name, beside the data or random inputs.
            batch: Samples in every run of the model; by default what fits.

        Raises:
            UsageError: The data does not fit the model; says what would.
            ModelError: The data cannot be read.
        """
        if calibration_size < 1 or (
            evaluation_size is not None and evaluation_size < 1
        ):
            raise UsageError("the size of a split is at least 1")
        if not 0.0 < evaluation_share < 1.0:
            raise UsageError(
                f"the share held out is between 0 and 1, not {evaluation_share}"
            )
        if data is None and evaluation is None:
            both = Samples.random_for(
                model,
                seed=seed,
                count=12,
                shapes=shapes,
                max_input_bytes=max_input_bytes,
                values=values,
                batch=batch,
            )
            return cls(
                calibration=both.take(slice(0, 8)),
                evaluation=both.take(slice(8, 12)),
                random=True,
                made_up=True,
                how="no data was given: seeded random inputs, a smoke test only",
            )
        if shapes:
            raise UsageError(
                "--shape sets the shapes of random inputs; with --data "
                "they come from the data"
            )
        inputs = model.inputs
        random = np.random.default_rng(seed)
        held: Samples | None = None
        if evaluation is not None:
            held = Samples.of(evaluation, labels, transform).bind(inputs, values)
            how = "evaluation is exactly what was given for it"
            if evaluation_size is not None and len(held) > evaluation_size:
                order = np.sort(random.permutation(len(held))[:evaluation_size])
                held = held.take(order)
                how = f"evaluation is {evaluation_size} of what was given for it"
        pool: Samples | None = None
        synthetic = _synthetic(data)
        if synthetic is not None:
            pool = Samples.synthetic_for(model, synthetic, seed=seed).bind(
                inputs, values
            )
        elif data is not None:
            pool = Samples.of(data, labels, transform).bind(inputs, values)
        if pool is not None:
            pool = pool.take(random.permutation(len(pool)))
        made_up = synthetic is not None and held is None
        if batch is not None:
            held = None if held is None else held.in_batches_of(batch)
            pool = None if pool is None else pool.in_batches_of(batch)
        if pool is not None and held is None:
            unit = pool.batch or 1
            count = max(1, round(len(pool) * evaluation_share / unit)) * unit
            count = min(count, evaluation_size or count, len(pool))
            held, pool = pool.take(slice(0, count)), pool.take(slice(count, None))
            how = (
                f"evaluation is {count} of {count + len(pool)} samples, held out by a "
                f"permutation with seed {seed}"
            )
        if made_up:
            how += "; all are synthetic images, which prove nothing about quality"
        parts = [
            part if part is None else part.grouped()
            for part in (*_divide(pool, calibration_size, trains), held)
        ]
        return cls(
            calibration=parts[0],
            training=parts[1],
            validation=parts[2],
            evaluation=parts[3],
            made_up=made_up,
            how=how,
        )

    def one_by_one(self, why: str) -> Splits:
        """Return the same samples, of which each runs alone.

        Args:
            why: What to say of it.
        """

        def single(samples: Samples | None) -> Samples | None:
            return None if samples is None else samples.in_batches_of(1, why)

        return replace(
            self,
            calibration=single(self.calibration),
            training=single(self.training),
            validation=single(self.validation),
            evaluation=single(self.evaluation),
        )

    @property
    def labelled(self) -> bool:
        """Whether what measures has labels."""
        return self.evaluation is not None and self.evaluation._labels is not None

    def describe(self) -> tuple[str, ...]:
        """Say which samples serve what, and what was adapted, a line each."""
        if self.random:
            given = self.evaluation.notes if self.evaluation is not None else ()
            return (self.how, *given)
        parts = [
            f"{name} {len(samples):,}"
            for name, samples in self._named()
            if samples is not None
        ]
        lines = [f"samples: {', '.join(parts)}; {self.how}"]
        for _, samples in self._named():
            lines += [] if samples is None else [f"data: {n}" for n in samples.notes]
        return tuple(dict.fromkeys(lines))

    def digests(self) -> dict[str, list[str]]:
        """Return for each split the digest of its source, and of which samples."""
        return {
            name: [
                samples.digest,
                hashlib.sha256(samples.positions.tobytes()).hexdigest(),
            ]
            for name, samples in self._named()
            if samples is not None
        }

    def to_json(self) -> dict[str, object]:
        """Return the facts for a report."""
        facts: dict[str, object] = {
            name: None if samples is None else samples.to_json()
            for name, samples in self._named()
        }
        said = {"random": self.random, "made_up": self.made_up, "how": self.how}
        return {**facts, **said}

    def _named(self) -> list[tuple[str, Samples | None]]:
        return [
            ("calibration", self.calibration),
            ("training", self.training),
            ("validation", self.validation),
            ("evaluation", self.evaluation),
        ]


def _synthetic(data: Any) -> str | None:
    """Return the words after ``synthetic``, or ``None`` if the data is something."""
    if not isinstance(data, str):
        return None
    word, _, words = data.partition(":")
    return words if word == "synthetic" and not Path(word).exists() else None


CHOOSING = 16
"""Samples that choices are made on at least, where there are enough."""


def _divide(
    pool: Samples | None, calibration_size: int, trains: bool
) -> tuple[Samples | None, Samples | None, Samples | None]:
    """Divide the samples that passes learn from.

    Where something trains, calibration gets at most half, and a fifth of the rest, at
    most 5,000, is for validation. Where nothing does, validation gets a fifth or, of
    few samples, half up to 16, and calibration the rest; training gets what is more
    than both can use. Sizes are multiples of a fixed batch.
    """
    if pool is None or len(pool) < (pool.batch or 1):
        return None, None, None
    unit = pool.batch or 1
    total = len(pool) // unit
    most, few = max(1, calibration_size // unit), max(1, 5000 // unit)
    if trains:
        first = min(most, -(-total // 2))
        last = min((total - first) // 5, few)
    else:
        least = min(-(-CHOOSING // unit), (total + 3) // 2)
        last = min(max(total // 5, least), few, total - 1)
        first = min(most, total - last)
    rest = total - first
    ends = [first * unit, (total - last) * unit]
    training = pool.take(slice(ends[0], ends[1])) if rest - last else None
    validation = pool.take(slice(ends[1], total * unit)) if last else None
    return pool.take(slice(0, ends[0])), training, validation
