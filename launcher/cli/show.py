"""How results and findings look: tables on stdout for people, one JSON document for programs, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.errors import Finding, FtlaunchError

STYLES = {"error": "bold red", "warning": "yellow", "advice": "cyan"}

_ASCII = str.maketrans(
    {"×": "x", "–": "-", "─": "-", "…": "...", "→": "->", "≤": "<=", "·": ".", "\N{NO-BREAK SPACE}": " "},
)


def out() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)


def progress() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def is_unicode(console: Console) -> bool:
    return console.encoding.lower().replace("-", "").startswith("utf")


def drawable(text: str, console: Console) -> str:
    """``text`` in what the terminal can draw, however poor it is."""
    if is_unicode(console):
        return text
    return text.translate(_ASCII).encode(console.encoding, "replace").decode(console.encoding)


def say(text: str) -> None:
    """One line of progress."""
    console = progress()
    console.print(drawable(text, console), markup=False)


def show_json(value: Any) -> None:
    show_text(json.dumps(value, indent=2) + "\n")


def show_text(text: str) -> None:
    """A file's text, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    console = console or progress()
    for finding in findings:
        console.print(Text.assemble((finding.level, STYLES[finding.level]), drawable(f" {finding}", console)))


def show_error(error: FtlaunchError, *, as_json: bool) -> None:
    if as_json:
        show_json({"ok": False, "findings": [finding.to_json() for finding in error.findings]})
    show_findings(error.findings)


def show_plan(summary: Mapping[str, Any]) -> None:
    """Facts by name, one a line."""
    console = out()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in summary.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {number}" for name, number in value.items() if not isinstance(number, Mapping))
        elif isinstance(value, list):
            value = "/".join(map(str, value))
        table.add_row(Text(key.replace("_", " "), style="dim"), _cell(value, console))
    console.print(table)


def show_rows(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    console = out()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header[:-1]:
        table.add_column(drawable(name, console), no_wrap=True)
    table.add_column(drawable(header[-1], console))
    for row in rows:
        table.add_row(*(_cell(value, console) for value in row))
    console.print(table)


def show_files(files: Mapping[str, str], as_json: bool) -> None:
    """Rendered files, name → text."""
    if as_json:
        show_json({"ok": True, "files": dict(files)})
        return
    for name, text in files.items():
        out().rule(name)
        show_text(text)


def _cell(value: object, console: Console) -> Text:
    return Text(drawable("–" if value is None else str(value), console))
