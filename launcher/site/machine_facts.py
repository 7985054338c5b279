"""This machine: file systems, candidate folders, modules, Apptainer, user namespaces. Bounded in time; writes nothing."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import FtlaunchError
from launcher.image.unpack import mounts_by_kernel
from launcher.preset.site import SiteContainer
from launcher.site.node_report import namespaces
from launcher.slurm.tools import call

TIMEOUT_S = 20.0

SHARED = re.compile(
    r"nfs4?|lustre|gpfs|beegfs(_nodev)?|ceph|wekafs|panfs|afs|pvfs2|orangefs|daos|autofs|fuse\.(glusterfs|ceph.*|juicefs|quobyte|mfs)"
)
"""Types of file systems that other machines see as well."""

ENOUGH_BYTES = 50 * 2**30
"""A folder with less free is no place for runs: one checkpoint of a large model takes more."""

VARIABLES = ("SCRATCH", "PSCRATCH", "CSCRATCH", "SCRATCHDIR", "GLOBAL_SCRATCH", "WORK", "WORKDIR", "GROUP_SCRATCH", "PROJECT", "LUSTRE")
"""What sites call a user's room on the shared file system, the best for runs first."""

ROOTS: Mapping[str, Sequence[str]] = {
    "scratch": ("", "users", "work", "project"),
    "work": ("", "users"),
    "lustre": ("", "scratch", "users"),
    "gpfs": ("scratch",),
    "beegfs": ("",),
    "ptmp": ("",),
}
PATHS = tuple(str(Path("/", root, below, "$USER")) for root, folders in ROOTS.items() for below in folders)
"""Where a user's room is on sites that set no variable, in this order."""


@dataclass(frozen=True)
class Room:
    """A folder of this user outside home."""

    written: str
    """As a site file would say it: ``$SCRATCH``, ``/scratch/$USER``."""
    path: str
    filesystem: str
    free_bytes: int

    @property
    def shared(self) -> bool:
        return SHARED.fullmatch(self.filesystem) is not None


@dataclass(frozen=True)
class Apptainer:
    """How this machine can use and build images. ``path``: None where the command is not there, with or without the module."""

    path: str | None
    command: str = "apptainer"
    version: str | None = None
    module: str | None = None
    setuid: bool | None = None
    """Images are mounted by the kernel; else a FUSE process does it."""
    user_namespaces: bool | None = None
    subordinate_ids: bool = False
    fuse: bool = False


@dataclass(frozen=True)
class Machine:
    host: str
    user: str
    groups: frozenset[str]
    rooms: tuple[Room, ...]
    small_rooms: tuple[Room, ...]
    """Writable, but with little free."""
    has_modules: bool
    apptainer: Apptainer


def look(environ: Mapping[str, str], home: Path, *, mounts: str = "/proc/self/mounts") -> Machine:
    """Everything of this machine that a site file asks for."""
    user = user_name()
    table = read_mounts(Path(mounts))
    rooms = find_rooms({"USER": user, **environ}, home, table)
    modules = module_names()
    return Machine(
        host=socket.gethostname().partition(".")[0],
        user=user,
        groups=group_names(),
        rooms=tuple(room for room in rooms if room.free_bytes >= ENOUGH_BYTES),
        small_rooms=tuple(room for room in rooms if room.free_bytes < ENOUGH_BYTES),
        has_modules=modules is not None,
        apptainer=look_for_apptainer(None, modules or ()),
    )


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def group_names() -> frozenset[str]:
    found = set()
    for group in {os.getgid(), *os.getgroups()}:
        try:
            found.add(grp.getgrgid(group).gr_name)
        except KeyError:
            continue
    return frozenset(found)


