"""Makes the image usable on a node for one life of a job, and cleans up. Standard library only (Python 3.9); it runs on the host.

A supervisor uses it so (``rank.py`` is the third part):

1. once per node, before the ranks: ``srun --ntasks-per-node=1 … unpack_command(…)``, or ``unpack(…)`` in its own process without Slurm;
2. the ranks: ``srun … rank_command(…)`` with the same job and life; each node finds its own;
3. once per node at the end of the life: ``srun --ntasks-per-node=1 … remove_command(…)``, or ``remove(…)``. What a killed supervisor
   leaves behind is swept by the next ``unpack`` on that node.

Each node has ``/tmp/ftlaunch-<uid>/<node>-<job>-<life>/`` with ``owner.json`` and ``image``: the unpacked folder, a link to it on another
disk, or a link to the ``.sif`` where the node mounts images through the kernel. Ranks need nothing but that name. Where a node has no
disk that takes the image, it is unpacked below ``shared``, a folder that all nodes see; where not even /tmp can be written, the links lie
there too. Mounting it by FUSE instead is no way out: the mount ends with the first stop signal.

The step prints one JSON line per node: ``{"node", "mode": "file"|"unpack", "image", "bytes", "ram_backed", "shared", "seconds", "swept"}``
and ends with 0; or ``{"node", "error"}`` and 3 (nothing has room) or 5 (the unpacking failed). ``read_log`` reads such lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import ActionError, FtlaunchError
from launcher.image.disk import choose_folder, is_mine, private_folder, private_name
from launcher.image.enter import apptainer_folders, clean_environment
from launcher.image.sweep import Owner, job_is_alive, remove_tree, sweep
from launcher.run import boot_id, process_start

LINKS = Path("/tmp")
"""Where every rank looks, whatever disk its node chose."""


@dataclass(frozen=True)
class Unpacked:
    """What one node has ready."""

    node: str
    mode: str
    """``file``: the image is used as it is. ``unpack``: it was unpacked."""
    image: str
    """What ``apptainer exec`` gets on this node."""
    bytes: int
    """Taken on the node's disk; 0 for ``file``."""
    ram_backed: bool
    """The disk is memory (tmpfs): ``bytes`` count against the job's memory."""
    shared: bool
    """It lies on the shared file system, since no disk of the node took it."""
    seconds: float
    swept: list[str]
    """Folders of dead jobs and lives that were removed."""


def unpack_command(
    python: str,
    image: str,
    command: str,
    folders: Sequence[str],
    *,
    job: str,
    life: int,
    mode: str = "auto",
    shared: str | None = None,
    ranks_bytes: int | None = None,
    squeue: str | None = None,
) -> list[str]:
    """The argument list of the per-node step. ``folders`` is ``site.local_disk`` as written: variables are expanded on the node.

    ``command`` is ``container.command``, ``mode`` is ``site.container.mount``; ``shared``, ``ranks_bytes`` and ``squeue`` are those of
    ``unpack``. The step needs ``<run>/code`` on PYTHONPATH.
    """
    named = [word for folder in folders for word in ("--folder", folder)]
    options = ["--image", image, "--command", command, *named, "--job", job, "--life", str(life), "--mode", mode]
    options += ["--shared", shared] if shared is not None else []
    options += ["--ranks-bytes", str(ranks_bytes)] if ranks_bytes is not None else []
    options += ["--squeue", squeue] if squeue is not None else []
    return [python, "-m", "launcher.image.unpack", *options]


def remove_command(python: str, *, job: str, life: int, shared: str | None = None) -> list[str]:
    """The argument list of the per-node step that undoes ``unpack_command``."""
    options = ["--job", job, "--life", str(life), *(["--shared", shared] if shared is not None else [])]
    return [python, "-m", "launcher.image.unpack", "--remove", *options]


def link(job: str, life: int, node: str, *, links: Path = LINKS) -> Path:
    """Where the image of this job and life is on ``node``: computable by everybody, whichever disk was chosen."""
    return private_name(links) / _name(job, life, node) / "image"


