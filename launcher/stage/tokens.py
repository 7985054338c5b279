"""From documents to token ids and which of them are learned, for each format. Knows no length but fim's, and no packing.

Runs in the staging process (Python 3.9; transformers).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError

ANCHOR = "☺"
"""A character that hardly any text merges with: what follows it is tokenised as the middle of a text."""


@dataclass(frozen=True)
class Tokens:
    """One document."""

    ids: list[int]
    learned: list[bool] | None = None
    """Whether each is a target; None: all are."""
    end: int | None = None
    """Token to put after it where it is not cut, a target."""
    left_out: int = 0
    """Tokens of the document that are not here."""


class Encoder:
    """A tokenizer as staging uses it: no special tokens of its own, and pieces of a text as they are inside it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._anchor = self.whole([ANCHOR])[0]
        # SentencePiece puts a space before every text; a piece that is no beginning must not get one
        inside = self.whole([f"{ANCHOR}x"])[0][len(self._anchor) :]
        self._spaced = bool(inside) and inside != self.whole(["x"])[0]

    def whole(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return found

    def inside(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts that continue another one."""
        if not self._spaced:
            return self.whole(texts)
        size, found = len(self._anchor), self.whole([ANCHOR + text for text in texts])
        # a text that begins with half of a character (a variation selector) may merge with any; it gets its space
        return [ids[size:] if ids[:size] == self._anchor else self.whole([text])[0] for ids, text in zip(found, texts)]

    def with_offsets(self, text: str, key: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters that each stands for. Errors: UsageError for a tokenizer that cannot tell."""
        if not self.tokenizer.is_fast:
            message = f"{type(self.tokenizer).__name__} cannot say which characters a token stands for"
            raise UsageError(message, key=key, code="slow-tokenizer", hint="a model with tokenizer.json")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        return found["input_ids"], found["offset_mapping"]


class Formats:
    """The documents of a split, in order, as tokens."""

    def __init__(
        self, tokenizer: Any, formats: Iterable[str], *, append_eos: bool, seed: int, fim: Mapping[str, Any], room: int | None
    ) -> None:
        """``fim``: rate, spm_rate and split, as ``fim.Fim`` takes them. ``room``: the sequence length; None where documents are not cut.

        Errors: UsageError when the tokenizer lacks what a format needs.
        """
        from launcher.stage.chat import Chat
        from launcher.stage.fim import Fim

        used = set(formats)
        self.encoder = Encoder(tokenizer)
        self.eos = tokenizer.eos_token_id if append_eos else None
        self._fim = Fim(self.encoder, self.eos, seed=seed, room=room, **fim) if "fim" in used else None
        self._chat = Chat(self.encoder) if "chat" in used else None

    def tokens(self, batches: Iterable[list[tuple[str, str]]], split: str) -> Iterator[Tokens]:
        """``batches``: as ``documents.Split.documents`` gives them. ``split``: train or eval, which draw apart."""
        position = 0
        for batch in batches:
            texts = iter(self.encoder.whole([text for format, text in batch if format == "text"]))
            pairs = iter(self._pairs([json.loads(text) for format, text in batch if format == "prompt_completion"]))
            for format, text in batch:
                if format == "text":
                    yield Tokens(next(texts), None, self.eos)
                elif format == "prompt_completion":
                    yield next(pairs)
                elif format == "chat":
                    assert self._chat is not None
                    yield self._chat.tokens(json.loads(text))
                else:
                    assert self._fim is not None
                    yield from self._fim.tokens(text, f"{split}-{position}")
                position += 1

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Tokens]:
        """Prompt and completion tokenised apart: a generation starts after the prompt's last token, whatever would merge with it."""
        prompts, completions = self.encoder.whole([prompt for prompt, _ in pairs]), self.encoder.inside([text for _, text in pairs])
        starts = self.encoder.whole([text if not prompt else "" for prompt, text in pairs])
        found = []
        for prompt, start, completion in zip(prompts, starts, completions):
            told = completion if prompt else start
            found.append(Tokens([*prompt, *told], [False] * len(prompt) + [True] * len(told), self.eos))
        return found