def read_mounts(file: Path) -> list[tuple[str, str]]:
    """Mount point and type of every file system, in the order of mounting."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split(" ")
        if len(words) >= 3:
            found.append((re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1]), words[2]))
    return found


def filesystem_of(path: str, mounts: Sequence[tuple[str, str]]) -> str:
    """Type of the file system that holds ``path``: the longest mount point above it, the last one mounted there."""
    real, best, kind = os.path.realpath(path), "", ""
    for point, filesystem in mounts:
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, filesystem
    return kind


def find_rooms(environ: Mapping[str, str], home: Path, mounts: Sequence[tuple[str, str]]) -> list[Room]:
    """Writable folders of this user outside home: named by a variable, else at a usual place of a shared file system."""
    candidates = [(f"${name}", environ[name]) for name in VARIABLES if environ.get(name)]
    candidates += [(written, written.replace("$USER", environ["USER"])) for written in PATHS]
    found: dict[str, Room] = {}
    for written, path in candidates:
        real = os.path.realpath(path)
        if real in found or not os.path.isabs(path) or _inside(real, os.path.realpath(home)):
            continue
        room = _room(written, path, filesystem_of(path, mounts))
        if room is not None and (room.shared or written.startswith("$")):
            found[real] = room
    return list(found.values())


def module_names() -> list[str] | None:
    """All modules' names, as ``module -t avail`` in a login shell has them; None where there is no ``module``."""
    script = "type module >/dev/null 2>&1 || exit 3; module -t avail 2>&1"
    answer = call(["bash", "-lc", script], timeout_s=TIMEOUT_S)
    return None if answer.code in (3, 124, 127) else [line.strip() for line in answer.stdout.splitlines()]


def container_module(names: Sequence[str]) -> str | None:
    """The module that brings Apptainer, without its version, so that the site's default is loaded."""
    for wanted in ("apptainer", "singularity"):
        for name in names:
            bare = re.sub(r"\(.*\)$", "", name).rstrip("/")
            match = re.fullmatch(rf"((?:[\w.+-]+/)*?(?:[a-z]+-)?{wanted}(?:-ce|pro)?)(?:/v?\d[^/]*)?", bare, re.IGNORECASE)
            if match:
                return match[1]
    return None


def look_for_apptainer(container: SiteContainer | None, modules: Sequence[str]) -> Apptainer:
    """``container``: what a site names; None: whatever is here, else what a module of ``modules`` brings."""
    names = ["apptainer", "singularity"] if container is None else [container.command]
    path, module = next(filter(None, map(shutil.which, names)), None), None
    if path is None:
        module = container_module(modules) if container is None else container.module
    if module is not None:
        script = 'module load "$0" >/dev/null 2>&1; for name; do command -v "$name" && exit; done; exit 1'
        answer = call(["bash", "-lc", script, module, *names], timeout_s=TIMEOUT_S)
        path = answer.stdout.strip().splitlines()[-1] if answer.code == 0 and answer.stdout.strip() else None
    return Apptainer(
        path=None if path is None else os.path.abspath(path),
        command=names[0] if path is None else Path(path).name,
        version=None if path is None else apptainer_version(path),
        module=module,
        setuid=None if path is None else is_setuid(path),
        user_namespaces=namespaces(),
        subordinate_ids=subordinate_ids(user_name()),
        fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
    )


def apptainer_version(path: str) -> str | None:
    """``1.4.5``; None when it does not say."""
    found = re.search(r"\d+\.\d+\S*", call([path, "--version"], timeout_s=TIMEOUT_S).stdout)
    return found[0] if found else None


def is_setuid(path: str) -> bool | None:
    try:
        return mounts_by_kernel(path)
    except (FtlaunchError, OSError):
        return None


def subordinate_ids(user: str, files: Sequence[str] = ("/etc/subuid", "/etc/subgid")) -> bool:
    """Whether ``apptainer build --fakeroot`` can map ids: a line for the user in both files, and the programs that map them."""
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return False
        if not any(line.startswith((f"{user}:", f"{os.getuid()}:")) for line in lines):
            return False
    return shutil.which("newuidmap") is not None and shutil.which("newgidmap") is not None


def _room(written: str, path: str, filesystem: str) -> Room | None:
    try:
        if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
            return None
        facts = os.statvfs(path)
    except OSError:
        return None
    return Room(written, path, filesystem, facts.f_bavail * facts.f_frsize)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
