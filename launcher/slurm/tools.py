"""Calling Slurm's programs: found once, argument lists, bounded in time, in a clean environment. Standard library only (Python 3.9)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ActionError, MissingError

REQUIRED = ("sbatch", "srun", "scontrol", "scancel")
OPTIONAL = ("squeue", "sacct")

TIMEOUT_S = 60
SBATCH_TIMEOUT_S = 300
"""Longer, since a job may have been accepted when its answer does not come."""

NO_ANSWER = 124
"""A program that did not answer in time, as ``timeout`` says it."""

NO_PROGRAM = 127
"""A program that is not there, as a shell says it."""

_PREFIX = re.compile(r"^(sbatch|scontrol|scancel|squeue|sacct|srun): (error: )?")

_UNREACHABLE = re.compile(r"contact|connect|communication|timed out|did not answer|zero bytes|try again", re.IGNORECASE)

_LOST_ANSWER = re.compile(r"timed out|zero bytes", re.IGNORECASE)
"""What sbatch says when it asked the controller and lost the answer."""

_SCRUBBED_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI", "SUBMITIT_", "FTLAUNCH_LIFE", "FTLAUNCH_SUBMITIT")
_SCRUBBED_NAMES = frozenset(["PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])


class Unanswered(ActionError):
    """sbatch did not say what became of the job: it may have been accepted."""


@dataclass(frozen=True)
class Answer:
    """What a program said. ``code`` is NO_PROGRAM when it is missing and NO_ANSWER when it did not answer in time."""

    code: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """What it said, on one line: a site's own message often comes before Slurm's, or on standard output."""
        lines = [_PREFIX.sub("", line.strip()) for line in [*self.stderr.splitlines(), *self.stdout.splitlines()] if line.strip()]
        return "; ".join(lines)[:500] or f"exit code {self.code}"

    @property
    def unreachable(self) -> bool:
        """Whether it failed because the controller could not be asked, which says nothing about the question."""
        return self.code != 0 and bool(_UNREACHABLE.search(self.reason))


def find_tools() -> dict[str, str]:
    """Name → absolute path, found when submitting: what a batch script loads later may hide them.

    Errors: MissingError (4) when this machine cannot submit.
    """
    found = {name: path for name in (*REQUIRED, *OPTIONAL) if (path := shutil.which(name))}
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise MissingError(
            f"{', '.join(missing)}: not found on this machine",
            code="no-slurm",
            hint="run this on a login node of the cluster, or choose a site without Slurm: --site local",
        )
    return {name: os.path.abspath(path) for name, path in found.items()}


def call(argv: Sequence[str], *, environ: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = TIMEOUT_S) -> Answer:
    """Run one of Slurm's programs to its end. In a session of its own: a Ctrl-C in the terminal is for us, not for it."""
    try:
        done = subprocess.run(
            list(argv),
            env=None if environ is None else dict(environ),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Answer(NO_ANSWER, "", f"{argv[0]} did not answer within {timeout_s:g} s")
    except OSError as error:
        return Answer(NO_PROGRAM, "", f"{argv[0]}: {error.strerror}")
    return Answer(done.returncode, done.stdout, done.stderr)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what an allocation, submitit or another Python left in it: a job must not depend on where it was submitted.

    SLURM_CONF stays: it says where Slurm is.
    """
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name in _SCRUBBED_NAMES or name.startswith(_SCRUBBED_PREFIXES))
    }


def sbatch(
    program: str, script: Path, *, environ: Mapping[str, str], options: Sequence[str] = (), extra: Mapping[str, str] | None = None
) -> str:
    """Submit ``script`` from its own folder's run; returns the job id. ``extra`` is added to the job's environment.

    Errors: ActionError (5) with Slurm's own reason on one line; Unanswered (5) when the job may have been accepted all the same;
    MissingError (4) when ``program`` is not there.
    """
    environ = {**clean_environment(environ), **(extra or {})}
    answer = call([program, "--parsable", *options, str(script)], environ=environ, cwd=script.parent, timeout_s=SBATCH_TIMEOUT_S)
    if answer.code == NO_PROGRAM:
        raise MissingError(answer.reason, code="no-slurm")
    job_id = answer.stdout.strip().splitlines()[-1].partition(";")[0] if answer.stdout.strip() else ""
    if answer.code == 0 and job_id.isdigit():
        return job_id
    # No answer and a death by signal are ours; with 0 it was accepted, whatever sbatch printed.
    if answer.code in (0, NO_ANSWER) or answer.code < 0 or _LOST_ANSWER.search(answer.reason):
        raise Unanswered(
            f"sbatch gave no job id for {script}, which may have been accepted: {answer.reason}",
            code="sbatch-unanswered",
            hint=f"before anything else, look: squeue --name={_job_name(script)}; resume the run only if there is no such job",
        )
    raise ActionError(f"sbatch refused {script}: {answer.reason}", code="sbatch-refused")


def after_options(jobs: Sequence[str]) -> list[str]:
    """sbatch's options for a job that waits until ``jobs`` have ended well; it is cancelled where one of them fails."""
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []


def _job_name(script: Path) -> str:
    """As the script asks for it, else as Slurm chooses it."""
    named = re.search(r"^#SBATCH --job-name=(.+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    return named[1] if named else script.name
