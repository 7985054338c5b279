"""How long the samples are: the histogram of staged token lengths, and what padding, flattening and attention make of it."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware.compatibility import version
from launcher.plan import Staged
from launcher.preset.schema import Preset
from launcher.preset.stack import Stack

VARLEN_ATTENTION = ("flash2", "flash3", "xformers", "flex")
"""Kernels that take the borders of documents as lengths. eager gets a dense mask over the whole row and computes all of it."""


def by_blocks(preset: Preset, attention: str, stack: Stack | None) -> bool:
    """Whether sdpa goes over the documents of a row one by one, instead of reading a mask; ``stack``: None stands for a current one."""
    old = stack is not None and version(stack.packages.get("transformers", "5"))[0] < 5
    return attention == "sdpa" and preset.data.packing in ("flatten", "documents") and preset.training.compile == "none" and not old


@dataclass(frozen=True)
class Lengths:
    """Token lengths of the samples after cutting; with packing documents those of the documents in the rows."""

    bin_tokens: int
    counts: tuple[int, ...]
    """Number k: those of bin_tokens·k + 1 … bin_tokens·(k + 1) tokens."""
    cut_share: float = 0.0
    """Share of the documents' tokens that was cut at the sequence length."""
    per_sample: float = 1.0
    """Documents of a packed row, on average."""

    @property
    def mean(self) -> float:
        return self._moment(1)

    @property
    def mean_square(self) -> float:
        return self._moment(2)

    def _moment(self, power: int) -> float:
        middle = (self.bin_tokens + 1) / 2
        total = sum(count * (self.bin_tokens * k + middle) ** power for k, count in enumerate(self.counts))
        return total / sum(self.counts)


@dataclass(frozen=True)
class Shape:
    """What a sample is to the GPU."""

    tokens: float
    """Computed per sample, pads included."""
    useful_share: float | None
    """Share of the computed tokens that are the sample's own; None when the lengths are not known and there may be pads."""
    span: float
    """Keys that each query is multiplied with, before a causal kernel halves it."""
    dense_mask: bool
    """A mask of S×S is given, so that no kernel skips what it hides."""


def lengths_of(staged: Staged | None) -> Lengths | None:
    """None without staged data, or where it was staged before lengths were kept."""
    if staged is None or not sum(staged.length_counts):
        return None
    per_sample = sum(staged.length_counts) / staged.train_samples
    return Lengths(staged.length_bin_tokens, tuple(staged.length_counts), staged.cut_share, per_sample)


def shape_of(preset: Preset, attention: str, micro_batch: int, lengths: Lengths | None, stack: Stack | None = None) -> Shape:
    """The computed shape of a sample. Without lengths every sample counts as full. ``stack``: None stands for a current one."""
    packing, full = preset.data.packing, float(preset.training.sequence_length)
    varlen = attention in VARLEN_ATTENTION or by_blocks(preset, attention, stack)
    if packing == "concatenate":
        return Shape(full, 1.0, full, False)
    if packing == "documents":
        if lengths is None:
            return Shape(full, 1.0, full, not varlen)
        within = lengths.mean_square / lengths.mean if varlen else full
        return Shape(full, min(1.0, lengths.mean * lengths.per_sample / full), min(full, within), not varlen)
    if lengths is None:
        if packing == "flatten" and not varlen:
            return Shape(full, 1.0, full * micro_batch, True)
        return Shape(full, 1.0 if packing == "flatten" else None, full, packing == "none" and not varlen)
    mean = min(full, lengths.mean)
    if packing == "none":
        return Shape(full, mean / full, full, mean < 0.99 * full and not varlen)
    own = min(full, lengths.mean_square / lengths.mean)
    if varlen:
        return Shape(mean, 1.0, own, False)
    return Shape(mean, 1.0, own + (micro_batch - 1) * mean, True)  # E[T²]/E[T] of a row of micro_batch samples
