"""A preset that is right, and files of one's own beside it."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import REPOSITORY

GOOD = str(REPOSITORY / "tests" / "broken" / "_good.yaml")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
