"""The submitit plugin: submits a run's own batch script, and runs the supervisor as submitit's callable.

Loaded by every program that uses submitit (entry points ``executor`` and ``job_environment``), so it imports nothing of ours
that is not light. Both classes answer to the name ``ftlaunch``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from submitit.core import core
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmExecutor, SlurmJob, SlurmJobEnvironment

from launcher.errors import RunStopped, UsageError
from launcher.run import Run
from launcher.slurm.tools import sbatch

R = TypeVar("R")

SUBMITIT_VARIABLE = "FTLAUNCH_SUBMITIT"
"""Set in a job that submitit submitted: its script then runs the pickle instead of the supervisor alone."""


class FtlaunchExecutor(SlurmExecutor):
    """Submits ``<run>/job.sbatch`` as it stands: its folder is ``<run>/submitit``, its parameters are the plan's."""

    def __init__(self, folder: str | Path, max_num_timeout: int = 0) -> None:
        self.run = Run(Path(folder).absolute().parent)
        if not self.run.record_file.is_file():
            raise UsageError(f"{self.run.root} is not a run folder", code="no-run", hint="the executor's folder is RUN/submitit")
        core.PicklingExecutor.__init__(self, folder, max_num_timeout=max_num_timeout)
        self.life = self.run.lives_started()
        self.options: Sequence[str] = ()

    @classmethod
    def affinity(cls) -> int:
        """Never above plain Slurm's or this machine's, so that other programs' automatic choice stays what it was."""
        return -1 if shutil.which("sbatch") is None else 1

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return set()

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        if kwargs:
            raise UsageError(f"{', '.join(sorted(kwargs))}: the run's plan says what is asked of Slurm", code="executor-parameters")

    def map_array(self, fn: Callable[..., R], *iterable: Any) -> NoReturn:
        raise _no_arrays("map_array")

    def submit_array(self, fns: Sequence[Callable[[], R]]) -> NoReturn:
        raise _no_arrays("submit_array")

    def batch(self, allow_implicit_submissions: bool = False) -> NoReturn:
        raise _no_arrays("batch()")

    def _num_tasks(self) -> int:
        return 1

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[core.Job[Any]]:
        before = set(self.folder.glob("*.pkl"))
        try:
            return core.PicklingExecutor._internal_process_submissions(self, delayed_submissions)
        except BaseException:
            for left in set(self.folder.glob("*.pkl")) - before:
                left.unlink(missing_ok=True)
            raise

    @property
    def _submitit_command_str(self) -> str:
        return ""  # the run's script says what runs

    def _submit_command(self, command: str) -> core.Job[Any]:
        script = self.run.job_file(self.life)
        job_id = sbatch(
            self.run.record()["tools"]["sbatch"], script, environ=os.environ, options=self.options, extra={SUBMITIT_VARIABLE: "1"}
        )
        job: core.Job[Any] = SlurmJob(folder=self.folder, job_id=job_id, tasks=[0])
        return job


class FtlaunchJobEnvironment(SlurmJobEnvironment):
    """What submitit finds inside such a job."""

    def _handle_signals(self, paths: JobPaths, submission: DelayedSubmission) -> None:
        """Leave the signals alone: the batch script started us deaf to them, and the supervisor takes them over as its first act."""


def submit_run(run: Run, life: int, *, options: Sequence[str] = ()) -> str:
    """Submit the next life of ``run`` through submitit; returns the job id. ``options``: sbatch's, beside those of the script.

    Errors: ActionError, Unanswered, MissingError.
    """
    executor = FtlaunchExecutor(run.submitit)
    executor.life, executor.options = life, options
    return str(executor.submit(live, str(run.root)).job_id)


def live(folder: str) -> str:
    """What the pickle calls on the node: the supervisor. Its result is submitit's; a run that failed or stopped raises."""
    from launcher.errors import RunFailed
    from launcher.supervise import supervise

    code = supervise(folder)
    if code == RunStopped.exit_code:
        raise SystemExit(code)  # leaves no result: the job is over, the run is not
    if code != 0:
        raise RunFailed(Run(Path(folder)).events("failed")[-1].get("cause", "failed"), code="run-failed")
    return "finished"


def _no_arrays(what: str) -> UsageError:
    return UsageError(f"{what} is not supported: one run is one job", code="no-arrays", hint="submit runs one by one")
