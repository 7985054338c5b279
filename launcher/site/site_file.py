"""A site file's text: from what was concluded, with comments; and what a probe learned, added to one that exists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from launcher import __version__
from launcher.errors import UsageError
from launcher.files import write_text
from launcher.preset.search import text_of
from launcher.preset.site import Site
from launcher.site.conclude import Draft

WIDTH = 140

_PLAIN = re.compile(r"\d+[mh]|[A-Za-z/$][A-Za-z0-9_./$-]*( [A-Za-z0-9_./$-]+)*")
_WORDS = re.compile(r"true|false|yes|no|on|off|null|y|n|[.]nan|[.]inf|0x.*", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")

_GROUPS = (
    ("name", "description", "source", "scheduler"),
    ("runs", "images", "data"),
    ("container", "build"),
    ("gpu_request", "gpu_type", "gpu_typed", "memory", "whole_nodes"),
    ("account", "default_account", "submit_limit"),
    ("default_partition", "partitions"),
    ("qos",),
    ("continuation", "local_disk"),
    ("unknown",),
    ("sources",),
)
"""What stands together, in the order of a reader's questions."""


def site_text(draft: Draft) -> str:
    """The whole file. Errors: AssertionError when the draft is no site, which is a mistake of ours."""
    values = {**draft.values, "unknown": draft.unknown, "sources": draft.sources}
    try:
        Site.model_validate(values)
    except ValidationError as error:
        raise AssertionError(f"site discover made a file that is no site: {error}") from error
    assert set(values) <= {key for group in _GROUPS for key in group}, sorted(values)
    lines = [f"# Made by ftlaunch {__version__} site discover. Yours to change: read what is unknown, below."]
    lines += [f"# {_comment(note)}" for note in draft.notes.get("", [])]
    for group in _GROUPS:
        block: list[str] = []
        for key in group:
            notes = draft.notes.get(key, [])
            if key in values or notes:
                block += [f"# {_comment(note)}" for note in notes]
            if key in values and values[key] not in ([], {}):
                block += _entry(key, values[key], draft.notes)
        lines += ["", *block] if block else []
    return "\n".join(lines) + "\n"


def add_facts(file: Path, base: str, facts: Mapping[tuple[str, ...], Any], source: str) -> None:
    """Write ``facts`` (path of keys → value) into a site file, keeping its comments; a file that is not there extends the site ``base``.

    Errors: UsageError when the file cannot be read, or would be no site afterwards.
    """
    yaml = YAML()
    yaml.width = WIDTH
    tree = yaml.load(text_of(file)) if file.exists() else {"extends": base, "name": file.stem, "source": source}
    if not isinstance(tree, dict):
        raise UsageError("not a mapping: this is no site file", code="not-a-mapping", file=str(file))
    for names, value in facts.items():
        place = tree
        *above, last = names
        for name in above:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    known = [".".join(names) for names in facts]
    tree.setdefault("sources", {}).update(dict.fromkeys(known, source))
    if isinstance(tree.get("unknown"), list):
        tree["unknown"] = [key for key in tree["unknown"] if key not in known]
    out = StringIO()
    yaml.dump(tree, out)
    write_text(file, out.getvalue(), mode=0o644)


def scalar(value: object) -> str:
    """``value`` as YAML 1.2 reads it back, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    text = _UNPRINTABLE.sub("?", str(value))
    return text if _PLAIN.fullmatch(text) and not _WORDS.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def flow(value: object) -> str:
    """``value`` on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(name)}: {flow(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(flow(entry) for entry in value) + "]"
    return scalar(value)


def _entry(key: str, value: object, notes: Mapping[str, list[str]]) -> list[str]:
    """A top-level key; mappings of mappings and long values entry by entry."""
    nested = isinstance(value, Mapping) and (key in ("partitions", "sources", "qos") or len(flow(value)) > WIDTH - 20)
    if nested:
        assert isinstance(value, Mapping)
        lines = [f"{key}:"]
        for name, entry in value.items():
            lines += [f"  # {_comment(note)}" for note in notes.get(f"{key}.{name}", [])]
            short = f"  {scalar(name)}: {flow(entry)}"
            if len(short) <= WIDTH or not isinstance(entry, Mapping):
                lines.append(short)
            else:
                lines += [f"  {scalar(name)}:", *(f"    {scalar(inner)}: {flow(value)}" for inner, value in entry.items())]
        return lines
    if isinstance(value, list) and len(flow(value)) > WIDTH - 20:
        return [f"{key}:", *(f"  - {flow(entry)}" for entry in value)]
    return [f"{key}: {flow(value)}"]


def _comment(text: str) -> str:
    """A comment cannot end its line, whatever a program printed."""
    return _UNPRINTABLE.sub("?", text)
