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


def out() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)


def progress() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """One line of progress."""
    progress().print(text, markup=False)


def show_json(value: Any) -> None:
    show_text(json.dumps(value, indent=2) + "\n")


def show_text(text: str) -> None:
    """A file's text, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    for finding in findings:
        (console or progress()).print(Text.assemble((finding.level, STYLES[finding.level]), f" {finding}"))


def show_error(error: FtlaunchError, *, as_json: bool) -> None:
    if as_json:
        show_json({"ok": False, "findings": [finding.to_json() for finding in error.findings]})
    show_findings(error.findings)


def show_plan(summary: Mapping[str, Any]) -> None:
    """One table at a glance: what, where, with what."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in summary.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {number}" for name, number in value.items() if not isinstance(number, Mapping))
        elif isinstance(value, list):
            value = "/".join(map(str, value))
        table.add_row(Text(key.replace("_", " "), style="dim"), Text("–" if value is None else str(value)))
    out().print(table)


def show_rows(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(header[-1])
    for row in rows:
        table.add_row(*(Text("–" if value is None else str(value)) for value in row))
    out().print(table)


def show_files(files: Mapping[str, str], as_json: bool) -> None:
    """Rendered files, name → text."""
    if as_json:
        show_json({"ok": True, "files": dict(files)})
        return
    for name, text in files.items():
        out().rule(name)
        show_text(text)
