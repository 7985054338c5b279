"""Removing what dead jobs and lives left on a node's disks. Standard library only (Python 3.9)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.files import write_json
from launcher.run import boot_id, process_start


@dataclass(frozen=True)
class Owner:
    """Whose a folder is: ``owner.json`` in it."""

    node: str
    job: str
    life: int
    host: str
    boot_id: str
    pid: int | None = None
    """Without a scheduler: the process that the folder lives with."""
    pid_start: int | None = None

    @staticmethod
    def read(folder: Path) -> Owner | None:
        try:
            return Owner(**json.loads((folder / "owner.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        write_json(folder / "owner.json", asdict(self))


def sweep(base: Path, me: Owner, *, is_job_alive: Callable[[str], bool | None] | None = None) -> list[Path]:
    """Remove the folders in ``base`` whose owner is dead for sure; what cannot be known stays."""
    removed = []
    for folder in sorted(base.iterdir()):
        owner = Owner.read(folder)
        if owner is not None and _is_dead(owner, me, is_job_alive or job_is_alive):
            dead = folder.with_name(f".dead-{os.getpid()}-{folder.name}")  # two nodes that share a disk sweep the same folder once
            try:
                folder.rename(dead)
            except OSError:
                continue
            remove_tree(dead)
            removed.append(folder)
    return removed


def job_is_alive(job: str, squeue: str | None = None) -> bool | None:
    """Whether Slurm knows the job as pending or running; None when it cannot be asked. ``squeue``: its path where it is known."""
    squeue = squeue or shutil.which("squeue")
    if squeue is None:
        return None
    try:
        answer = subprocess.run([squeue, "-h", "-o", "%T", "-j", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode == 0:
        return bool(answer.stdout.strip())
    return False if "Invalid job id" in answer.stderr else None


def remove_tree(folder: Path) -> None:
    """Remove a folder, or do nothing when there is none. Folders that an image made unwritable are opened first.

    Others may remove, or rename and remove, the same folder at the same time.
    """
    while folder.is_dir() and not folder.is_symlink():
        try:
            _open(folder)
            shutil.rmtree(folder)
        except FileNotFoundError:  # somebody else was faster with this file, or with the whole folder
            continue


def _open(folder: Path) -> None:
    folder.chmod(0o700)
    for path, names, _ in os.walk(folder):
        for name in names:
            inner = Path(path, name)
            if not inner.is_symlink() and inner.stat().st_mode & 0o700 != 0o700:
                inner.chmod(0o700)


def _is_dead(owner: Owner, me: Owner, is_job_alive: Callable[[str], bool | None]) -> bool:
    if owner.job == me.job:
        return owner.node == me.node and owner.life < me.life
    if owner.host == me.host and owner.boot_id != me.boot_id:
        return True
    if owner.pid is not None:
        same_machine = owner.host == me.host and owner.boot_id == boot_id()
        return same_machine and process_start(owner.pid) != owner.pid_start
    return is_job_alive(owner.job) is False
