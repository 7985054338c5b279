"""When Slurm expects a job to start: asked once, bounded in time, never an error. Submits nothing. Standard library only (Python 3.9)."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from launcher.errors import Finding
from launcher.slurm.tools import NO_ANSWER, NO_PROGRAM, call, clean_environment

SLURM_REFUSES = "slurm-refuses"
"""Code of the warning that Slurm would not take the job as it is now."""

_WILL_START = re.compile(r"\bto start at (\S+)(?: using \d+ processors?)?(?: on (?:nodes? )?(\S+))?(?: in partition (\S+))?")
"""``sbatch: Job 42 to start at 2026-11-22T20:15:00 using 64 processors on nodes n[1-2] in partition gpu``, on standard error."""


@dataclass(frozen=True)
class Forecast:
    """What Slurm said when it was asked. Neither ``start`` nor ``refusal``: it could not be asked, or it did not say."""

    start: datetime | None = None
    """In this machine's time zone, as Slurm's programs print it; like them it does not name the zone."""
    nodes: str | None = None
    partition: str | None = None
    refusal: str | None = None
    """Why the job would not be accepted, in Slurm's own words."""
    reason: str | None = None
    """Why there is no forecast."""
    asked_s: float = 0.0
    """How long the question took."""

    @property
    def findings(self) -> list[Finding]:
        """A warning, since what an administrator changes meanwhile may let the job through."""
        if self.refusal is None:
            return []
        message = f"Slurm would refuse the job as it is now: {self.refusal}"
        return [Finding("warning", SLURM_REFUSES, message, hint="what it judges: --account --partition --qos --time --nodes --gpus")]

    def to_json(self) -> dict[str, str | None]:
        start = None if self.start is None else self.start.isoformat()
        return {"start": start, "nodes": self.nodes, "partition": self.partition, "refusal": self.refusal, "reason": self.reason}


def forecast_start(script: str, sbatch: str, *, environ: Mapping[str, str], timeout_s: float) -> Forecast:
    """Ask ``sbatch --test-only`` about a batch script that lies nowhere yet, in the environment that a submission would give it."""
    if timeout_s <= 0:
        return Forecast(reason="Slurm was asked long enough for the presets before this one")
    began = time.monotonic()
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch", prefix="ftlaunch-", encoding="utf-8") as file:
            file.write(script)
            file.flush()
            answer = call([sbatch, "--test-only", file.name], environ=clean_environment(environ), timeout_s=timeout_s)
    except OSError as error:
        return Forecast(reason=f"the batch script cannot be shown to sbatch: {error.strerror}")
    asked_s = time.monotonic() - began
    if answer.code == 0:
        said = _WILL_START.search(f"{answer.stderr}\n{answer.stdout}")
        start = None if said is None else _time(said[1])
        if said is None or start is None:
            return Forecast(reason="sbatch --test-only says no time", asked_s=asked_s)
        return Forecast(start, said[2], said[3], asked_s=asked_s)
    if answer.code in (NO_ANSWER, NO_PROGRAM) or answer.code < 0 or answer.unreachable:
        return Forecast(reason=answer.reason, asked_s=asked_s)
    return Forecast(refusal=answer.reason, asked_s=asked_s)


def expected_start(job_id: str, squeue: str | None, *, timeout_s: float) -> datetime | None:
    """When a job that waits will start as ``squeue --start`` has it; None where Slurm does not say: it plans few jobs ahead."""
    if squeue is None or not job_id.isdigit():
        return None
    argv = [squeue, "--start", "--noheader", "--format=%S", f"--jobs={job_id}"]
    answer = call(argv, environ=clean_environment(os.environ), timeout_s=timeout_s)
    return _time(answer.stdout.strip()) if answer.code == 0 else None


def _time(text: str) -> datetime | None:
    """``N/A`` and whatever else is no time: None."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
