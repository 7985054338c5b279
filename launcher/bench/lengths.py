"""The fixed histogram of code lengths that every measurement's samples follow, so that the share of pads is realistic. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import gcd
from pathlib import Path

FILE = Path(__file__).with_name("code_lengths.json")


@dataclass(frozen=True)
class CodeLengths:
    what: str
    """Which files were counted."""
    how: str
    """What a token is."""
    bin_tokens: int
    counts: tuple[int, ...]
    """Number k: files of bin_tokens·k + 1 … bin_tokens·(k + 1) tokens, EOS included."""


def code_lengths() -> CodeLengths:
    """As ``python -m benchmarks.code_lengths`` wrote it."""
    value = json.loads(FILE.read_text(encoding="utf-8"))
    return CodeLengths(value["what"], value["how"], int(value["bin_tokens"]), tuple(map(int, value["counts"])))


def cut_counts(lengths: CodeLengths, sequence_length: int) -> list[int]:
    """The histogram of the samples: what is longer counts as the sequence length."""
    last = (sequence_length - 1) // lengths.bin_tokens
    kept = list(lengths.counts[: last + 1])
    kept += [0] * (last + 1 - len(kept))
    kept[last] += sum(lengths.counts[last + 1 :])
    return kept


def mean_length(lengths: CodeLengths, sequence_length: int) -> float:
    """Tokens of a sample, cut at the sequence length; over that length it is the useful share of padded batches."""
    middle = (lengths.bin_tokens + 1) / 2
    total = sum(count * min(float(sequence_length), lengths.bin_tokens * index + middle) for index, count in enumerate(lengths.counts))
    return total / sum(lengths.counts)


def documents_for(sequence_length: int, rows: int) -> int:
    """So many documents fill ``rows`` rows for sure when they are packed."""
    return int(rows * sequence_length / mean_length(code_lengths(), sequence_length) * 1.1) + 2


def sample_lengths(lengths: CodeLengths, sequence_length: int, steps: int, samples_per_step: int) -> list[list[int]]:
    """Lengths of the samples of each step: the histogram's quantiles, dealt out so that each step gets short and long ones alike.

    No chance in it: every contender and every machine gets the same lengths. At least 2 tokens, since a sample needs a target.
    """
    total, number = sum(lengths.counts), steps * samples_per_step
    found: list[int] = []
    seen, index = 0, 0
    for rank in range(number):
        wanted = (rank + 0.5) / number * total
        while seen + lengths.counts[index] < wanted:
            seen += lengths.counts[index]
            index += 1
        within = (wanted - seen) / lengths.counts[index]
        found.append(min(sequence_length, max(2, lengths.bin_tokens * index + 1 + int(within * lengths.bin_tokens))))
    stride = _stride(samples_per_step)
    # forth and back, so that no step gets the shorter of every turn
    turns = [found[start : start + steps][:: 1 if start // steps % 2 == 0 else -1] for start in range(0, number, steps)]
    dealt = [[turn[step] for turn in turns] for step in range(steps)]  # each step's from short to long, so they are mixed
    return [[row[stride * place % samples_per_step] for place in range(samples_per_step)] for row in dealt]


def _stride(number: int) -> int:
    """About the golden section of ``number``, with no factor in common, so that steps of it visit all and neighbours differ."""
    stride = max(1, round(number * 0.382))
    while gcd(stride, number) != 1:
        stride += 1
    return stride
