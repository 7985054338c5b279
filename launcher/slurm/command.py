"""Jobs that run one ftlaunch command on a compute node: building an image, staging. Not the training's job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import __version__
from launcher.files import write_text
from launcher.preset.fields import duration_min, slurm_time
from launcher.preset.site import Site, Work
from launcher.slurm.tools import after_options, sbatch
from launcher.templating import render_template


@dataclass(frozen=True)
class Command:
    """What a job runs, and where it writes."""

    name: str
    """Name of the job: ``ftlaunch-build``."""
    arguments: tuple[str, ...]
    """After ``ftlaunch``."""
    folder: Path
    """Of its script and its log."""

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sbatch"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"


def command_script(command: Command, site: Site, work: Work, slurm: Mapping[str, str], *, python: str) -> str:
    """The batch script. ``slurm``: the user's options; account, qos, reservation and mail hold here too, the partition is the work's."""
    asked = [
        ("job-name", command.name),
        ("output", str(command.log)),
        ("open-mode", "append"),
        ("propagate", "NONE"),
        ("nodes", "1"),
        ("ntasks", "1"),
    ]
    if not site.whole_nodes:
        asked.append(("cpus-per-task", str(work.cpus)))
        if site.memory == "mem" or site.memory == "per_gpu":  # there is no GPU to ask it for
            asked.append(("mem", f"{work.memory_gib}G"))
        elif site.memory == "per_cpu":
            asked.append(("mem-per-cpu", f"{work.memory_gib * 1024 // work.cpus}M"))
    asked.append(("time", slurm_time(int(duration_min(work.time)))))
    partition = work.partition or slurm.get("partition")
    asked += [("partition", partition)] if partition else []
    asked += [(name, slurm[name]) for name in ("account", "qos", "reservation") if slurm.get(name)]
    module = site.container.module
    return render_template(
        "slurm/command.sbatch.j2",
        version=__version__,
        directives=asked,
        modules=[*site.modules, *([module] if module else [])],
        python=python,
        arguments=command.arguments,
        kept={name: os.environ[name] for name in ("FTLAUNCH_RUNS", "FTLAUNCH_IMAGES", "FTLAUNCH_DATA") if os.environ.get(name)},
    )


def submit_command(command: Command, text: str, program: str, *, after: Sequence[str] = ()) -> str:
    """Write the script and hand it to sbatch, to run when the jobs ``after`` have ended well; returns the job id. Errors: as ``sbatch``."""
    command.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(command.script, text)
    return sbatch(program, command.script, environ=os.environ, options=after_options(after))
