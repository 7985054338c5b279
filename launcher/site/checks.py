"""What doctor says of this machine and a site: one check, one line, with what to do next. What has to be asked is asked here too."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from launcher.image.disk import space_of
from launcher.image.host import NEEDED
from launcher.preset.choose import Folders
from launcher.preset.fields import duration_min
from launcher.preset.site import Site
from launcher.site.ask import Cluster
from launcher.site.machine_facts import SHARED, Apptainer, filesystem_of
from launcher.site.node_report import index_reachable, kernel_driver
from launcher.site.rights import rights_of
from launcher.slurm.tools import OPTIONAL, REQUIRED, call

Level = Literal["ok", "warning", "error"]

EXTRAS: Mapping[str, Sequence[str]] = {
    "train": NEEDED,
    "report": ("matplotlib",),
    "gpu": ("deepspeed", "bitsandbytes", "liger-kernel", "xformers"),
}
"""Optional parts of ftlaunch → the packages that make them."""

LITTLE_BYTES, FULL_BYTES = 50 * 2**30, 2**30
LITTLE_FILES = 50_000
SKEW_S = 5.0
"""More than that between a file server's clock and ours confuses what is newer."""


@dataclass(frozen=True)
class Check:
    level: Level
    code: str
    """Short and stable, for programs."""
    message: str
    hint: str | None = None
    """What to do next."""

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


def python_checks(site: Site) -> Iterator[Check]:
    """The interpreter, and what of ftlaunch's optional parts is installed beside it."""
    yield Check("ok", "python", f"Python {sys.version.split()[0]}: {sys.executable}")
    missing = {extra: [name for name in names if _version(name) is None] for extra, names in EXTRAS.items()}
    whole = [extra for extra, names in missing.items() if not names]
    if site.container.use == "none" and missing["train"]:
        hint = "pip install 'ftlaunch[train]', or a site with a container"
        yield Check("error", "packages", f"{', '.join(missing['train'])}: not installed, and site {site.name} uses no container", hint)
    else:
        absent = ", ".join(extra for extra in EXTRAS if extra not in whole)
        yield Check("ok", "packages", f"optional parts installed: {', '.join(whole) or 'none'}" + (f"; not: {absent}" if absent else ""))


def slurm_tool_checks(tools: Mapping[str, str]) -> Iterator[Check]:
    """``tools``: name → path of those that are here."""
    missing = [name for name in REQUIRED if name not in tools]
    if missing:
        hint = "run this on a login node of the cluster, or choose a site without Slurm: --site local"
        yield Check("error", "slurm-tools", f"{', '.join(missing)}: not found on this machine", hint)
        return
    yield Check("ok", "slurm-tools", f"Slurm's programs: {os.path.dirname(tools['sbatch'])}")
    for name in OPTIONAL:
        if name not in tools:
            yield Check("warning", "slurm-tools", f"{name}: not found; status then knows less of jobs that ended")
    answer = call([tools["scontrol"], "ping"], timeout_s=20)
    if answer.code == 0 and re.search(r"\bUP\b", answer.stdout):
        yield Check("ok", "controller", answer.stdout.strip().splitlines()[0])
    else:
        yield Check("error", "controller", f"Slurm's controller does not answer: {answer.reason}", "try again later; then ask the centre")


def cluster_checks(site: Site, cluster: Cluster, groups: frozenset[str], account: str | None) -> Iterator[Check]:
    """This user's rights, and what the site's file says against what Slurm says. ``account``: what the environment or the site names."""
    for command, reason in cluster.failed.items():
        yield Check("warning", "slurm-silent", f"{command}: {reason}")
    if not cluster.config:
        return
    rights = rights_of(cluster, groups)
    if not cluster.has_accounting:
        yield Check("ok", "accounting", "Slurm keeps no accounts here: no account is needed")
    elif rights.unknown_user:
        hint = "ask the centre for an account, and name it: --account, or default_account of the site"
        yield Check("error", "accounting", "Slurm's accounting does not know you: jobs are refused", hint)
    elif rights.accounts:
        yield Check("ok", "accounting", f"accounts: {', '.join(sorted(rights.accounts))}; default: {cluster.default_account or 'none'}")
    if account is not None and rights.accounts and account not in rights.accounts:
        yield Check("error", "account", f"account {account} is not yours", f"--account: {', '.join(sorted(rights.accounts))}")
    elif account is None and (site.account == "required" or rights.account_required):
        hint = f"default_account of the site, or --account: {', '.join(sorted(rights.accounts)) or 'ask the centre'}"
        yield Check("warning", "account", "an account must be named with every job", hint)
    found = {partition.name: partition for partition in cluster.partitions}
    for name, entry in site.partitions.items():
        if found and name not in found:
            yield Check(
                "warning", "partition", f"Slurm knows no partition {name}, which site {site.name} lists", f"known: {', '.join(found)}"
            )
            continue
        if name in rights.left_out:
            yield Check("warning", "partition", f"partition {name}: {rights.left_out[name]}", "leave it out, or choose another")
        limit_min = found[name].max_time_min if name in found else None
        if entry.max_time is not None and limit_min is not None and duration_min(entry.max_time) > limit_min:
            message = f"partition {name}: the site says max_time {entry.max_time}, Slurm {limit_min} min"
            yield Check("warning", "partition", message, "ftlaunch site discover shows what holds now")


