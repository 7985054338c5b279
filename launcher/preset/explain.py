"""What a key of a preset means, what it may hold, and where its effective value comes from. All from the schema and from what was read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import UsageError
from launcher.preset.choose import Chosen
from launcher.preset.complaints import rule, shown
from launcher.preset.json_schema import Json, json_schema
from launcher.preset.reading import Loaded
from launcher.preset.schema import Preset
from launcher.preset.tree import Node, plain


@dataclass(frozen=True)
class Said:
    """One place that says a value; the last of several holds."""

    value: Any
    source: str
    """``file:line:column``, ``--set`` or ``command line``."""


@dataclass(frozen=True)
class Explanation:
    key: str
    meaning: str
    type: str
    """What it may hold, in words, with its range or choices."""
    unit: str | None
    """None for what is no number, and for numbers without a unit."""
    default: str
    value: Any
    """The effective one."""
    source: str
    """Where it comes from: a place, an environment variable, the site, ``default``, or ``planned``."""
    said: tuple[Said, ...]
    """Every file and option that says it, in the order in which they are laid over each other."""


def explain(key: str, preset: Loaded[Preset], *, chosen: Mapping[str, Chosen], planned: Mapping[str, Any]) -> Explanation:
    """``chosen``: dotted key → what was decided among several places; ``planned``: dotted key → what the planner put in the place of
    a default. Errors: UsageError with the nearest key.
    """
    schema = json_schema("preset")
    entry = _entry(key, schema)
    if entry is None:
        raise UsageError("no such key", code="unknown-key", key=shown(key)[1:-1], hint=_near(key, schema))
    meaning, unit, default = _words(entry)
    value, source = _effective(key, preset, chosen, planned)
    said = tuple(Said(plain(node), str(node.where)) for layer in preset.layers if (node := _at(layer, key)) is not None)
    return Explanation(key, meaning, _type(entry, schema), unit, _default(entry, default, key, schema), value, source, said)


def _entry(key: str, schema: Json) -> Json | None:
    """The schema of ``key``; that of the whole mapping for what stands in a free one (``model.config.hidden_size``)."""
    entry = schema
    for name in key.split("."):
        if any(branch.get("additionalProperties") is True for branch in _branches(entry, schema)):
            return entry
        found = [branch["properties"][name] for branch in _branches(entry, schema) if name in branch.get("properties", {})]
        if not found:
            return None
        entry = found[0]
    return entry


def _branches(entry: Json, schema: Json) -> list[Json]:
    """The choices that an entry has, references followed."""
    if "$ref" in entry:
        return _branches(schema["definitions"][entry["$ref"].rpartition("/")[2]], schema)
    choices = entry.get("anyOf") or entry.get("allOf")
    return [found for choice in choices for found in _branches(choice, schema)] if choices else [entry]


def _keys(entry: Json, schema: Json, prefix: str = "") -> list[str]:
    found = []
    for branch in _branches(entry, schema):
        for name, child in branch.get("properties", {}).items():
            found += [f"{prefix}{name}", *_keys(child, schema, f"{prefix}{name}.")]
    return found


def _near(key: str, schema: Json) -> str:
    """Keys of the same last name, else of a near one, else near as a whole."""
    keys, last = dict.fromkeys(_keys(schema, schema)), key.rpartition(".")[2]
    names = difflib.get_close_matches(last, {known.rpartition(".")[2] for known in keys}, 1)
    near = [known for known in keys if known.rpartition(".")[2] in names] or difflib.get_close_matches(key, keys, 3, 0.7)
    return f"did you mean {' or '.join(near)}?" if near else "ftlaunch schema prints them all"


def _words(entry: Json) -> tuple[str, str | None, str | None]:
    """Meaning, unit and what is said of the default: the parts of a docstring."""
    text = " ".join(entry.get("description", "").replace("``", "").split())
    parts = re.fullmatch(r"(.*?)(?: Unit: (.*?)\.)?(?: (No default: .*|Default: .*))?", text)
    assert parts is not None
    default = None if parts[3] is None else parts[3].removeprefix("Default: ").rstrip(".")
    return parts[1], None if parts[2] == "none" else parts[2], default


def _default(entry: Json, said: str | None, key: str, schema: Json) -> str:
    if key in _required(schema["else"]):
        return said or "none: it must be given"
    if "default" not in entry:
        return said or "none"
    if isinstance(entry["default"], dict):
        return "those of its keys"
    return f"{_yaml(entry['default'])} ({said})" if said else _yaml(entry["default"])


def _required(complete: Json, prefix: str = "") -> set[str]:
    keys = {f"{prefix}{name}" for name in complete.get("required", [])}
    return keys.union(*(_required(child, f"{prefix}{name}.") for name, child in complete.get("properties", {}).items()))


def _type(entry: Json, schema: Json) -> str:
    words = [_branch_type(branch) for branch in _branches(entry, schema)]
    return " or ".join(word for word in dict.fromkeys(words) if word)


def _branch_type(branch: Json) -> str:
    if "const" in branch or "enum" in branch:
        return " or ".join(_yaml(value) for value in branch.get("enum", [branch.get("const")]) if value is not None)
    kind = branch.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind in ("integer", "number"):
        limits = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
        ranges = [f"{word} {branch[name]:g}" for name, word in limits.items() if name in branch]
        return " ".join(["a whole number" if kind == "integer" else "a number", " and ".join(ranges)]).strip()
    if kind == "string":
        return rule(branch["pattern"]) if "pattern" in branch else "a text"
    if kind == "object":
        return f"a mapping with {', '.join(branch['properties'])}" if branch.get("properties") else "a mapping"
    return {"boolean": "true or false", "array": "a list", "null": ""}.get(str(kind), "")


def _effective(key: str, preset: Loaded[Preset], chosen: Mapping[str, Chosen], planned: Mapping[str, Any]) -> tuple[Any, str]:
    if key in chosen:
        return chosen[key].value, chosen[key].source
    value: Any = preset.value.model_dump(mode="json")
    names = key.split(".")
    for number, name in enumerate(names):
        if not isinstance(value, dict):
            return None, f"unused: {'.'.join(names[:number])} is {_yaml(value)}"
        value = value.get(name)
    if value in (None, "auto") and planned.get(key) is not None:
        where = f", {preset.provenance[key]} leaves it open" if key in preset.provenance else ""
        return planned[key], f"planned{where}"
    return value, str(preset.provenance[key]) if key in preset.provenance else "default"


def _at(node: Node, key: str) -> Node | None:
    for name in key.split("."):
        if not isinstance(node.value, dict) or name not in node.value:
            return None
        node = node.value[name]
    return node


def _yaml(value: object) -> str:
    """A scalar as one writes it in a preset."""
    return str(value) if isinstance(value, str) else shown(value)
