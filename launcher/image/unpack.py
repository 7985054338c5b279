"""Makes the image usable on a node for one life of a job, and cleans up. Standard library only (Python 3.9); it runs on the host.

A supervisor uses it so (``rank.py`` is the third part):

1. once per node, before the ranks: ``srun --ntasks-per-node=1 … unpack_command(…)``, or ``unpack(…)`` in its own process without Slurm;
2. the ranks: ``srun … rank_command(…)`` with the same job and life; each node finds its own;
3. once per node at the end of the life: ``srun --ntasks-per-node=1 … remove_command(…)``, or ``remove(…)``. What a killed supervisor
   leaves behind is swept by the next ``unpack`` on that node.

Each node has ``/tmp/ftlaunch-<uid>/<node>-<job>-<life>/`` with ``owner.json`` and ``image``: the unpacked folder, a link to it on another
disk, or a link to the ``.sif`` where the node mounts images through the kernel. Ranks need nothing but that name.

The step prints one JSON line per node: ``{"node", "mode": "file"|"unpack", "image", "bytes", "ram_backed", "seconds", "swept"}`` and ends
with 0; or ``{"node", "error"}`` and 3 (no disk has room) or 5 (the unpacking failed).
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

from launcher.errors import ActionError, FtlaunchError
from launcher.image.disk import choose_folder, private_folder
from launcher.image.enter import clean_environment
from launcher.image.sweep import Owner, remove_tree, sweep
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
    seconds: float
    swept: list[str]
    """Folders of dead jobs and lives that were removed."""


def unpack_command(python: str, image: str, command: str, folders: Sequence[str], *, job: str, life: int, mode: str = "auto") -> list[str]:
    """The argument list of the per-node step. ``folders`` is ``site.local_disk`` as written: variables are expanded on the node.

    ``command`` is ``container.command``, ``mode`` is ``site.container.mount``. The step needs ``<run>/code`` on PYTHONPATH.
    """
    named = [word for folder in folders for word in ("--folder", folder)]
    options = ["--image", image, "--command", command, *named, "--job", job, "--life", str(life), "--mode", mode]
    return [python, "-m", "launcher.image.unpack", *options]


def remove_command(python: str, *, job: str, life: int) -> list[str]:
    """The argument list of the per-node step that undoes ``unpack_command``."""
    return [python, "-m", "launcher.image.unpack", "--remove", "--job", job, "--life", str(life)]


def link(job: str, life: int, node: str, *, links: Path = LINKS) -> Path:
    """Where the image of this job and life is on ``node``: computable by everybody, whichever disk was chosen."""
    return links / f"ftlaunch-{os.getuid()}" / _name(job, life, node) / "image"


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
    owner_pid: int | None = None,
    environ: Mapping[str, str] = os.environ,
    links: Path = LINKS,
) -> Unpacked:
    """Make ``image`` usable on this node; a second call for the same job, life and node finds the first one's work.

    ``owner_pid``: without a scheduler, the process whose death makes the folder dead.
    Errors: GateError when no folder has room, ActionError when the unpacking fails (with what Apptainer said).
    """
    start = time.monotonic()
    owner = Owner(node, job, life, socket.gethostname(), boot_id(), owner_pid, process_start(owner_pid) if owner_pid else None)
    home = private_folder(links)
    place = _claim(home, owner)
    bases = [home, *(base for folder in folders if (base := Path(os.path.expandvars(folder)) / home.name).is_dir())]
    swept = [str(path) for base in dict.fromkeys(bases) for path in sweep(base, owner)]
    target = place / "image"
    unpacked, ram_backed, size = target.is_dir(), False, 0
    if not target.exists():
        if mode == "file" or os.path.isdir(image) or (mode == "auto" and mounts_by_kernel(command)):
            _link(target, Path(image))
        else:
            size = unpacked_bytes(image)
            disk = choose_folder(folders, size, environ=environ)
            ram_backed, unpacked = disk.ram_backed, True
            there = _claim(private_folder(disk.folder), owner)
            _build_sandbox(image, command, there / "image", environ)
            if there != place:
                _link(target, there / "image")
    real = os.path.realpath(target)
    return Unpacked(node, "unpack" if unpacked else "file", real, size, ram_backed, round(time.monotonic() - start, 2), swept)


def remove(*, job: str, life: int, node: str, links: Path = LINKS) -> None:
    """Remove what ``unpack`` made for this job and life on this node; nothing to remove is fine."""
    image = link(job, life, node, links=links)
    there = Path(os.path.realpath(image)).parent
    if image.is_symlink() and there.name == image.parent.name and Owner.read(there) == Owner.read(image.parent):
        remove_tree(there)
    remove_tree(image.parent)


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
    own = {**clean_environment(environ), "APPTAINER_TMPDIR": str(scratch), "APPTAINER_CACHEDIR": str(scratch)}
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
    parser.add_argument("--remove", action="store_true")
    given = parser.parse_args(arguments)
    node = node_name(os.environ)
    line: dict[str, Any]
    if given.remove:
        remove(job=given.job, life=given.life, node=node)
        line, code = {"node": node, "removed": True}, 0
    else:
        try:
            line = asdict(unpack(given.image, given.command, given.folder, job=given.job, life=given.life, node=node, mode=given.mode))
            code = 0
        except FtlaunchError as error:
            line, code = {"node": node, "error": str(error)}, error.exit_code
    sys.stdout.write(json.dumps(line) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
