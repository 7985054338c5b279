"""Which documents of which sources are used, in which order: a function of their numbers, the weights and the seed. Reads nothing.

One source: the first documents of a seeded shuffle. Several: whole numbers in proportion to the weights, the largest remainders rounded
up, so that an epoch holds exactly these parts; a source with too few documents gives all of them again and again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from launcher.errors import UsageError


@dataclass(frozen=True)
class Chosen:
    train: list[int]
    """Row numbers in the sources laid end to end; a document may come more than once."""
    held_out: list[int]
    """The same for the evaluation; none of them is in ``train``."""
    parts: list[Part]


@dataclass(frozen=True)
class Part:
    """What one source gives."""

    documents: int
    """That there are."""
    train: int
    held_out: int

    @property
    def passes(self) -> float:
        """How often its documents come in an epoch."""
        return self.train / max(1, self.documents - self.held_out) if self.train > self.documents - self.held_out else 1.0


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``total`` in proportion to the weights: each is its exact part rounded down or up (largest remainders)."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    parts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda number: (parts[number] - quotas[number], number))
    for number in by_remainder[: total - sum(parts)]:
        parts[number] += 1
    return parts


def choose(sizes: Sequence[int], weights: Sequence[float], *, num_samples: int | None, eval_share: float, seed: int) -> Chosen:
    """``sizes``: documents of each source. ``eval_share``: 0 where nothing is held out. Errors: UsageError."""
    if len(sizes) == 1:
        return _of_one(sizes[0], num_samples, eval_share, seed)
    for number, size in enumerate(sizes):
        if size == 0:
            raise UsageError("no document is left of this source", key=f"data.sources.{number}", code="no-samples")
    train, held_out = _numbers(sizes, weights, num_samples, eval_share)
    chosen, evaluated, parts, start = [], [], [], 0
    for number, size in enumerate(sizes):
        if train[number] == 0:
            message = f"{weights[number]:g} gives none of the {sum(train)} training samples"
            raise UsageError(message, key=f"data.sources.{number}.weight", hint="a larger weight, or a larger data.num_samples")
        kept = held_out[number]
        if train[number] + kept > size:  # repeated: then what is held out is a share of what is there
            kept = min(kept, size - 1, max(1, round(size * eval_share)))
        order = list(range(start, start + size))
        random.Random(f"{seed}-source-{number}").shuffle(order)
        pool = order[: size - kept]
        chosen += _again_and_again(pool, train[number], f"{seed}-source-{number}")
        evaluated += order[size - kept :]
        parts.append(Part(size, train[number], kept))
        start += size
    random.Random(f"{seed}-mixture").shuffle(chosen)
    return Chosen(chosen, evaluated, parts)


def _of_one(size: int, num_samples: int | None, eval_share: float, seed: int) -> Chosen:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    order = order[:num_samples]
    num_held_out = max(1, round(len(order) * eval_share)) if eval_share and order else 0
    train = order[: len(order) - num_held_out]
    return Chosen(train, order[len(train) :], [Part(size, len(train), num_held_out)])


def _numbers(sizes: Sequence[int], weights: Sequence[float], num_samples: int | None, eval_share: float) -> tuple[list[int], list[int]]:
    """Training and held-out documents of each source; without ``num_samples`` as many as need no repetition."""

    def parts(total: int) -> tuple[list[int], list[int]]:
        num_held_out = max(1, round(total * eval_share)) if eval_share else 0
        return apportion(total - num_held_out, weights), apportion(num_held_out, weights)

    if num_samples is not None:
        return parts(num_samples)
    exact = [Fraction(str(weight)) for weight in weights]
    total = min(int(size * sum(exact) / weight) for size, weight in zip(sizes, exact))
    while total > 1 and any(a + b > size for a, b, size in zip(*parts(total), sizes)):
        total -= 1  # each of two roundings may be one document too many
    return parts(total)


def _again_and_again(pool: Sequence[int], number: int, seed: str) -> list[int]:
    found: list[int] = []
    while len(found) < number:
        once = list(pool)
        if found:
            random.Random(f"{seed}-pass-{len(found) // len(pool)}").shuffle(once)
        found += once[: number - len(found)]
    return found
