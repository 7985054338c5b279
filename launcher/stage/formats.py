"""What a row of data is, by format: its columns, what is wrong with a row, and the text that is kept of it.

Knows no files and no tokens. Runs in the staging process (Python 3.9; standard library only).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "fim": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
}
"""Format → what its columns are called here; ``data.<name>_column`` says what they are called in the data."""

MASKED = ("prompt_completion", "chat")
"""Formats in which not every token is learned."""

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"

_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
"""JSON can name surrogates one by one; as UTF-8 they cannot be kept."""


@dataclass(frozen=True)
class Place:
    """Where a row stands, for messages."""

    file: str
    line: int | None
    """Of a JSONL file, from 1."""
    row: int
    """From 1."""
    key: str = "data"
    """The preset's key of the source: ``data`` or ``data.sources.N``."""

    def error(self, message: str, column: str | None = None, hint: str | None = None, code: str = "bad-row") -> UsageError:
        """``column``: as ``COLUMNS`` has it. A file without lines has its row in the message."""
        where = "" if self.line is not None else f"row {self.row}: "
        key = self.key if column is None else f"{self.key}.{column}_column"
        return UsageError(f"{where}{message}", file=self.file, line=self.line, key=key, code=code, hint=hint)


def document_of(format: str, values: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> str | None:
    """What is kept of a row: its text, or JSON of its parts; None when it is empty (format text and fim). Errors: UsageError.

    ``values``: of the row, by the names here. ``columns``: the names in the data, for messages.
    """
    document = _KINDS[format](values, columns, place)
    half = None if document is None else _HALF_A_CHARACTER.search(document)
    if half is not None:
        code_point = f"U+{ord(half[0]):04X}"
        raise place.error(f"a text with {code_point}, half of a character", COLUMNS[format][0], "text that can be written as UTF-8")
    return document


def plain_text(format: str, document: str) -> str:
    """The words of a document, for training a tokenizer."""
    if format == "prompt_completion":
        return "".join(json.loads(document))
    if format == "chat":
        return "\n".join(message["content"] for message in json.loads(document)["messages"])
    return document


def _text(values: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> str | None:
    value = values["text"]
    if value is None:
        return None
    if not isinstance(value, str):
        raise place.error(f"{columns['text']} is not text but {_kind(value)}", "text")
    return value if value and not value.isspace() else None


def _prompt_completion(values: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> str:
    for name in ("prompt", "completion"):
        if not isinstance(values[name], str):
            hint = 'a text; "" where there is no prompt' if name == "prompt" else "a text that the model is to answer with"
            raise place.error(f"{columns[name]} is not text but {_kind(values[name])}", name, hint)
    if not values["completion"].strip():
        raise place.error(f"{columns['completion']} is empty: there is nothing to learn", "completion", "a text, or leave the row out")
    return json.dumps([values["prompt"], values["completion"]], ensure_ascii=False)


def _chat(values: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> str:
    messages, column = values["messages"], columns["messages"]
    if isinstance(messages, str):  # some data sets keep the list as JSON
        try:
            messages = json.loads(messages)
        except ValueError:
            raise place.error(f"{column} is a text that is not JSON", "messages", _MESSAGES) from None
    if not isinstance(messages, list) or not messages:
        raise place.error(f"{column} is {'empty' if messages == [] else f'not a list but {_kind(messages)}'}", "messages", _MESSAGES)
    kept = [_message(message, f"{column}[{number}]", place) for number, message in enumerate(messages)]
    if not any(message["role"] == ASSISTANT for message in kept):
        raise place.error(f"{column} has no turn of the assistant: there is nothing to learn", "messages", "add one, or leave the row out")
    where = {"file": place.file, "line": place.line, "row": place.row, "key": place.key}
    return json.dumps({"messages": kept, "place": where}, ensure_ascii=False)


def _message(message: Any, name: str, place: Place) -> dict[str, str]:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        found = f"has {', '.join(map(str, sorted(message))) or 'nothing'}" if isinstance(message, dict) else f"is {_kind(message)}"
        raise place.error(f"{name} {found}: role and content are needed", "messages", _MESSAGES)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise place.error(f"{name}.role is {role!r}", "messages", f"one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise place.error(f"{name}.content is not text but {_kind(content)}", "messages", "only text is trained on")
    if role == ASSISTANT and not content.strip():
        raise place.error(f"{name}.content is empty: the assistant says nothing", "messages", "a text, or leave the row out")
    return {"role": role, "content": content}


_MESSAGES = 'a list such as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'

_KINDS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, str], Place], str | None]] = {
    "text": _text,
    "fim": _text,
    "prompt_completion": _prompt_completion,
    "chat": _chat,
}


def _kind(value: Any) -> str:
    return "nothing (null)" if value is None else type(value).__name__
