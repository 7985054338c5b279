"""Runs that are cancelled, here and through Slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import checkpoint
from launcher.errors import ActionError
from launcher.run import Run
from launcher.state import Known, state_of
from launcher.submit import cancel, resume, submit
from tests.fake_slurm import FakeSlurm
from tests.toy import names, toy_run
from tests.toy_runs import FOREVER, ended, slurm_plan, wait_until


def test_cancel_here_saves(local: Callable[..., Run]) -> None:
    run = local(**FOREVER)
    submit(run)
    wait_until(run.metrics_file.exists, run)
    cancel(run, now=False)
    wait_until(lambda: ended(run), run)
    assert state_of(run, Known()) == "cancelled"
    assert len(checkpoint.committed(run)) == 1


def test_cancel_now_here_saves_nothing(local: Callable[..., Run]) -> None:
    run = local(**FOREVER)
    submit(run)
    wait_until(run.metrics_file.exists, run)
    cancel(run, now=True)
    wait_until(lambda: ended(run), run)
    assert state_of(run, Known()) == "cancelled"
    assert checkpoint.committed(run) == []


def test_cancel_asks_waiting_and_running_jobs(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("squeue", {"out": "4711|RUNNING|None\n"})
    cancel(run, now=False)
    assert [call["argv"][1:] for call in slurm.calls("scancel")] == [["--state=PENDING", "4711"], ["--batch", "--signal=INT", "4711"]]
    assert names(run) == ["submitted", "cancel_requested"]


@pytest.mark.parametrize(
    "squeue",
    [
        pytest.param({"out": "4711|CANCELLED|None\n"}, id="cancelled"),
        pytest.param({"code": 1, "err": "slurm_load_jobs error: Invalid job id specified\n"}, id="left-the-queue"),
    ],
)
def test_cancelled_waiting_job_is_over_and_can_be_resumed(tmp_path: Path, slurm: FakeSlurm, squeue: dict[str, Any]) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("squeue", squeue)
    slurm.answer("sacct", {"code": 1, "err": "Slurm accounting storage is disabled\n"})
    cancel(run, now=False)
    assert names(run) == ["submitted", "cancel_requested", "cancelled"] and len(slurm.calls("scancel")) == 1
    assert state_of(run, Known("unknown")) == "cancelled"
    slurm.answer("sbatch", {"out": "4712\n"})
    resume(run)
    assert state_of(run, Known("pending")) == "queued"


def test_cancel_now_ends_the_newest_job(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    run.append_event("continued", life=0, job_id="4711", next_job_id="4712")
    cancel(run, now=True)
    assert [call["argv"][1:] for call in slurm.calls("scancel")] == [["4712"]]
    assert state_of(run, Known("running")) == "cancelled"


def test_cancel_of_a_job_that_is_gone_already(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Seen: scancel of a job that was just requeued ends it and says ``Invalid job id``."""
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("scancel", {"code": 1, "err": "scancel: error: Kill job error on job step id 4711: Invalid job id specified\n"})
    slurm.answer("squeue", {"out": "4711|CANCELLED|None\n"})
    cancel(run, now=True)
    assert names(run)[-1] == "cancelled"


def test_cancel_that_slurm_refuses(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("scancel", {"code": 1, "err": "scancel: error: Kill job error on job id 4711: Access denied\n"})
    slurm.answer("squeue", {"out": "4711|RUNNING|None\n"})
    with pytest.raises(ActionError, match="Access denied"):
        cancel(run, now=True)
    assert "cancelled" not in names(run)