def apptainer_checks(site: Site, found: Apptainer) -> Iterator[Check]:
    """``found``: what the site's command is on this machine."""
    if site.container.use == "none":
        yield Check("ok", "apptainer", f"site {site.name} uses no container")
        return
    builds = site.build.on == "here"
    if found.path is None:
        module = f"module load {site.container.module}" if site.container.module else None
        hint = module or "install apptainer 1.2 or newer, or set container.command or container.module of the site"
        where = f"{site.container.command}: not found on this machine"
        yield Check("error" if builds else "warning", "apptainer", where, hint if builds else "ftlaunch doctor --probe looks on a node")
        return
    yield Check("ok", "apptainer", f"{found.path} {found.version or 'of an unknown version'}")
    number = re.match(r"(\d+)\.(\d+)", found.version or "")
    if number and (int(number[1]), int(number[2])) < (1, 2) and "apptainer" in Path(found.path).name:
        yield Check("warning", "apptainer-version", f"Apptainer {found.version} is older than 1.2, the oldest that ftlaunch is made for")
    if found.setuid:
        yield Check("ok", "apptainer-mount", "setuid: images are mounted by the kernel and used as they are")
    elif found.setuid is False:
        means = "no setuid: images would be mounted by FUSE, which dies of the stop signal, so they are unpacked once per node"
        yield Check("ok", "apptainer-mount", means)
    else:
        yield Check("warning", "apptainer-mount", "Apptainer does not say how it mounts images", "container.mount: unpack is always safe")
    if found.user_namespaces is False and not found.setuid:
        hint = "ask the centre for user namespaces or a setuid Apptainer"
        yield Check(
            "error", "user-namespaces", "no user namespaces and no setuid Apptainer: images can be neither built nor used here", hint
        )
    if builds and not found.subordinate_ids:
        hint = "ask for lines of yours in /etc/subuid and /etc/subgid, or build elsewhere: ftlaunch build --print-only"
        yield Check("warning", "fakeroot", "no subordinate ids for you (or no newuidmap): some packages fail in builds without root", hint)
    elif builds:
        yield Check("ok", "fakeroot", "builds without root: subordinate ids are there")
    if not found.fuse and not found.setuid:
        yield Check("warning", "fuse", "/dev/fuse cannot be used: Apptainer unpacks images for every command here, which is slow")


def folder_checks(site: Site, folders: Folders, home: Path, mounts: Sequence[tuple[str, str]]) -> Iterator[Check]:
    """Room, rights and place of the site's folders."""
    for name in ("runs", "images", "data"):
        folder: Path = getattr(folders, name)
        place = folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            yield Check(
                "error", "folder", f"{name}: {folder}: {place} cannot be written", f"{name} of the site, or FTLAUNCH_{name.upper()}"
            )
            continue
        try:
            state = os.statvfs(place)
        except OSError as error:
            yield Check("error", "folder", f"{name}: {folder}: {error.strerror}", f"{name} of the site")
            continue
        free, files = state.f_bavail * state.f_frsize, state.f_favail if state.f_files else None
        kind = filesystem_of(str(place), mounts)
        text = f"{name}: {folder}: {gib(free)} free on {kind or 'an unknown file system'}" + ("" if files is None else f", {files} files")
        if free < FULL_BYTES:
            yield Check("error", "disk", text, "make room, or name another folder in the site")
        elif free < LITTLE_BYTES or (files is not None and files < LITTLE_FILES):
            yield Check("warning", "disk", text, "little for models and checkpoints; check says what a run needs")
        elif site.scheduler == "slurm" and not SHARED.fullmatch(kind):
            yield Check(
                "warning", "folder-shared", f"{text}: not a shared file system by its type", "ftlaunch doctor --probe looks from a node"
            )
        elif site.scheduler == "slurm" and _inside(folder, home):
            yield Check("warning", "folder-home", f"{text}, inside home, which is small on most clusters", f"{name} of the site")
        else:
            yield Check("ok", "folder", text)


