"""What a plan is checked against on this machine: free disk where the runs lie, a token for the hub, the driver that earlier lives met."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launcher.hardware.fits import Observed
from launcher.run import Run
from launcher.runs import all_runs

NEWEST_RUNS = 30
"""How many of the newest runs are asked for their driver."""

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def observe(runs: Path | None, *, environ: Mapping[str, str], home: Path, site: str, hardware: str, partition: str | None) -> Observed:
    """``runs``: the folder of the runs, which need not exist yet; None where no folder was said, or no run could be made here."""
    if runs is None:
        return Observed(token=has_token(environ, home))
    free_gib, free_files = free_disk(runs)
    return Observed(free_gib, free_files, learned_driver(runs, site, hardware, partition), has_token(environ, home))


def free_disk(folder: Path) -> tuple[float | None, int | None]:
    """Free GiB and free files for this user at ``folder`` or the nearest folder above it; None where the file system does not say.

    A quota shows only where the file system counts it in (Lustre with project quotas, XFS; not NFS).
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError:
        return None, None
    return found.f_bavail * found.f_frsize / 2**30, found.f_favail if found.f_files else None


def has_token(environ: Mapping[str, str], home: Path) -> bool:
    """Whether the hub's libraries would find a token: in the environment, or in the file that their login writes."""
    cache = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    file = Path(environ.get("HF_TOKEN_PATH") or cache / "token")
    return any(environ.get(name) for name in TOKEN_VARIABLES) or file.is_file()


def has_nvidia() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists()


def learned_driver(runs: Path, site: str, hardware: str, partition: str | None) -> str | None:
    """The NVIDIA driver of the newest life on this site, hardware and partition that met one."""
    for run in reversed(all_runs(runs)[-NEWEST_RUNS:]):
        drivers = [str(event["driver"]) for event in run.events("driver") if event.get("driver")]
        if drivers and _same_nodes(run, site, hardware, partition):
            return drivers[-1]
    return None


def _same_nodes(run: Run, site: str, hardware: str, partition: str | None) -> bool:
    try:
        plan = run.plan()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (plan.site["name"], plan.hardware["name"], plan.slurm.get("partition")) == (site, hardware, partition)
