"""A claim on a folder shared by several machines: one builds, the others wait. A folder made by mkdir, with a lease in it; no flock.

It saves work and is not what keeps an image whole (that is the rename at the end): should two builders ever hold a claim at once, both
build to names of their own and the later rename wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.files import write_json
from launcher.image.sweep import remove_tree
from launcher.run import boot_id, process_start

SCRATCH = "ftlaunch-build-"
HEARTBEAT_S = 20
SILENCE_S = 300
"""A holder on another machine that has not written for so long is dead."""


@dataclass(frozen=True)
class Holder:
    host: str
    boot_id: str
    pid: int
    pid_start: int
    scratch: str | None = None
    """Folder that goes when the holder dies, if its name begins with ``SCRATCH`` and it is this user's."""


@contextlib.contextmanager
def claim(
    folder: Path, *, scratch: str | None, waiting: Callable[[Holder | None], Any], done: Callable[[], bool], poll_s: float = 2
) -> Iterator[bool]:
    """Hold ``folder`` for the body; yields False at once where ``done()`` while another one held it.

    ``waiting`` is called when there is somebody to wait for, again when that changes. What a dead holder left is removed.
    """
    seen: Holder | None = None
    told = False
    pid = os.getpid()
    me = Holder(socket.gethostname(), boot_id(), pid, process_start(pid) or 0, scratch)
    while not _take(folder, me):
        if done():
            yield False
            return
        holder = _read(folder)
        if holder is not None and _is_dead(holder, folder):
            _take_over(folder, holder)
            continue
        if not told or holder != seen:
            waiting(holder)
            seen, told = holder, True
        time.sleep(poll_s)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder / "lease.json", stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        if _read(folder) == me:
            remove_tree(folder)


def _take(folder: Path, me: Holder) -> bool:
    """The claim appears with its lease in it, by a rename, which fails where there is one already."""
    new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        write_json(new / "lease.json", asdict(me), mode=0o644)
        new.chmod(0o755)
        new.rename(folder)
    except OSError:
        remove_tree(new)
        return False
    except BaseException:
        remove_tree(new)
        raise
    return True


def _read(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / "lease.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_dead(holder: Holder, folder: Path) -> bool:
    if holder.host == socket.gethostname():
        return holder.boot_id != boot_id() or process_start(holder.pid) != holder.pid_start
    try:
        written = (folder / "lease.json").stat().st_mtime
        with tempfile.NamedTemporaryFile(dir=folder.parent) as probe:  # the file server's clock, not this machine's
            return os.fstat(probe.fileno()).st_mtime - written > SILENCE_S
    except OSError:
        return False


def _take_over(folder: Path, dead: Holder) -> None:
    """Put the dead holder's claim away. Should somebody have been faster, the claim that was caught is theirs: put it back."""
    away = folder.with_name(f"{folder.name}.dead-{os.getpid()}")
    try:
        folder.rename(away)
    except OSError:
        return
    if _read(away) != dead:
        with contextlib.suppress(OSError):
            away.rename(folder)
            return
    elif dead.scratch and dead.host == socket.gethostname():
        _remove_scratch(Path(dead.scratch))
    remove_tree(away)


def _remove_scratch(scratch: Path) -> None:
    """The lease may be somebody else's word: nothing but a build's own folder of this user is removed."""
    with contextlib.suppress(OSError):
        if scratch.name.startswith(SCRATCH) and scratch.lstat().st_uid == os.getuid():
            remove_tree(scratch)


def _beat(lease: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(lease)