def find(job: str, life: int, node: str, shared: Path | None = None, *, links: Path = LINKS) -> Path | None:
    """The link that ``unpack`` left for this node, None where there is none. One in somebody else's folder is not ours."""
    places = [link(job, life, node, links=base) for base in (links, shared) if base is not None and is_mine(private_name(base))]
    return next((place for place in places if place.exists()), None)


def node_name(environ: Mapping[str, str]) -> str:
    """The node's name for Slurm (several virtual nodes may share a host), else the host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def unpack(
    image: str,
    command: str,
    folders: Sequence[str],
    *,
    job: str,
    life: int,
    node: str,
    mode: str = "auto",
    shared: Path | None = None,
    ranks_bytes: int | None = None,
    squeue: str | None = None,
    owner_pid: int | None = None,
    environ: Mapping[str, str] = os.environ,
    links: Path = LINKS,
) -> Unpacked:
    """Make ``image`` usable on this node; a second call for the same job, life and node finds the first one's work.

    ``shared``: a folder of the run, used where no local disk takes the image or the links. ``ranks_bytes``: memory that the node's ranks
    will take, which an image in memory must leave them. ``squeue``: its path, to learn which jobs are dead. ``owner_pid``: without a
    scheduler, the process whose death makes the folder dead.
    Errors: GateError when no folder has room, ActionError when the unpacking fails (with what Apptainer said).
    """
    start = time.monotonic()
    owner = Owner(node, job, life, socket.gethostname(), boot_id(), owner_pid, process_start(owner_pid) if owner_pid else None)
    if shared is not None:
        shared.mkdir(mode=0o700, exist_ok=True)
    home = private_folder(links if shared is None or _can_write(links) else shared)
    place = _claim(home, owner)
    bases = [home, *(base for folder in folders if (base := Path(os.path.expandvars(folder)) / home.name).is_dir())]
    alive = partial(job_is_alive, squeue=squeue)
    swept = [str(path) for base in dict.fromkeys(bases) for path in sweep(base, owner, is_job_alive=alive)]
    target = place / "image"
    unpacked, ram_backed, size = target.is_dir(), False, 0
    if not target.exists():
        if mode == "file" or os.path.isdir(image) or (mode == "auto" and mounts_by_kernel(command)):
            _link(target, Path(image))
        else:
            size = unpacked_bytes(image)
            disk = choose_folder(folders, size, environ=environ, shared=shared, ranks_bytes=ranks_bytes)
            ram_backed, unpacked = disk.ram_backed, True
            there = _claim(private_folder(disk.folder), owner)
            _build_sandbox(image, command, there / "image", environ)
            if there != place:
                _link(target, there / "image")
    real = os.path.realpath(target)
    is_shared = shared is not None and Path(real).is_relative_to(os.path.realpath(shared))
    seconds = round(time.monotonic() - start, 2)
    return Unpacked(node, "unpack" if unpacked else "file", real, size, ram_backed, is_shared, seconds, swept)


def remove(*, job: str, life: int, node: str, shared: Path | None = None, links: Path = LINKS) -> None:
    """Remove what ``unpack`` made for this job and life on this node; nothing to remove is fine."""
    for base in (links, shared):
        if base is None or not is_mine(private_name(base)):
            continue
        image = link(job, life, node, links=base)
        there = Path(os.path.realpath(image)).parent
        if image.is_symlink() and there.name == image.parent.name and Owner.read(there) == Owner.read(image.parent):
            remove_tree(there)
        remove_tree(image.parent)
    if shared is not None:
        for folder in (private_name(shared), shared):  # the last node leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


def read_log(text: str) -> list[dict[str, Any]]:
    """The lines that steps of this module printed, among whatever else stands in their log."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            found += [said] if isinstance(said, dict) and "node" in said else []
    return found


