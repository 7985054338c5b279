"""Sites as they are discovered from the recorded clusters, on login nodes that are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launcher.cli.site import known_gpus
from launcher.preset.reading import read_site
from launcher.preset.site import Site
from launcher.site.conclude import conclude
from launcher.site.machine_facts import Apptainer, Machine, Room
from launcher.site.site_file import site_text
from tests.fake_cluster import cluster_of

TODAY = "2026-11-22"
MACHINE = Machine(
    host="login1",
    user="student",
    groups=frozenset(["student", "users"]),
    rooms=(Room("$SCRATCH", "/scratch/student", "lustre", 9 * 2**40), Room("$WORK", "/project/student", "nfs4", 2**40)),
    small_rooms=(),
    has_modules=True,
    apptainer=Apptainer("/usr/bin/apptainer", "apptainer", "1.4.5", None, True, True, True, True),
)
POOR = replace(
    MACHINE,
    rooms=(),
    small_rooms=(Room("$WORK", "/project/student", "nfs4", 3 * 2**30),),
    has_modules=False,
    apptainer=Apptainer(None),
)
MODULE = replace(MACHINE, apptainer=Apptainer("/opt/apptainer/bin/apptainer", "apptainer", "1.3.3", "tacc-apptainer", False, True))
MACHINES = {"bare": POOR, "whole": MODULE}


def discovered(name: str) -> str:
    return site_text(conclude(cluster_of(name), MACHINES.get(name, MACHINE), known_gpus(), name=None, today=TODAY))


def site_of(text: str, folder: Path) -> Site:
    file = folder / "found.yaml"
    file.write_text(text)
    return read_site(str(file)).value
