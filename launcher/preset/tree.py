"""YAML text → a tree that knows where every value was written, and how two trees are laid over each other. Not what the values mean.

The syntax is read by ruamel.yaml; plain scalars follow the core schema of YAML 1.2: ``1e-5`` and ``0x10`` are numbers, ``no`` and
``24:00:00`` are text. Anchors, aliases, tags and duplicate keys are refused, since they say one thing to a person and another to a reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from launcher.errors import Finding

MAX_DEPTH = 32

Scalar: TypeAlias = "str | int | float | bool | None"


@dataclass(frozen=True)
class Where:
    """A place in a file, or ``--set`` or ``command line`` without a line. Lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


@dataclass(frozen=True)
class Node:
    value: Scalar | dict[str, Node] | list[Node]
    where: Where
    """For an entry of a mapping: the place of its key."""
    raw: str | None = None
    """A scalar as it was typed: ``3.10`` where the value is 3.1."""


Key: TypeAlias = tuple[str, ...]

ALTERNATIVES: Mapping[Key, Mapping[str, tuple[str, ...]]] = {
    ("model",): {"name": ("revision",), "path": (), "config": ("tokenizer",)},
    ("data",): {"name": ("revision", "subset"), "path": ("glob",), "sources": ()},
}
"""Sources of which a preset has exactly one, each with the keys that belong to it alone."""

KINDS = ("kind", "model_type")
"""Keys that say what a mapping is: another kind replaces the whole mapping."""

FREE: Key = ("model", "config")
"""Below this key null is a value of its own (transformers' configs use it)."""


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
"""What YAML does not allow in a file."""


