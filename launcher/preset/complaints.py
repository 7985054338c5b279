"""What pydantic found wrong → findings with file, line, column, key, rule and what would be right. Knows no file format."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from launcher.errors import Finding
from launcher.preset.fields import DURATION_PATTERN, SIZE_PATTERN
from launcher.preset.secrets import redacted
from launcher.preset.tree import Node

_PATTERNS: Mapping[str, str] = {
    DURATION_PATTERN: "a duration: 48h, 90m, '1-12:00:00'",
    SIZE_PATTERN: "a size: 80GiB, 80GB, 1.5TiB",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": "letters, digits, '.', '_' and '-', first a letter or digit, at most 64",
    r"^[A-Za-z0-9_][A-Za-z0-9@%+=:,./|&*\[\]_-]{0,254}$": "one word: no space, quote, '$', control character, nor '-' at the start",
    r"^[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]*$": "one line without control characters or direction marks",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$": "a repository on the hub: owner/name",
    r"^(epoch|never|[1-9][0-9]*|[1-9][0-9]?(\.[0-9]+)?%|100%)$": "epoch, never, a number of steps such as 50, or a share such as 8%",
    r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(,[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})*$": "a partition, or several with commas between: "
    "letters, digits, '.', '_' and '-', at most 64 each",
    r"^sha256:[0-9a-f]{64}$": "sha256: and 64 hexadecimal digits",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "a name of an environment variable",
    r"^\d+(\.\d+)*$": "a version in quotes, such as '555.42.02'",
    r"^\d+\.\d+$": "a version in quotes, such as '12.5'",
    r"^\d+\.\d$": "a compute capability in quotes, such as '8.0'",
    r"^3\.\d+$": "a Python version in quotes, such as '3.11'",
}
_SCALAR_ERRORS = ("literal_error", "string_type", "string_pattern_mismatch", "int_type", "float_type", "bool_type")
_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
}
_LIMITS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_LIMIT_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def complaints(error: ValidationError, root: Node, schema: type[BaseModel], *, whole: bool = True) -> list[Finding]:
    """One finding for each thing that is wrong in ``root``, in the order of the schema.

    Not ``whole``: keys of ``root`` may be missing that were written somewhere, so nothing is said about what is missing.
    """
    located = [(item, *_locate(root, item["loc"], item["type"])) for item in error.errors(include_url=False)]
    keys = [key for _, key, _ in located]
    findings: list[Finding] = []
    for item, key, node in located:
        mapping = isinstance(node.value, dict)
        others = [other for other, at, _ in located if other is not item and at[: len(key)] == key]
        if not whole and (item["type"] == "missing" or (mapping and item["type"] == "value_error")):
            continue
        # The branches of a choice (a word, a number or a mapping) all complain; only the one that the user meant is of interest.
        if mapping and item["type"] in _SCALAR_ERRORS and others:
            continue
        if not mapping and item["type"] == "model_type" and keys.count(key) > 1:
            continue
        if not mapping and _other_branch_meant(item, node, others):
            continue
        finding = _finding(item, key, node, schema)
        if finding.hint is None and any(other["type"] == "model_type" for other in others):
            finding = replace(finding, hint=f"or a mapping with {', '.join(_fields(schema, key))}")
        elif finding.hint is None and not mapping:
            words = [word for other in others if other["type"] == "literal_error" for word in _expected(other)]
            finding = replace(finding, hint=f"or {' or '.join(words)}" if words else None)
        if item["type"] == "literal_error" and any(other["type"] == "int_type" for other in others):
            finding = replace(finding, message=f"{finding.message} or a whole number")
        if finding not in findings:
            findings.append(finding)
    return findings


def _other_branch_meant(item: Any, node: Node, others: list[Any]) -> bool:
    """Of a word or a number: whether ``item`` complains about the one that was not written."""
    if item["type"] == "literal_error":
        return not isinstance(node.value, str) and any(other["type"] != "literal_error" for other in others)
    return isinstance(node.value, str) and item["type"] != "model_type" and any(other["type"] == "literal_error" for other in others)


def rule(pattern: str) -> str:
    """What a pattern of the schemas allows, in words."""
    return _PATTERNS.get(pattern, pattern)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """``did you mean …?``, or None when nothing is near."""
    close = max(known, key=lambda name: difflib.SequenceMatcher(None, word, name).ratio(), default=None)
    near = close is not None and difflib.SequenceMatcher(None, word, close).ratio() >= 0.6
    return f"did you mean {close}?" if near else None


def shown(value: object, limit: int = 60) -> str:
    """A value as it may stand in a message: on one line, control characters escaped, without secrets, cut."""
    text = {True: "true", False: "false", None: "nothing"}[value] if isinstance(value, bool) or value is None else redacted(repr(value))
    if isinstance(value, (dict, list)):
        text = "a mapping" if isinstance(value, dict) else "a list"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _locate(root: Node, loc: tuple[int | str, ...], kind: str) -> tuple[tuple[str, ...], Node]:
    """The key and the node that pydantic means; the names of branches of a choice in ``loc`` are passed over."""
    node, key = root, []
    for number, item in enumerate(loc):
        child = _child(node, item)
        if child is not None:
            node = child
        elif kind != "missing" or number < len(loc) - 1:
            continue
        key.append(str(item))
    return tuple(key), node


def _child(node: Node, item: int | str) -> Node | None:
    if isinstance(node.value, dict) and isinstance(item, str):
        return node.value.get(item)
    if isinstance(node.value, list) and isinstance(item, int) and item < len(node.value):
        return node.value[item]
    return None


def _finding(item: Any, key: tuple[str, ...], node: Node, schema: type[BaseModel]) -> Finding:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    hint: str | None = None
    if kind == "extra_forbidden":
        known = _fields(schema, item["loc"][:-1])
        code, message = "unknown-key", "unknown key"
        hint = nearest(key[-1], known) or f"known here: {', '.join(known)}"
    elif kind == "missing":
        code, message = "missing-key", "is missing"
    elif kind in ("literal_error", "union_tag_invalid"):
        expected = _expected(item)
        given = value.get("kind") if kind == "union_tag_invalid" else value
        choice = " or ".join(expected) if len(expected) < 3 else f"one of {', '.join(expected)}"
        code, message = "wrong-value", f"{shown(given)} is not {choice}"
        hint = nearest(str(given), expected)
    elif kind in _NEEDED:
        code, message = "wrong-type", f"{_NEEDED[kind]} is needed, not {_described(value, node)}"
        if isinstance(value, str) and kind in ("int_type", "float_type") and re.fullmatch(r"[-+.0-9eE]+", value):
            hint = f"without quotes: {value}"
        elif kind == "string_type" and isinstance(value, (int, float)):
            hint = f"in quotes: '{node.raw or shown(value)}'"
    elif kind == "string_pattern_mismatch":
        code, message = "wrong-value", f"{shown(value)} is not allowed"
        hint = rule(context["pattern"])
    elif kind == "string_too_long":
        code, message = "wrong-value", f"longer than {context['max_length']} characters"
    elif kind in _LIMITS:
        limit = _LIMITS[kind]
        code, message = "wrong-value", f"must be {_LIMIT_WORDS[limit]} {context[limit]:g}, not {_described(value, node)}"
    elif kind == "value_error":
        code, message = "wrong-value", item["msg"].removeprefix("Value error, ")
        word, separator, rest = message.partition(": ")
        if separator and isinstance(node.value, dict) and word in _fields(schema, item["loc"]):  # which key the rule is about
            key, message, node = (*key, word), rest, node.value.get(word, node)
    else:
        code, message = "wrong-value", item["msg"]
    where = node.where
    return Finding("error", code, message, where.file, where.line, ".".join(key) or None, hint, where.column)


def _expected(item: Any) -> list[str]:
    context = item.get("ctx", {})
    return list(re.findall(r"'([^']*)'", context.get("expected", context.get("expected_tags", "")))) or ["false"]


def _described(value: object, node: Node) -> str:
    if isinstance(value, str):
        return f"the text {shown(value)}"
    return node.raw if node.raw and isinstance(value, (int, float)) else shown(value)


def _fields(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the schema knows at ``loc``."""
    models = [schema]
    for item in loc:
        inner = [found for model in models if item in model.model_fields for found in _models(model.model_fields[str(item)].annotation)]
        models = inner or [model for model in models if model.__name__ == item] or models
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
