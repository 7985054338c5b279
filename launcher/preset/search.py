"""Where presets, sites, hardware, stacks and model facts lie: the file of a name, and its text. Not what stands in it.

A preset's name is looked up in ``./presets``, in ``~/.config/ftlaunch/presets``, then among the shipped ones; other names in the user's
folder, then among the shipped ones. What ``extends`` names is looked up beside the file that says it, not in the working folder, so that
a file means the same from everywhere.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel

from launcher.errors import UsageError
from launcher.preset.complaints import nearest, shown
from launcher.preset.tree import Where
from launcher.shipped import shipped

T = TypeVar("T", bound=BaseModel)

MAX_BYTES = 1_000_000

Source = Literal["project", "user", "shipped"]


@dataclass(frozen=True)
class Kind(Generic[T]):
    noun: str
    schema: type[T]
    folder: str
    """Below the shipped data, and below the user's configuration without its first part; empty: found by path alone."""


@dataclass(frozen=True)
class Found:
    """A file that a name stands for."""

    name: str
    file: Path
    source: Source


def user_folder(home: Path) -> Path:
    return home / ".config" / "ftlaunch"


def find(kind: Kind[T], name: str, home: Path, at: Where | None = None, *, project: Path | None = None) -> Path:
    """The file of ``name``: an existing path, else a name, else the path of a shipped one (``presets/tiny.yaml``).

    ``at``: where it was named, for the message. ``project``: a folder that is looked into first. Errors: UsageError.
    """
    path = Path(name)
    if (kind.folder == "presets" or "/" in name or name.endswith((".yaml", ".yml"))) and is_file(path):
        return path
    found = _named(kind, name, _folders(kind, home, None if name.startswith(f"{kind.folder}/") else project))
    if not found:
        raise _unknown(kind, name, home, at, kind.noun if at else None, project)
    return _trusted(found[0])


def find_base(kind: Kind[T], name: str, file: Path, home: Path, at: Where) -> Path:
    """The file that ``file`` extends: beside it, else by name. A file of the same name as the one it extends is not its own base."""
    folder = file.resolve().parent if file.is_symlink() else file.parent
    beside = [folder / f"{name}{suffix}" for suffix in ("", ".yaml", ".yml")]
    candidates = [Found(name, path, "project") for path in beside if is_file(path)]
    candidates += _named(kind, name, _folders(kind, home, None))
    for found in candidates:
        if found.file.resolve() != file.resolve():
            return found.file if found.file in beside else _trusted(found)
    if not candidates:
        raise _unknown(kind, name, home, at, "extends", None)
    return candidates[0].file


def known(kind: Kind[T], home: Path | None, project: Path | None = None) -> list[Found]:
    """All that a name can stand for, by name; of one name the one that is taken first. ``home``: None for the shipped ones alone."""
    found = [Found(name, file, source) for source, folder in _folders(kind, home, project) for name, file in _files(folder).items()]
    return sorted(found, key=lambda one: one.name)


def text_of(file: Path) -> str:
    """Errors: UsageError when it is too large, not UTF-8, not readable, or when everybody can write it."""
    try:
        status = file.stat()
        if status.st_size > MAX_BYTES:
            message = f"larger than {MAX_BYTES // 1_000_000} MB: this is no file that a person wrote"
            raise UsageError(message, code="too-large", file=str(file))
        if not file.resolve().is_relative_to(shipped("presets").parent) and (place := writable_by_all(file)):
            raise UsageError(f"everybody can write {place}", code="writable-by-all", file=str(file), hint=f"chmod o-w {place}")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        message = f"not UTF-8: byte 0x{error.object[error.start]:02x}"
        raise UsageError(message, code="not-utf-8", file=str(file), line=line, column=column) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="unreadable", file=str(file)) from None


def writable_by_all(path: Path) -> Path | None:
    """The place that lets everybody change ``path`` or put another file there, None where they cannot. Errors: OSError."""
    real = path.resolve()
    for place in (real, real.parent):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
            return place
    return None


def is_file(path: Path) -> bool:
    """Also True where it may not be looked at: reading it then says so."""
    try:
        return path.is_file()
    except PermissionError:
        return True
    except (OSError, ValueError):  # longer than a path can be; NUL
        return False


def _folders(kind: Kind[T], home: Path | None, project: Path | None) -> list[tuple[Source, Path]]:
    root, _, rest = kind.folder.partition("/")
    own: list[tuple[Source, Path]] = [] if home is None else [("user", user_folder(home) / (rest or root))]
    if project is not None and project.is_dir() and project.resolve() != _shipped(kind).resolve():
        own.insert(0, ("project", project))
    return [*own, ("shipped", _shipped(kind))]


def _shipped(kind: Kind[T]) -> Path:
    root, _, rest = kind.folder.partition("/")
    return shipped(root) / rest


def _files(folder: Path) -> dict[str, Path]:
    return {file.stem: file for suffix in ("yml", "yaml") for file in folder.glob(f"*.{suffix}")}


def _named(kind: Kind[T], name: str, folders: Sequence[tuple[Source, Path]]) -> list[Found]:
    """``presets/NAME`` is the shipped one, whatever lies in the user's folder."""
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix(f"{kind.folder}/"))
    if name.startswith(f"{kind.folder}/"):
        folders = folders[-1:]
    return [Found(stem, files[stem], source) for source, folder in folders if stem in (files := _files(folder))]


def _trusted(found: Found) -> Path:
    """A file that nobody typed the path of is one's own, root's or shipped. Errors: UsageError."""
    try:
        owner = found.file.stat().st_uid
    except OSError:
        return found.file  # reading it says what is wrong
    if found.source != "shipped" and owner not in (0, os.getuid()):
        message = f"belongs to another user (uid {owner})"
        raise UsageError(message, code="other-owner", file=str(found.file), hint=f"if you trust it, say its path: {found.file}")
    return found.file


def _unknown(kind: Kind[T], name: str, home: Path, at: Where | None, key: str | None, project: Path | None) -> UsageError:
    names = list(dict.fromkeys(found.name for found in known(kind, home, project)))
    hint = nearest(name, names) or (f"known: {', '.join(names)}" if len(names) <= 12 else "see: ftlaunch presets list")
    place = at or Where("")
    if "/" in name or name.endswith((".yaml", ".yml")):
        message = f"no such file, and no shipped {kind.noun} of that name: {shown(name)}"
    else:
        message = f"no {kind.noun} of the name {shown(name)}"
    return UsageError(
        message, code=f"unknown-{kind.noun}", file=place.file or None, line=place.line, column=place.column, key=key, hint=hint
    )
