"""Conversations through the tokenizer's own chat template: only what the assistant says is learned.

Where the template marks it ({% generation %}), that is taken; else what a turn adds to the conversation before it, the prompt for a reply
included. The template ends turns itself: no EOS is added.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from launcher.errors import UsageError
from launcher.stage.formats import ASSISTANT, Place
from launcher.stage.tokens import Encoder, Tokens

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat:
    def __init__(self, encoder: Encoder) -> None:
        """Errors: UsageError for a tokenizer without a template, or with one that the installed transformers cannot read."""
        self._encoder, self._tokenizer = encoder, encoder.tokenizer
        template = self._tokenizer.chat_template
        if template is None:
            raise UsageError(
                "the tokenizer has no chat template",
                key="data.format",
                code="no-chat-template",
                hint="an instruct model's tokenizer, chat_template.jinja in the folder of model.path, or format: prompt_completion",
            )
        if not isinstance(template, str):  # several, by name
            template = template.get("default", "") if isinstance(template, dict) else str(template)
        self._marked = _MARK.search(template) is not None
        if self._marked and "return_assistant_tokens_mask" not in inspect.signature(self._tokenizer.apply_chat_template).parameters:
            message = "the chat template marks the assistant's turns, which the installed transformers cannot read"
            raise UsageError(message, key="data.format", code="old-transformers", hint="a stack with transformers 4.43 or newer")

    def tokens(self, document: dict[str, Any]) -> Tokens:
        """``document``: as ``formats.document_of`` keeps it. Errors: UsageError naming the row."""
        messages, place = document["messages"], Place(**document["place"])
        ids, learned = self._of_marks(messages, place) if self._marked else self._of_turns(messages, place)
        if not any(learned[1:]):
            raise place.error("the chat template leaves nothing of the assistant's turns to learn", "messages")
        return Tokens(ids, learned)

    def _of_marks(self, messages: list[dict[str, str]], place: Place) -> tuple[list[int], list[bool]]:
        try:
            found = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        except Exception as error:  # jinja's, raised by the template itself, or a slow tokenizer's ValueError
            raise _refused(error, place) from None
        return list(found["input_ids"]), [bool(flag) for flag in found["assistant_masks"]]

    def _of_turns(self, messages: list[dict[str, str]], place: Place) -> tuple[list[int], list[bool]]:
        whole = self._text(messages, place)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self._text(messages[:number], place, prompt=True)
                after = self._text(messages[: number + 1], place)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise place.error(
                        f"the chat template writes what comes before message {number} differently once it is answered or continued, so"
                        " what the assistant says cannot be told apart",
                        "messages",
                        "a template that marks it with {% generation %}, or one answer in each conversation",
                    )
                spans.append((len(before), len(after)))
        ids, offsets = self._encoder.with_offsets(whole, "data.format")
        return ids, [any(first < end and start < last for first, last in spans) for start, end in offsets]

    def _text(self, messages: list[dict[str, str]], place: Place, *, prompt: bool = False) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # jinja's, raised by the template itself
            raise _refused(error, place) from None


def _refused(error: Exception, place: Place) -> UsageError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return place.error(f"the chat template refuses this conversation: {first}", "messages", "the order of roles that the template wants")
