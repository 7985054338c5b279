"""Folders that exist whole or not at all: made under a lock, in a temporary folder, renamed. Standard library only (Python 3.9).

The lock is a folder made by mkdir with a lease inside: flock is not cluster-wide on some file systems. Not the run's lease.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launcher.errors import ActionError
from launcher.files import sync_folder, write_json
from launcher.run import Lease, boot_id, is_process_alive, now, process_start

FACTS = "facts.json"
LEASE_S = 600.0
"""Without a heartbeat for so long, a holder on another machine counts as dead."""
RENEW_S = 30.0
POLL_S = 0.5


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of a finished folder; None when it is not there. A folder without facts does not count."""
    try:
        value = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ActionError("is damaged", file=str(folder / FACTS), hint=f"remove {folder} and stage again") from None
    assert isinstance(value, dict)
    return value


def make(folder: Path, build: Callable[[Path], dict[str, Any]], say: Callable[[str], None], *, resumable: bool = False) -> dict[str, Any]:
    """The facts of ``folder``, which ``build`` makes (in the folder that it is given, giving the facts) unless it is there.

    Two callers do not clash: the second waits and takes what the first made. ``resumable``: what a killed build left behind is
    handed to the next one (downloads); otherwise it is swept.
    """
    facts = read_facts(folder)
    if facts is not None:
        return facts
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _held(folder.parent / f".lock-{folder.name}", say) as lock:
        facts = read_facts(folder)
        if facts is not None:
            return facts
        _sweep(folder)
        temporary = folder.parent / f".partial-{folder.name}"
        if resumable:
            temporary.mkdir(exist_ok=True)
        else:
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{folder.name}-"))
            temporary.chmod(0o777 & ~_umask())
        try:
            facts = build(temporary)
            write_json(temporary / FACTS, facts, mode=0o666 & ~_umask())
            _sync_tree(temporary)
            if not lock.is_ours():
                raise ActionError("another staging took over while this one was asleep", file=str(folder), hint="stage again")
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        except BaseException:
            if not resumable:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    return facts


@dataclass(frozen=True)
class _Lock:
    folder: Path
    lease: Lease

    def is_ours(self) -> bool:
        held = _read_lease(self.folder)
        return held is not None and (held.host, held.pid, held.pid_start) == (self.lease.host, self.lease.pid, self.lease.pid_start)

    def renew(self) -> None:
        if self.is_ours():
            write_json(self.folder / "lease.json", asdict(self.lease) | {"heartbeat": now()})


@contextmanager
def _held(folder: Path, say: Callable[[str], None]) -> Iterator[_Lock]:
    pid = os.getpid()
    lock = _Lock(folder, Lease(0, None, socket.gethostname(), boot_id(), pid, process_start(pid) or 0, now()))
    told = False
    while not _take(lock):
        if not told:
            held = _read_lease(folder)
            holder = f"process {held.pid} on {held.host}" if held else "just begun"
            say(f"waiting for another staging of {folder.name[len('.lock-') :]} ({holder})")
            told = True
        time.sleep(POLL_S)
    ended = threading.Event()
    thread = threading.Thread(target=_renew_until, args=(lock, ended), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        if lock.is_ours():
            shutil.rmtree(folder, ignore_errors=True)


def _renew_until(lock: _Lock, ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        lock.renew()


def _take(lock: _Lock) -> bool:
    try:
        lock.folder.mkdir()
    except FileExistsError:
        return _take_over(lock)
    write_json(lock.folder / "lease.json", asdict(lock.lease))
    return True


def _take_over(lock: _Lock) -> bool:
    """Take the lock of a holder that is dead. The claim, a folder named after the dead holder, lets one of several do it."""
    try:
        age_s = time.time() - lock.folder.stat().st_mtime
    except FileNotFoundError:
        return False  # released just now: the next turn takes it
    held = _read_lease(lock.folder)
    if held is None:
        dead, name = age_s > LEASE_S, "nobody"
    else:
        alive = is_process_alive(held)
        dead, name = (not alive if alive is not None else _age_s(held.heartbeat) > LEASE_S), f"{held.pid}-{held.pid_start}"
    if not dead:
        return False
    claim = lock.folder / f"claim-{name}"
    try:
        claim.mkdir()
    except FileExistsError:
        if time.time() - claim.stat().st_mtime > LEASE_S:  # who claimed it died at once
            shutil.rmtree(claim, ignore_errors=True)
        return False
    except FileNotFoundError:
        return False
    write_json(lock.folder / "lease.json", asdict(lock.lease))
    return True


def _read_lease(folder: Path) -> Lease | None:
    try:
        return Lease(**json.loads((folder / "lease.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _age_s(heartbeat: str) -> float:
    return (datetime.now(timezone.utc) - datetime.fromisoformat(heartbeat.replace("Z", "+00:00"))).total_seconds()


def _sweep(folder: Path) -> None:
    """Remove what a killed build of this folder left; called with the lock held."""
    for leftover in folder.parent.glob(f".tmp-{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def _umask() -> int:
    """The process's umask, read without setting it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077
