"""The one writer and reader of ``metrics.jsonl``. Standard library only.

One JSON object a line, ``kind`` one of ``train``, ``eval``, ``checkpoint``; the fields are fixed in the documentation of the run folder.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from launcher.files import append_line, read_json_lines

Kind = Literal["train", "eval", "checkpoint"]


def append(path: Path, kind: Kind, **values: Any) -> None:
    """Append one record. Values are JSON scalars; ``step`` and ``life`` are always among them."""
    assert "step" in values and "life" in values, "every record names its step and life"
    append_line(path, json.dumps({"kind": kind, **values}))


def read(path: Path, kind: Kind | None = None) -> list[dict[str, Any]]:
    """Records in order of step, each (kind, step) once: what an earlier life wrote at or after the step at which a later
    life went on is dropped, since the later life wins.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    for record in read_json_lines(path):
        if not {"kind", "step", "life"} <= record.keys():
            continue
        rows = kept.setdefault(record["kind"], [])
        while rows and rows[-1]["step"] >= record["step"]:
            rows.pop()
        rows.append(record)
    if kind is not None:
        return kept.get(kind, [])
    return sorted((record for rows in kept.values() for record in rows), key=lambda record: int(record["step"]))


def samples_sha(indices: Sequence[int]) -> str:
    """First 16 hex digits of SHA-256 over a step's sample indices as little-endian int64, in stream order."""
    return hashlib.sha256(struct.pack(f"<{len(indices)}q", *indices)).hexdigest()[:16]