def unpacked_bytes(image: str) -> int:
    """What the image takes unpacked: as its record says, else four times the file (measured: 3.2 for the ``cpu`` stack)."""
    try:
        return int(json.loads(Path(f"{image}.json").read_text(encoding="utf-8"))["unpacked_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 4 * os.stat(image).st_size


def mounts_by_kernel(command: str) -> bool:
    """Whether this Apptainer mounts an image through the kernel, by its setuid starter; else a FUSE process inside the job step does.

    That process gets the stop signal too and takes the mount with it, and every rank dies of SIGBUS before it can save.
    Errors: ActionError when the command cannot say how it was built.
    """
    answer = subprocess.run([command, "buildcfg"], capture_output=True, text=True, env=clean_environment(os.environ), check=False)
    if answer.returncode != 0:
        raise ActionError(f"{command} buildcfg ended with {answer.returncode}: {answer.stderr.strip()[-500:]}", code="apptainer")
    facts = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    kind = "APPTAINER" if "APPTAINER_CONF_FILE" in facts else "SINGULARITY"
    starter = Path(facts.get("LIBEXECDIR", ""), kind.lower(), "bin", "starter-suid")
    try:
        state = starter.stat()
        allowed = not os.statvfs(starter).f_flag & os.ST_NOSUID and state.st_mode & 0o4000 and state.st_uid == 0
        settings = Path(facts[f"{kind}_CONF_FILE"]).read_text(encoding="utf-8", errors="replace")
    except (OSError, KeyError):
        return False
    return bool(allowed) and not re.search(r"^\s*allow setuid(-mount squashfs)?\s*=\s*no\b", settings, re.MULTILINE)


def _can_write(folder: Path) -> bool:
    """Whether a folder of ours can be there. Tried, since rights do not tell of a file system that is full or read-only."""
    if is_mine(private_name(folder)):
        return os.access(private_name(folder), os.W_OK | os.X_OK)
    try:
        Path(tempfile.mkdtemp(prefix=".ftlaunch-", dir=folder)).rmdir()
    except OSError:
        return False
    return True


def _name(job: str, life: int, node: str) -> str:
    name = f"{node}-{job}-{life}"
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), name
    return name


def _claim(base: Path, owner: Owner) -> Path:
    """The folder of this node, job and life in ``base``. It appears with its owner in it, so that no sweep takes it for dead."""
    place = base / _name(owner.job, owner.life, owner.node)
    if not place.is_dir():
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
        owner.write(new)
        try:
            new.rename(place)
        except OSError:  # somebody was faster
            remove_tree(new)
    return place


def _link(path: Path, target: Path) -> None:
    path.symlink_to(target.absolute())


def _build_sandbox(image: str, command: str, folder: Path, environ: Mapping[str, str]) -> None:
    part, scratch = folder.with_name("image.part"), folder.with_name("tmp")
    remove_tree(part)
    scratch.mkdir(exist_ok=True)
    own = {**clean_environment(environ), **apptainer_folders(scratch)}
    built = subprocess.run([command, "build", "--sandbox", str(part), image], capture_output=True, text=True, env=own, check=False)
    remove_tree(scratch)
    if built.returncode != 0:
        remove_tree(folder.parent)
        said = (built.stderr or built.stdout).strip()[-1000:]
        raise ActionError(f"{command} build --sandbox of {image} ended with {built.returncode}: {said}", code="unpack")
    part.rename(folder)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.image.unpack", allow_abbrev=False)
    parser.add_argument("--image")
    parser.add_argument("--command", default="apptainer")
    parser.add_argument("--folder", action="append", default=[])
    parser.add_argument("--job", required=True)
    parser.add_argument("--life", type=int, required=True)
    parser.add_argument("--mode", choices=["auto", "file", "unpack"], default="auto")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--ranks-bytes", type=int)
    parser.add_argument("--squeue")
    parser.add_argument("--remove", action="store_true")
    given = parser.parse_args(arguments)
    node = node_name(os.environ)
    line: dict[str, Any]
    if given.remove:
        remove(job=given.job, life=given.life, node=node, shared=given.shared)
        line, code = {"node": node, "removed": True}, 0
    else:
        own = {"mode": given.mode, "shared": given.shared, "ranks_bytes": given.ranks_bytes, "squeue": given.squeue}
        try:
            line = asdict(unpack(given.image, given.command, given.folder, job=given.job, life=given.life, node=node, **own))
            code = 0
        except FtlaunchError as error:
            line, code = {"node": node, "error": str(error)}, error.exit_code
    sys.stdout.write(json.dumps(line) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
