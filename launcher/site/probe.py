"""A tiny job that says what a node is like: made, submitted, waited for, read. What it found becomes checks and facts of the site."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import ActionError
from launcher.files import write_json, write_text
from launcher.plan import Plan
from launcher.preset.fields import slurm_time
from launcher.preset.hardware import Hardware
from launcher.preset.site import Site
from launcher.render import directives
from launcher.run import Run
from launcher.runs import copy_code
from launcher.site.checks import Check, gib
from launcher.site.kinds import kind_of
from launcher.slurm.queue import look_up
from launcher.slurm.tools import call, sbatch
from launcher.templating import render_template

LIMIT_MIN = 2

LOOK_S = 2.0
"""Between two looks into the folder, which cost Slurm nothing."""

ASK_S = 60.0
"""Between two questions to Slurm."""

LATE_S = 90.0
"""How long a file of another machine may take to appear after the job has ended."""

_REACHED = {True: "is reachable", False: "is not reachable", None: "was not asked"}


@dataclass(frozen=True)
class Probe:
    folder: Path

    @property
    def script(self) -> Path:
        return self.folder / "probe.sbatch"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    @property
    def log(self) -> Path:
        return self.folder / "probe.log"


def make_probe(plan: Plan, site: Site, folders: Mapping[str, Path], *, home: Path, python: str, tools: Mapping[str, str]) -> Probe:
    """Its folder lies beside the runs, which nodes must see anyway. ``plan``: how the site is asked for one small job."""
    runs = folders["runs"]
    runs.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = Probe(Path(tempfile.mkdtemp(prefix=".probe-", dir=runs)))
    (probe.folder / "code").mkdir()
    copy_code(probe.folder / "code" / "launcher")
    module = site.container.module
    write_text(
        probe.script,
        render_template(
            "slurm/probe.sbatch.j2",
            version=__version__,
            directives=probe_directives(plan, probe),
            folder=probe.folder,
            python=python,
            modules=[*site.modules, *([module] if module else [])],
        ),
    )
    questions = {
        "home": str(home),
        "folders": {name: str(path) for name, path in folders.items()},
        "local_disk": list(site.local_disk),
        "container": site.container.command if site.container.use == "apptainer" else None,
        "index": site.mirrors.pip_index,
        "sbatch": tools["sbatch"],
        "script": str(probe.script),
    }
    write_json(probe.folder / "questions.json", questions)
    return probe


def probe_directives(plan: Plan, probe: Probe) -> list[tuple[str, str]]:
    """As a run is asked for, but short and without a notice before its end."""
    own = {"job-name": "ftlaunch-probe", "output": str(probe.log).replace("%", "%%"), "time": slurm_time(LIMIT_MIN)}
    asked = dict(directives(plan, Run(probe.folder)))
    return [(name, own.get(name, value)) for name, value in {**asked, **own}.items() if name not in ("signal", "mail-user", "mail-type")]


def submit_probe(probe: Probe, tools: Mapping[str, str]) -> str:
    """Returns the job id. Errors: ActionError with Slurm's reason, MissingError; after both the folder is gone."""
    try:
        return sbatch(tools["sbatch"], probe.script, environ=os.environ)
    except BaseException:
        remove(probe)
        raise


