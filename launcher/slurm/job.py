"""The Slurm job around a supervisor: where its nodes are, whether it was cancelled, how it goes on. Standard library only (Python 3.9)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import ActionError
from launcher.slurm.tools import Answer, call, sbatch

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Between attempts to reach a controller that does not answer."""

Fate = Literal["running", "requeued", "ending", "cancelled", "unknown"]
"""ending: the time limit or a preemption ends it, and Slurm does not requeue it by itself."""


@dataclass(frozen=True)
class Job:
    """The job that this process is the batch step of."""

    job_id: str
    tools: Mapping[str, str]
    """Name → absolute path, as found when submitting."""
    restarts: int = 0
    """How often Slurm had started this job before."""

    def node_names(self, node_list: str) -> list[str]:
        """``node[1-2]`` as names. Errors: ActionError when Slurm does not say."""
        answer = self._ask("show", "hostnames", node_list)
        if answer.code != 0 or not answer.stdout.split():
            raise ActionError(f"scontrol does not say what {node_list} is: {answer.reason}", code="scontrol")
        return answer.stdout.split()

    def node_address(self, name: str) -> str:
        """A node's name may resolve for Slurm only; its NodeAddr can be reached. Errors: ActionError when Slurm does not say."""
        answer = self._ask("show", "node", name, "-o")
        address = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
        if address is None:
            raise ActionError(f"scontrol does not say where {name} is: {answer.reason}", code="scontrol")
        return address[1]

    def fate(self) -> Fate:
        """What Slurm has decided about this job. While it ends, Slurm calls it COMPLETING, whatever the reason."""
        shown = call([self.tools["scontrol"], "show", "job", self.job_id, "-o"])
        if shown.code != 0:
            return "unknown"
        facts = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
        if int(facts.get("Restarts", "0")) > self.restarts or facts.get("JobState") in ("PENDING", "REQUEUED"):
            return "requeued"
        if facts.get("JobState") in ("RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT"):
            return "running"
        preempted = facts.get("PreemptTime", "None") not in ("None", "N/A")
        timed_out = facts.get("JobState") == "TIMEOUT" or _seconds(facts.get("RunTime", "")) >= _seconds(facts.get("TimeLimit", "")) > 0
        return "ending" if preempted or timed_out else "cancelled"

    def requeue(self, *, delays_s: Sequence[float] = RETRY_DELAYS_S) -> tuple[Literal["accepted", "cancelled", "refused"], str]:
        """Ask Slurm to run this job again. Returns what came of it and the reason.

        ``accepted`` is also said where Slurm requeues the job by itself already; ``cancelled``: somebody ended the job for good.
        """
        for delay_s in (*delays_s, None):
            fate = self.fate()
            if fate == "cancelled":
                return "cancelled", "the job was cancelled"
            if fate == "requeued":
                return "accepted", "Slurm had requeued it already"
            answer = call([self.tools["scontrol"], "requeue", self.job_id])
            if answer.code == 0:
                return "accepted", ""
            if delay_s is None or not answer.unreachable:
                return "refused", answer.reason
            time.sleep(delay_s)
        raise AssertionError("the last attempt returns")

    def follow_up(self, script: Path, time_min: int | None = None) -> str:
        """Submit ``script`` as a job that waits for the end of this one; returns its id. ``time_min``: in the place of its own limit.

        Errors: ActionError, MissingError.
        """
        longer = [] if time_min is None else [f"--time={time_min}"]
        return sbatch(self.tools["sbatch"], script, environ=os.environ, options=[f"--dependency=afterany:{self.job_id}", *longer])

    def _ask(self, *question: str) -> Answer:
        """``scontrol`` with a question that must be answered before anything can start; patient with a slow controller."""
        for delay_s in RETRY_DELAYS_S:
            answer = call([self.tools["scontrol"], *question])
            if not answer.unreachable:
                return answer
            time.sleep(delay_s)
        return answer


def _seconds(duration: str) -> int:
    """Of Slurm's ``[days-]hours:minutes:seconds``; 0 for UNLIMITED and anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", duration)
    if found is None:
        return 0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
