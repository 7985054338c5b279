"""The data order as a function: which samples a step takes, when epochs end, when something is due. No state, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from launcher.plan import rank_slices, total_steps

Indices = np.ndarray[Any, np.dtype[np.int64]]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_samples: int) -> Indices:
    """The order of ``epoch`` (from 1)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


@dataclass(frozen=True)
class Order:
    """One stream: the permutations of epoch 1, 2, 3 … one after the other, cut into steps of ``effective_batch``."""

    seed: int
    num_samples: int
    epochs: float
    effective_batch: int

    @property
    def total_samples(self) -> int:
        return round(self.num_samples * self.epochs)

    @property
    def total_steps(self) -> int:
        return total_steps(self.num_samples, self.epochs, self.effective_batch)

    def samples(self, step: int) -> Indices:
        """Sample indices of ``step`` (from 1) in stream order; the last step takes what is left."""
        return self.stream(*self.span(step))

    def span(self, step: int) -> tuple[int, int]:
        """Where ``step`` begins in the stream, and the position after its last sample."""
        return (step - 1) * self.effective_batch, self._end(step)

    def stream(self, position: int, end: int) -> Indices:
        """Sample indices from ``position`` to before ``end``."""
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            taken = min(end - position, self.num_samples - offset)
            parts.append(permutation(self.seed, epoch + 1, self.num_samples)[offset : offset + taken])
            position += taken
        return np.concatenate(parts)

    def epoch_fraction(self, step: int) -> float:
        """Epochs that were trained when ``step`` is done."""
        return self._end(step) / self.num_samples

    def completed_epoch(self, step: int) -> int | None:
        """The epoch (from 1) that ``step`` is the first to complete; the highest where a step completes several."""
        epoch = self._end(step) // self.num_samples
        return epoch if epoch > self._end(step - 1) // self.num_samples else None

    def is_due(self, every: str, step: int) -> bool:
        """``every`` as presets write it: epoch, never, a number of steps, or a share of all steps (rounded up, as transformers does)."""
        if every == "never":
            return False
        if every == "epoch":
            return self.completed_epoch(step) is not None
        interval = math.ceil(self.total_steps * float(every[:-1]) / 100) if every.endswith("%") else int(every)
        return step % interval == 0

    def _end(self, step: int) -> int:
        return min(step * self.effective_batch, self.total_samples)


def micro_slices(indices: Indices, rank: int, world_size: int, micro_steps: int) -> Sequence[Indices]:
    """The samples of ``rank`` for each micro step of a step: its contiguous share, spread evenly; empty ones are dummies."""
    own = indices[rank_slices(len(indices), world_size)[rank]]
    return [own[part] for part in rank_slices(len(own), micro_steps)]
