"""Writing files so that they are whole or absent, and digests. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write ``text`` to a temporary name beside ``path``, flush it to disk, then rename it over ``path``."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any, *, mode: int = 0o600) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n", mode=mode)


def digest(value: Any) -> str:
    """64 hex digits: SHA-256 of ``value`` as JSON with sorted keys, in ASCII, without spaces. Runs and images are found again by it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path, *, flush: bool = False) -> str:
    """SHA-256 as hex; with ``flush`` the file is forced to disk as well. Errors: OSError."""
    content = hashlib.sha256()
    with open(path, "rb+" if flush else "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            content.update(block)
        if flush:
            os.fsync(file.fileno())
    return content.hexdigest()


def append_line(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Append one line with a single ``write`` on an ``O_APPEND`` descriptor, so that lines of several writers do not mix.

    A torn last line left by a killed writer is closed first, so that it costs itself only.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, mode)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (b"\n" if torn else b"") + text.encode() + b"\n")
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of a JSONL file, in file order; empty when the file does not exist. Torn lines are left out."""
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse fsync on folders
        pass
    finally:
        os.close(descriptor)