def wait_for(
    probe: Probe,
    job_id: str,
    tools: Mapping[str, str],
    *,
    progress: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """The node's report. Errors: ActionError when the job ended without one, with the end of its log."""
    asked_at, gone_at, said = clock(), None, ""
    while True:
        if (found := _read(probe.report)) is not None:
            return found
        now = clock()
        if gone_at is not None and now - gone_at > LATE_S:
            raise ActionError(
                f"the probe (job {job_id}) ended without a report: {_tail(probe.log)}",
                code="probe-failed",
                hint=f"its log: {probe.log}; do nodes see this folder?",
            )
        if gone_at is None and now - asked_at >= ASK_S:
            asked_at, known = now, look_up([job_id], tools)[job_id]
            if known.state not in ("pending", "running", "ending", "unknown"):
                gone_at = now
            line = f"job {job_id} is {known.state}" + (f": {known.reason}" if known.reason else "")
            if line != said:
                progress(line)
                said = line
        sleep(LOOK_S)


def cancel(job_id: str, tools: Mapping[str, str]) -> str | None:
    """None when the job is cancelled, else Slurm's reason."""
    answer = call([tools["scancel"], job_id])
    return None if answer.code == 0 else answer.reason


def remove(probe: Probe) -> None:
    shutil.rmtree(probe.folder, ignore_errors=True)


def probe_checks(report: Mapping[str, Any], *, wants_gpus: int) -> list[Check]:
    """What the report means for runs."""
    node = report["node"]
    if report.get("python") is None:
        hint = "install ftlaunch into a Python that nodes have too, in a folder that they see"
        return [Check("error", "node-python", f"{node}: the Python of ftlaunch does not run there, or is older than 3.10", hint)]
    found = [Check("ok", "node-python", f"{node}: Python {report['python']['version']} runs there: {report['python']['executable']}")]
    gpus, driver = report["gpus"], report["driver"]
    if gpus:
        text = f"{len(gpus)} × {gpus[0]['name']}, {gpus[0]['memory_mib'] / 1024:.0f} GiB, driver {driver}, CUDA {report['cuda'] or '?'}"
        found.append(Check("ok" if len(gpus) >= wants_gpus else "warning", "node-gpus", f"{node}: {text}"))
    elif wants_gpus:
        hint = "is this the partition with GPUs, and gpu_request of the site how they are asked for?"
        found.append(Check("warning", "node-gpus", f"{node}: no GPU is visible (nvidia-smi shows none), {wants_gpus} asked for", hint))
    found += [_folder_check(node, name, facts) for name, facts in report["folders"].items()]
    home = report["home"]
    if not (home["visible"] and home["writable"]):
        how = "cannot be written" if home["visible"] else "is not there"
        found.append(Check("warning", "node-home", f"{node}: home {how}", "runs need no home: their caches lie in the run"))
    else:
        found.append(Check("ok", "node-home", f"{node}: home is visible and writable"))
    found.append(_disk_check(node, report["local_disk"]))
    found += _container_checks(node, report)
    for what, name in (("index", "the package index"), ("hub", "the hub")):
        tried = report["network"][what]
        says = f"{name} {_REACHED[tried['works']]}" + (f": {tried['why']}" if tried["why"] else "")
        found.append(Check("ok", f"node-{what}", f"{node}: {says}"))
    names = [f"{one['name']} ({one['kind']})" for one in report["interfaces"]]
    found.append(Check("ok", "node-network", f"{node}: network interfaces {', '.join(names) or 'unknown'}"))
    if report["sbatch"]["works"] is False:
        hint = "continuation: manual in the site's file, unless scontrol requeue works there"
        found.append(Check("warning", "node-sbatch", f"{node}: a job cannot submit another one: {report['sbatch']['why']}", hint))
    return found


def learned(
    report: Mapping[str, Any], site: Site, partition: str | None, hardware: Sequence[Hardware]
) -> dict[tuple[str, ...], str | int | bool | list[str]]:
    """What belongs into the site's file: path of keys → value."""
    facts: dict[tuple[str, ...], Any] = {}
    if report.get("python") is None:
        return facts
    if partition is not None:
        if report["driver"] and re.fullmatch(r"\d+(\.\d+)*", report["driver"]):
            facts[("partitions", partition, "driver")] = report["driver"]
        if report["cuda"]:
            facts[("partitions", partition, "cuda")] = report["cuda"]
        online = [tried["works"] for tried in report["network"].values() if tried["works"] is not None]
        if online:
            facts[("partitions", partition, "internet")] = any(online)
        own = site.partitions.get(partition)
        if report["gpus"] and (own is None or own.hardware is None):
            gpu = report["gpus"][0]
            said = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
            kind = kind_of(said, [f"gpu_{_sold_gb(gpu['memory_mib'])}gb"], hardware)
            if kind is not None and kind.name is not None:
                facts[("partitions", partition, "gpu")] = kind.name[:64]
                if kind.hardware is not None:
                    facts[("partitions", partition, "hardware")] = kind.hardware
    usable = [one["written"] for one in report["local_disk"] if one["why"] is None]
    if usable:
        facts[("local_disk",)] = usable
    if report["sbatch"]["works"] is False and site.continuation == "resubmit":
        facts[("continuation",)] = "manual"
    return facts


def _sold_gb(memory_mib: int) -> int:
    """Drivers report a little less than what a GPU is sold with."""
    sizes = (8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 128, 141, 144, 180, 192)
    return min((size for size in sizes if size * 1024 >= memory_mib), default=round(memory_mib / 1024))


def _folder_check(node: str, name: str, facts: Mapping[str, Any]) -> Check:
    if not facts["writable"]:
        hint = "name a folder on a file system that all nodes share, in the site's file"
        return Check("error", "node-folder", f"{node}: {name}: {facts['path']} cannot be written there", hint)
    free = "" if facts["free_bytes"] is None else f", {gib(facts['free_bytes'])} free"
    return Check("ok", "node-folder", f"{node}: {name}: {facts['path']} can be written{free}")


def _disk_check(node: str, disks: Sequence[Mapping[str, Any]]) -> Check:
    usable = [one for one in disks if one["why"] is None]
    refused = "; ".join(f"{one['written']} {one['why']}" for one in disks if one["why"] is not None)
    if not usable:
        return Check("error", "node-disk", f"{node}: no local disk: {refused}", "name one in local_disk of the site")
    best = next((one for one in usable if not one["ram_backed"]), usable[0])
    text = f"{node}: local disk {best['path']} ({best['written']}), {gib(best['free_bytes'])} free"
    if best["ram_backed"]:
        return Check("warning", "node-disk", f"{text}, in memory: an unpacked image takes it from the job's memory")
    return Check("ok", "node-disk", text)


def _container_checks(node: str, report: Mapping[str, Any]) -> list[Check]:
    container = report["container"]
    if container is None:
        return []
    if container["path"] is None:
        hint = "container.command or container.module of the site"
        return [Check("error", "node-apptainer", f"{node}: Apptainer is not there", hint)]
    how = {
        True: "setuid: images are mounted by the kernel",
        False: "no setuid: images are unpacked on the node",
        None: "does not say how it mounts",
    }[container["setuid"]]
    found = [Check("ok", "node-apptainer", f"{node}: {container['path']} {container['version'] or ''}, {how}")]
    if not container["setuid"] and report["user_namespaces"] is False:
        hint = "ask the centre for user namespaces or a setuid Apptainer"
        found.append(Check("error", "node-userns", f"{node}: no user namespaces and no setuid Apptainer: images cannot be used", hint))
    return found


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _tail(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log"
    return "; ".join(lines[-3:])[-400:] or "its log is empty"
