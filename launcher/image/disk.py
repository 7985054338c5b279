"""Which disk of a node takes the unpacked image. Standard library only (Python 3.9)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import GateError

MARGIN_BYTES = 1 << 30
"""Left free on the disk beside the image."""

MARGIN_FILES = 100_000
"""An image has some 30 000 files; a file system that counts them needs that many left and more."""


@dataclass(frozen=True)
class Space:
    """What a folder has to offer."""

    free_bytes: int
    free_files: int | None
    """None where the file system does not count them."""
    ram_backed: bool


@dataclass(frozen=True)
class Disk:
    folder: Path
    ram_backed: bool
    shared: bool = False


def choose_folder(
    folders: Sequence[str],
    needed_bytes: int,
    *,
    environ: Mapping[str, str],
    shared: Path | None = None,
    ranks_bytes: int | None = None,
    space: Callable[[Path], Space] | None = None,
) -> Disk:
    """The first folder on a disk with room for ``needed_bytes``; where there is none, the first in memory (tmpfs) with room; where that
    is none either, ``shared``, which lies on a file system of all nodes and may be slow.

    Memory counts as room as far as the job leaves it over: ``ranks_bytes`` are what the ranks of the node take; half of it where nobody
    has predicted that. Errors: GateError that says of each folder why it was not taken.
    """
    measure = space or (lambda folder: space_of(folder, ranks_bytes=ranks_bytes))
    refused, in_memory = [], []
    for written in [*folders, *([str(shared)] if shared is not None else [])]:
        folder, reason = _expand(written, environ)
        if folder is None:
            refused.append(f"{written} {reason}")
            continue
        offer = measure(folder)
        if offer.free_bytes < needed_bytes + MARGIN_BYTES:
            refused.append(f"{folder} has {_gib(offer.free_bytes)}{' of memory' if offer.ram_backed else ''}")
        elif offer.free_files is not None and offer.free_files < MARGIN_FILES:
            refused.append(f"{folder} has room for {offer.free_files} files only")
        elif offer.ram_backed:
            in_memory.append(folder)
        elif folder != shared:
            return Disk(folder, False)
        elif not in_memory:
            return Disk(folder, False, shared=True)
    if in_memory:
        return Disk(in_memory[0], True)
    wanted = f"{_gib(needed_bytes)} and {_gib(MARGIN_BYTES)} to spare"
    raise GateError(
        f"no local disk has room for the unpacked image ({wanted}): {'; '.join(refused) or 'none named'}",
        code="node-disk",
        hint="name one in local_disk of the site",
    )


def space_of(
    folder: Path,
    mounts: str = "/proc/self/mounts",
    memory: str = "/proc/meminfo",
    cgroup: str = "/proc/self/cgroup",
    *,
    ranks_bytes: int | None = None,
) -> Space:
    """``ranks_bytes``: as for ``choose_folder``."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    ram_backed = _filesystem(folder, Path(mounts)) in ("tmpfs", "ramfs")
    if ram_backed:
        available = _available_memory(Path(memory), Path(cgroup))
        free = max(0, min(free, available // 2 if ranks_bytes is None else available - ranks_bytes))
    return Space(free, facts.f_favail if facts.f_files else None, ram_backed)


def private_name(base: Path) -> Path:
    return base / f"ftlaunch-{os.getuid()}"


def is_mine(folder: Path) -> bool:
    """Whether a folder in a place that all may write to is this user's: in somebody else's there could be somebody else's image."""
    try:
        state = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()


def private_folder(base: Path) -> Path:
    """``base/ftlaunch-<uid>``, which only this user can enter. Errors: GateError when it cannot be made, or is somebody else's."""
    folder = private_name(base)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise GateError(f"{folder} cannot be made: {error.strerror}", code="node-disk") from error
    if not is_mine(folder):
        raise GateError(f"{folder} exists and is not this user's folder", code="node-disk", hint="have it removed")
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _expand(written: str, environ: Mapping[str, str]) -> tuple[Path | None, str]:
    """A folder as a site writes it, with a variable of the node's environment at its beginning or without."""
    text = written
    if written.startswith("$"):
        name, slash, rest = written[1:].partition("/")
        value = environ.get(name.strip("{}"), "")
        if not value:
            return None, "is not set"
        text = value + slash + rest
    folder = Path(text)
    if not folder.is_absolute():
        return None, "is not an absolute path"
    if not folder.is_dir():
        return None, "is not there"
    if not os.access(folder, os.W_OK | os.X_OK):
        return None, "is not writable"
    return folder, ""


def _filesystem(folder: Path, mounts: Path) -> str:
    """Type of the file system that holds ``folder``: that of the longest mount point above it, the last one mounted there."""
    real, best, kind = os.path.realpath(folder), "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, filesystem, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, filesystem
    return kind


def _available_memory(memory: Path, cgroup: Path) -> int:
    """Bytes that this process's job may still take: of the machine, and of its control group (version 2) where it has a limit."""
    facts = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
    available = int(facts["MemAvailable"].split()[0]) * 1024
    try:
        unified = next(line[3:] for line in cgroup.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return available
    folder = Path("/sys/fs/cgroup" + unified)
    for level in (folder, *folder.parents):
        try:
            limit, used = (level / "memory.max").read_text().strip(), int((level / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            available = min(available, int(limit) - used)
    return max(0, available)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