def parse(text: str, file: str, findings: list[Finding]) -> Node | None:
    """The tree of the one document in ``text``; None when it is no YAML. Whatever is wrong is added to ``findings``."""

    def refuse(message: str, line: int | None, column: int | None, hint: str | None = None) -> None:
        findings.append(Finding("error", "yaml", message, file, line, hint=hint, column=column))

    try:
        events, second = _events(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        refuse(f"not YAML: {error.problem or error.context}", *((mark.line + 1, mark.column + 1) if mark else (None, None)))
        return None
    except YAMLError as error:  # a character that YAML does not allow
        found = _CONTROL.search(text)
        if found is None:
            refuse(f"not YAML: {type(error).__name__}", None, None)
        else:
            before = text[: found.start()]
            refuse(f"not YAML: character U+{ord(found[0]):04X}", before.count("\n") + 1, found.start() - (before.rfind("\n") + 1) + 1)
        return None
    except _TooDeep as error:
        refuse(f"nested deeper than {MAX_DEPTH} levels", error.line, error.column)
        return None
    if second is not None:
        refuse("more than one document", second.line + 1, second.column + 1, "remove the second ---")
        return None
    nodes = iter(events)
    first = next(nodes, None)
    return None if first is None else _Builder(file, findings, nodes).build(first, (), Where(file, 1, 1))


class _TooDeep(Exception):
    def __init__(self, mark: Any) -> None:
        self.line, self.column = mark.line + 1, mark.column + 1


def _events(text: str) -> tuple[list[Any], Any]:
    """The events that make nodes, and where a second document begins. Errors: _TooDeep before the reader slows down on it."""
    events: list[Any] = []
    documents, depth = [], 0
    for event in YAML(typ="safe", pure=True).parse(StringIO(text)):
        if isinstance(event, DocumentStartEvent):
            documents.append(event.start_mark)
        elif isinstance(event, (ScalarEvent, AliasEvent)):
            events.append(event)
        elif isinstance(event, (MappingStartEvent, SequenceStartEvent)):
            depth += 1
            if depth > MAX_DEPTH:
                raise _TooDeep(event.start_mark)
            events.append(event)
        elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            depth -= 1
            events.append(event)
    return events, documents[1] if len(documents) > 1 else None


class _Builder:
    def __init__(self, file: str, findings: list[Finding], events: Iterator[Any]) -> None:
        self._file, self._findings, self._events = file, findings, events

    def build(self, event: Any, key: Key, where: Where) -> Node:
        """The node that begins with ``event``; ``where`` is the place of its key."""
        if isinstance(event, AliasEvent):
            self._complain("alias", "an alias (*)", where, key, "write the value out, or use extends")
            return Node(None, where)
        if event.anchor is not None:
            self._complain("alias", f"an anchor (&{event.anchor})", where, key, "write the value out where it is needed")
        if event.tag not in (None, "!"):
            self._complain("tag", f"a tag ({str(event.tag).replace('tag:yaml.org,2002:', '!!')})", where, key, "leave it out")
        if isinstance(event, ScalarEvent):
            plain = event.style is None and event.implicit[0]
            return Node(self._plain(event.value, where, key) if plain else event.value, where, event.value)
        if isinstance(event, SequenceStartEvent):
            items: list[Node] = []
            for item in iter(self._next, None):
                items.append(self.build(item, (*key, str(len(items))), self._place(item)))
            return Node(items, where)
        entries: dict[str, Node] = {}
        for name in iter(self._next, None):
            at = self._place(name)
            if not isinstance(name, ScalarEvent):
                rule, hint = "a key must be a text, not a mapping, a list or an alias", "in quotes when it is a value with braces"
                self._complain("key-type", rule, at, key, hint)
                self._skip(name)
                self._skip(next(self._events))
                continue
            value = next(self._events)
            if name.value == "<<" and name.style is None:
                self._complain("merge-key", "a merge key (<<), which YAML 1.2 is without", at, key, "write the values out, or use extends")
                self._skip(value)
                continue
            node = self.build(value, (*key, name.value), at)
            if name.value in entries:
                first = entries[name.value].where.line
                self._complain("duplicate-key", f"written twice, first in line {first}", at, (*key, name.value), "keep one of them")
            else:
                entries[name.value] = node
        return Node(entries, where)

    def _place(self, event: Any) -> Where:
        return Where(self._file, event.start_mark.line + 1, event.start_mark.column + 1)

    def _next(self) -> Any:
        event = next(self._events)
        return None if isinstance(event, (MappingEndEvent, SequenceEndEvent)) else event

    def _skip(self, event: Any) -> None:
        depth = 0
        while True:
            depth += isinstance(event, (MappingStartEvent, SequenceStartEvent))
            depth -= isinstance(event, (MappingEndEvent, SequenceEndEvent))
            if depth == 0:
                return
            event = next(self._events)

    def _plain(self, text: str, where: Where, key: Key) -> Scalar:
        if text in ("", "~", "null", "Null", "NULL"):
            return None
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text.lower() == "true"
        if re.fullmatch(r"[-+]?(0[0-9_]+|[0-9]+_[0-9_]*)", text):
            digits = text.replace("_", "").lstrip("+").lstrip("0") or "0"
            message = f"{text} is not the same number to every reader"
            self._complain("ambiguous-number", message, where, key, f"write {digits}, or put it in quotes")
            return None
        if re.fullmatch(r"[-+]?[0-9]{1,30}", text):
            return int(text)
        if re.fullmatch(r"0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30}", text):
            return int(text, 0)
        if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
            number = float(text)
        elif re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
            number = math.inf
        else:
            return text
        if not math.isfinite(number):
            self._complain("not-finite", f"{text} is not a finite number", where, key)
            return None
        return number

    def _complain(self, code: str, message: str, where: Where, key: Key, hint: str | None = None) -> None:
        name = ".".join(key) or None
        self._findings.append(Finding("error", code, message, where.file, where.line, name, hint, where.column))


def merge(base: Node, over: Node, key: Key = ()) -> Node:
    """``over`` laid over ``base``: mappings entry by entry, anything else replaces. Neither is changed.

    null takes a key away, so that its default holds. Of exclusive choices the one that ``over`` makes replaces the one in
    ``base``: another source of ``ALTERNATIVES`` takes the other sources and their own keys away, another ``KINDS`` value the mapping.
    """
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    entries = _without_replaced(base.value, over.value, key)
    for name, node in over.value.items():
        if node.value is None and key[: len(FREE)] != FREE:
            entries.pop(name, None)
        else:
            entries[name] = merge(entries[name], node, (*key, name)) if name in entries else node
    return Node(entries, base.where if over.where.line is None else over.where)


def _without_replaced(base: dict[str, Node], over: dict[str, Node], key: Key) -> dict[str, Node]:
    for kind in KINDS:
        if kind in base and kind in over and base[kind].value != over[kind].value:
            return {}
    sources = ALTERNATIVES.get(key, {})
    given = {name for name in sources if name in over and over[name].value is not None}
    gone: set[str] = set()
    for name, companions in sources.items():
        if not given or name not in base:
            continue
        if name not in given:
            gone |= {name, *companions}
        elif not isinstance(base[name].value, dict) and base[name].value != over[name].value:
            gone |= set(companions)
    return {name: node for name, node in base.items() if name not in gone}


def put(node: Node, key: Key, value: Node) -> Node:
    """The tree with ``value`` at ``key``, which exists, and everything else as it is. An entry of a list has its number for a key."""
    if not key:
        return value
    if isinstance(node.value, list):
        number = int(key[0])
        return Node([put(child, key[1:], value) if at == number else child for at, child in enumerate(node.value)], node.where)
    assert isinstance(node.value, dict)
    return Node({**node.value, key[0]: put(node.value[key[0]], key[1:], value)}, node.where)


def without_nulls(node: Node, key: Key = ()) -> Node:
    """The tree without the keys that are null: their defaults hold."""
    if key[: len(FREE)] == FREE:
        return node
    if isinstance(node.value, list):
        return Node([without_nulls(child, key) for child in node.value], node.where)
    if not isinstance(node.value, dict):
        return node
    return Node({name: without_nulls(child, (*key, name)) for name, child in node.value.items() if child.value is not None}, node.where)


def plain(node: Node) -> Any:
    """The values alone."""
    if isinstance(node.value, dict):
        return {name: plain(child) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def places(node: Node, prefix: str = "") -> dict[str, Where]:
    """Dotted key → where it was written, for every mapping, list and value below the root."""
    found: dict[str, Where] = {}
    children = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
    for name, child in children:
        key = f"{prefix}.{name}" if prefix else str(name)
        found[key] = child.where
        found.update(places(child, key))
    return found


def single(key: Key, node: Node) -> Node:
    """A tree with ``node`` at ``key`` and nothing else."""
    for name in reversed(key):
        node = Node({name: node}, node.where)
    return node
