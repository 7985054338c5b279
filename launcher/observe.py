"""What a plan is checked against on this machine: free disk where the runs lie, a token for the hub; driver and disks that earlier lives
met.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launcher.hardware.fits import Observed
from launcher.image.unpack import read_log
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
    return Observed(
        disk_free_gib=free_gib,
        disk_free_files=free_files,
        driver=learned_driver(runs, site, hardware, partition),
        token=has_token(environ, home),
        ram_disk_gib=learned_ram_disk_gib(runs, site, hardware, partition),
    )


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


def learned_ram_disk_gib(runs: Path, site: str, hardware: str, partition: str | None) -> float:
    """Memory that the image took on a node of the newest life there that unpacked one; 0 where the nodes have disks, or nobody knows."""
    for run in reversed(all_runs(runs)[-NEWEST_RUNS:]):
        for life in reversed(range(run.lives_started())):
            try:
                nodes = read_log(run.unpack_log(life).read_text(encoding="utf-8", errors="replace"))
            except OSError:
                continue
            unpacked = [node for node in nodes if node.get("mode") == "unpack"]
            if unpacked and _same_nodes(run, site, hardware, partition):
                return max(node["bytes"] / 2**30 if node["ram_backed"] else 0.0 for node in unpacked)
    return 0.0


def _same_nodes(run: Run, site: str, hardware: str, partition: str | None) -> bool:
    try:
        plan = run.plan()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (plan.site["name"], plan.hardware["name"], plan.slurm.get("partition")) == (site, hardware, partition)
