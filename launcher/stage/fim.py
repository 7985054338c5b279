"""Fill in the middle: a document cut at two places, and its three parts rearranged so that the middle comes last.

prefix, suffix, middle (PSM) and suffix, prefix, middle (SPM) as Bavarian et al. 2022 and StarCoder have them. Splits fall between
characters, so that a middle may begin and end within a word. Runs in the staging process (Python 3.9).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError
from launcher.stage.tokens import Encoder, Tokens


@dataclass(frozen=True)
class Marks:
    prefix: str
    middle: str
    suffix: str
    end: str | None = None
    """What ends the middle; None: EOS."""


MARKS = (
    Marks("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder, StarCoder2
    Marks("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),  # SantaCoder
    Marks("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen2.5-Coder, CodeGemma
    Marks("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"),  # Code Llama
)
"""What models call the three places."""

NUM_MARKS = 3


class Fim:
    def __init__(
        self, encoder: Encoder, eos: int | None, *, rate: float, spm_rate: float, seed: int, room: int | None, split: bool
    ) -> None:
        """``room``: tokens of a sample; None where documents spread over blocks. ``split``: what is longer is several documents.

        Errors: UsageError for a tokenizer without marks.
        """
        self._encoder, self._eos, self._rate, self._spm_rate, self._seed = encoder, eos, rate, spm_rate, seed
        self._room, self._split = room, split
        marks = marks_of(encoder.tokenizer)
        self._prefix, self._middle, self._suffix = (self._id(name) for name in (marks.prefix, marks.middle, marks.suffix))
        self._end = eos if marks.end is None or eos is None else self._id(marks.end)
        if room is not None and room < 2 * (NUM_MARKS + 1):
            raise UsageError(f"{room} is too short for format fim", key="training.sequence_length", hint=f"at least {2 * (NUM_MARKS + 1)}")

    def tokens(self, text: str, name: str) -> Iterator[Tokens]:
        """A document, or the pieces of one that is too long: each rearranged or not by a draw from the seed and its ``name``."""
        pieces, left_out = self._pieces(text)
        for number, piece in enumerate(pieces):
            draw = random.Random(f"{self._seed}-fim-{name}-{number}")
            found = self._rearranged(piece, draw, left_out) if draw.random() < self._rate else None
            if found is not None:
                yield found
            elif self._split:
                yield Tokens(self._encoder.whole([piece])[0], None, self._eos if number == len(pieces) - 1 else None)
            else:
                yield Tokens(self._encoder.whole([text])[0], None, self._eos)  # what is too much is cut later

    def _pieces(self, text: str) -> tuple[list[str], int]:
        """Texts that leave room for marks and end, and how many tokens are not in them."""
        if self._room is None:
            return [text], 0
        ids, offsets = self._encoder.with_offsets(text, "data.format")
        room = self._room - NUM_MARKS - 1
        if len(ids) <= room:
            return [text], 0
        starts = [0, *(offsets[number][0] for number in range(room, len(ids), room))]
        pieces = [piece for first, last in zip(starts, [*starts[1:], len(text)]) if (piece := text[first:last])]
        return (pieces, 0) if self._split else (pieces[:1], len(ids) - room)

    def _rearranged(self, text: str, draw: random.Random, left_out: int) -> Tokens | None:
        """Its end is learned also where the text goes on: the middle is over. None where the parts take more tokens than
        the whole did and too little around the middle can be left out for them.
        """
        first, last = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
        spm = draw.random() < self._spm_rate
        prefix = self._encoder.whole([text[:first]])[0]
        middle, suffix = self._encoder.inside([text[first:last], text[last:]])
        size = len(prefix) + len(middle) + len(suffix)
        over = 0 if self._room is None else max(0, size + NUM_MARKS + 1 - self._room)
        kept = max(0, len(suffix) - over)
        suffix, over_prefix = suffix[:kept], over - (len(suffix) - kept)
        if over_prefix > len(prefix):
            return None
        prefix = prefix[over_prefix:]
        if spm:
            ids = [self._prefix, self._suffix, *suffix, self._middle, *prefix, *middle]
        else:
            ids = [self._prefix, *prefix, self._suffix, *suffix, self._middle, *middle]
        return Tokens(ids, None, self._end, over + left_out)

    def _id(self, name: str) -> int:
        return int(self._encoder.tokenizer.convert_tokens_to_ids(name))


def marks_of(tokenizer: Any) -> Marks:
    """The marks that a tokenizer has. Errors: UsageError naming those that were looked for."""
    known = tokenizer.get_vocab()
    for marks in MARKS:
        if all(name is None or name in known for name in (marks.prefix, marks.middle, marks.suffix, marks.end)):
            return marks
    raise UsageError(
        f"the tokenizer has no tokens for filling in the middle; looked for {', '.join(marks.prefix for marks in MARKS)} and their like",
        key="data.format",
        code="no-fim-tokens",
        hint="a model that was trained with them (StarCoder, SantaCoder, Code Llama, Qwen2.5-Coder), or format: text",
    )