def home_checks(home: Path, environ: Mapping[str, str]) -> Iterator[Check]:
    """How full home is, by the file system and by ``quota`` where there is one."""
    try:
        state = os.statvfs(home)
    except OSError as error:
        yield Check("warning", "home", f"home {home}: {error.strerror}", "runs need no home; presets and sites of yours lie there")
        return
    free = state.f_bavail * state.f_frsize
    used, limit = _quota(home)
    left = free if limit is None or used is None else min(free, limit - used)
    text = f"home {home}: {gib(left)} free" + ("" if limit is None else f" of a quota of {gib(limit)}")
    if not os.access(home, os.W_OK):
        yield Check("warning", "home", f"home {home} cannot be written", "runs need no home; set FTLAUNCH_SITE to the path of a site file")
    elif left < FULL_BYTES:
        yield Check("warning", "home", text, "make room: on some clusters a full home fails every job")
    else:
        yield Check("ok", "home", text)
    inside = [name for name in ("HF_HOME", "APPTAINER_CACHEDIR", "APPTAINER_TMPDIR", "TORCH_HOME") if _inside_home(environ.get(name), home)]
    if inside:
        yield Check("warning", "caches", f"{', '.join(inside)}: in home", "point them to the shared file system, or unset them")


def machine_checks(site: Site, folders: Folders | None, environ: Mapping[str, str], *, unicode: bool) -> Iterator[Check]:
    """Temporary folder, package index, driver, clocks, terminal."""
    temporary = Path(tempfile.gettempdir())
    space = space_of(temporary)
    if space.ram_backed:
        yield Check("warning", "tmp", f"{temporary} is memory (tmpfs), {gib(space.free_bytes)} usable", "set TMPDIR to a folder on disk")
    else:
        yield Check("ok", "tmp", f"{temporary}: {gib(space.free_bytes)} free, on disk")
    if site.container.use == "apptainer" and site.build.on == "here":
        tried = index_reachable(sys.executable, site.mirrors.pip_index)
        if tried.works:
            yield Check("ok", "index", "the package index answers: images can be built here")
        else:
            hint = "mirrors.pip_index of the site, a proxy (https_proxy), or build elsewhere: ftlaunch build --print-only"
            yield Check("warning", "index", f"the package index does not answer: {tried.why}", hint)
    driver = kernel_driver()
    here = f"NVIDIA driver {driver} on this machine" if driver else "no NVIDIA driver on this machine"
    yield Check("ok", "driver", here + ("" if driver or site.scheduler == "none" else ", as is usual on a login node"))
    if folders is not None:
        yield from clock_checks(folders.runs)
    if unicode:
        yield Check("ok", "terminal", "the terminal's encoding is UTF-8")
    else:
        yield Check("ok", "terminal", "the terminal's encoding is not UTF-8: output is drawn in ASCII (LANG=C.UTF-8 changes it)")


def clock_checks(runs: Path, *, now: float | None = None) -> Iterator[Check]:
    """The file server's clock against this machine's, by a file without a name. ``now``: seconds since 1970; default: the clock."""
    place = runs
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
            skew_s = os.fstat(file.fileno()).st_mtime - (time.time() if now is None else now)
    except OSError:
        return  # said by folder_checks already
    if abs(skew_s) > SKEW_S:
        yield Check("warning", "clock", f"the clock of {place} differs by {skew_s:.0f} s from this machine's", "tell the centre")
    else:
        yield Check("ok", "clock", f"the clock of {place} agrees with this machine's")


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _quota(home: Path) -> tuple[int | None, int | None]:
    """Bytes used and allowed in home, where ``quota`` knows its file system."""
    answer = call(["quota", "-w", "-p"], timeout_s=10)
    device = _device(home)
    for line in answer.stdout.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == device and words[1].rstrip("*").isdigit():
            limit = max(int(words[2]), int(words[3])) if words[2].isdigit() and words[3].isdigit() else 0
            return int(words[1].rstrip("*")) * 1024, limit * 1024 or None
    return None, None


def _device(folder: Path, mounts: str = "/proc/self/mounts") -> str:
    real, best, device = os.path.realpath(folder), "", ""
    for line in Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines():
        source, point, *_ = line.split(" ")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, device = point, source
    return device


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _inside_home(path: str | None, home: Path) -> bool:
    return bool(path) and _inside(Path(path or ""), home)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
