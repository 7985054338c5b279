"""Where a life happens: this machine, or the nodes of a Slurm job. Prepares the image there, starts the ranks, cleans up.

Standard library only (Python 3.9).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import ranks
from launcher.caches import cache_of_site, make_cache
from launcher.errors import ActionError, GateError, UsageError
from launcher.image.unpack import read_log, remove, remove_command, unpack, unpack_command
from launcher.plan import Plan
from launcher.processes import LocalRanks, Ranks, StepRanks
from launcher.ranks import Place
from launcher.run import Run
from launcher.slurm.job import Job
from launcher.slurm.tools import call

CLEAN_TIMEOUT_S = 60.0

STOP_DEATHS = frozenset({-signal.SIGTERM, -signal.SIGUSR2, 128 + signal.SIGTERM, 128 + signal.SIGUSR2})
"""Exit codes of a process that met a stop before it had handlers."""

TO_THE_RANKS = "the scheduler, to the ranks"
"""Source of a stop that this process did not hear of: at a preemption Slurm tells only the steps."""


class StepAskedToStop(Exception):
    """The scheduler ended the step that was making the image ready."""


@dataclass(frozen=True)
class Node:
    """The nodes of one life. ``job`` is None on this machine."""

    run: Run
    plan: Plan
    place: Place
    names: list[str]
    job: Job | None

    @property
    def job_id(self) -> str | None:
        return self.job.job_id if self.job else None

    def prepare(self, stop_wanted: Callable[[], bool]) -> list[str]:
        """Make the image usable on every node; gives up when a stop is wanted. Returns what is worth a line in the log.

        Errors: GateError when no disk has room (another life would meet it again), ActionError.
        """
        container = self.plan.container
        if container.use == "none":
            return []
        assert container.image is not None
        folders, shared = self.plan.site["local_disk"], ranks.shared_folder(self.run, self.place)
        if self.job is None:
            done = unpack(
                container.image,
                container.command,
                folders,
                job=self.place.job,
                life=self.place.life,
                node=socket.gethostname(),
                mode=self.plan.site["container"]["mount"],
                shared=shared,
                ranks_bytes=self._ranks_bytes(),
                owner_pid=os.getpid(),
            )
            with open(self.run.unpack_log(self.place.life), "a", encoding="utf-8") as log:
                log.write(json.dumps(asdict(done)) + "\n")
            return _remarks([asdict(done)])
        command = unpack_command(
            self.place.python,
            container.image,
            container.command,
            folders,
            job=self.place.job,
            life=self.place.life,
            mode=self.plan.site["container"]["mount"],
            shared=str(shared),
            ranks_bytes=self._ranks_bytes(),
            squeue=self.job.tools.get("squeue"),
        )
        return self._on_every_node(command, stop_wanted)

    def start(self) -> Ranks:
        run, plan, place = self.run, self.plan, self.place
        if place.cache is None:
            run.cache.mkdir(mode=0o700, exist_ok=True)
        elif self.job is None:  # in a job each task makes its node's
            make_cache(Path(place.cache))
        if self.job is not None:
            command, environment = ranks.step_command(run, plan, place), ranks.step_environment(run, plan, place, os.environ)
            return StepRanks(command, environment, plan.world_size, run.life(place.life) / "srun.log")
        numbers = range(plan.world_size)
        return LocalRanks(
            [ranks.rank_command(run, plan, place) for _ in numbers],
            [ranks.local_environment(run, plan, place, rank, os.environ) for rank in numbers],
            [run.rank_log(place.life, rank) for rank in numbers],
            run.code,
        )

    def clean(self, *, within_s: float = CLEAN_TIMEOUT_S) -> None:
        """Remove what ``prepare`` left on the nodes; what is not removed by then is swept by a later life."""
        if self.plan.container.use == "none":
            return
        shared = ranks.shared_folder(self.run, self.place)
        if self.job is None:
            remove(job=self.place.job, life=self.place.life, node=socket.gethostname(), shared=shared)
            return
        command = remove_command(self.place.python, job=self.place.job, life=self.place.life, shared=str(shared))
        call(self._step(command), environ=self._environment(), timeout_s=within_s)

    def _ranks_bytes(self) -> int | None:
        """Memory that the ranks of a node take, as predicted; what the image takes of it is not theirs."""
        memory = self.plan.memory
        return None if memory is None else int((memory.host_per_node_gib - memory.ram_disk_gib) * 2**30)

    def _on_every_node(self, command: list[str], stop_wanted: Callable[[], bool]) -> list[str]:
        log = self.run.unpack_log(self.place.life)
        with open(log, "ab") as output:
            step = subprocess.Popen(self._step(command), env=self._environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        while step.poll() is None:
            if stop_wanted():
                step.send_signal(signal.SIGTERM)  # srun answers by killing the step
                step.wait()
                return []
            time.sleep(0.2)
        if step.returncode in STOP_DEATHS:
            raise StepAskedToStop(TO_THE_RANKS)
        if step.returncode != 0:
            error = ActionError if step.returncode != GateError.exit_code else GateError
            raise error(f"the image could not be made usable on every node: {_reason(log)}; see {log}", code="unpack")
        return _remarks(read_log(log.read_text(encoding="utf-8", errors="replace")))

    def _step(self, command: list[str]) -> list[str]:
        """One task on each node, beside nothing else."""
        assert self.place.srun is not None
        nodes = self.plan.layout.nodes
        spread = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.plan.layout.cpus_per_rank}"]
        return [self.place.srun, *spread, "--mpi=none", "--export=ALL", f"--chdir={self.run.code}", *command]

    def _environment(self) -> dict[str, str]:
        return ranks.step_environment(self.run, self.plan, self.place, os.environ)


def node_here(run: Run, plan: Plan, life: int) -> Node:
    """This machine, without a scheduler."""
    place = Place(life, "127.0.0.1", free_port(), sys.executable, f"{run.id}-{os.getpid()}", cache=cache_of_site(plan, os.environ))
    return Node(run, plan, place, [socket.gethostname()], None)


def free_port() -> int:
    """For ranks on this machine: above those of ``slurm_port``, below those that systems hand out to anybody meanwhile.

    Errors: ActionError when a hundred are taken.
    """
    for _ in range(100):
        port = 30000 + secrets.randbelow(2768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ActionError("no free port between 30000 and 32767", code="no-port", hint="what listens there? ss -ltn")


def node_of_job(run: Run, plan: Plan, life: int) -> Node:
    """The nodes of the Slurm job that this process is the batch step of. Errors: UsageError outside of one, ActionError."""
    job_id, node_list = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
    if not job_id or not node_list:
        raise UsageError("this run belongs to Slurm", code="not-in-a-job", hint=f"cd {run.root} && sbatch job.sbatch")
    job = Job(job_id, run.record()["tools"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    names = job.node_names(node_list)
    suffix = plan.site["network"]["host_suffix"]
    address = f"{names[0]}{suffix}" if suffix else job.node_address(names[0])
    cache = cache_of_site(plan, os.environ)
    place = Place(life, address, ranks.slurm_port(job_id, life), sys.executable, job_id, job.tools["srun"], cache)
    return Node(run, plan, place, names, job)


def _reason(log: Path) -> str:
    """What the first node that failed said, else the step's last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = [f"{said['node']}: {said['error']}" for said in read_log(text) if "error" in said]
    lines = [line for line in text.splitlines() if line.strip()]
    return next(iter([*errors, *lines[-1:]]), "it said nothing")


def _remarks(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of nodes that could not put the image where it belongs."""
    said = []
    for node in nodes:
        if node.get("ram_backed"):
            said.append(f"{node['node']}: no disk has room for the image: it takes {node['bytes'] / 2**30:.1f} GiB of the job's memory")
        elif node.get("shared") and node["mode"] == "unpack":
            said.append(f"{node['node']}: no disk has room for the image: it is on the shared file system, in {node['image']}")
    return said
