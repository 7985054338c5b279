"""Submission, here and through Slurm: once, whole, or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ActionError, MissingError
from launcher.run import Run, boot_id, process_start, read_lease
from launcher.runs import create_run
from launcher.slurm.tools import Unanswered
from launcher.state import Known, state_of
from launcher.submit import AlreadyGoing, cancel, last_job_id, present_life, resume, submit, turns
from tests.fake_slurm import FakeSlurm
from tests.toy import names, toy_plan, toy_run
from tests.toy_runs import FOREVER, ended, slurm_plan, wait_until


def test_no_slurm_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="sbatch, srun, scontrol, scancel: not found") as caught:
        create_run(slurm_plan(), lambda run: {}, "", tmp_path / "runs")
    assert caught.value.exit_code == 4 and not (tmp_path / "runs").exists()


def test_submitted_here_lives_on_its_own(local: Callable[..., Run]) -> None:
    run = local()
    pid = int(submit(run))
    wait_until(lambda: ended(run), run)
    assert names(run) == ["submitted", "started", "finished"]
    lease = read_lease(run)
    assert lease is not None and lease.pid == pid
    assert not (run.root / ".submitting").exists()


def test_supervisor_has_a_session_of_its_own(local: Callable[..., Run]) -> None:
    run = local(**FOREVER)
    pid = int(submit(run))
    assert os.getsid(pid) == pid != os.getsid(0)
    assert state_of(run, Known()) in ("queued", "running")
    cancel(run, now=False)
    wait_until(lambda: ended(run), run)


@pytest.mark.parametrize(
    ("events", "life"),
    [
        pytest.param([], 0, id="created"),
        pytest.param([("submitted", 0)], 0, id="waits"),
        pytest.param([("submitted", 0), ("started", 0)], 0, id="lives"),
        pytest.param([("submitted", 0), ("started", 0), ("requeued", 0)], 1, id="requeued"),
        pytest.param([("submitted", 0), ("started", 0), ("crashed", 0), ("started", 1)], 1, id="again"),
        pytest.param([("submitted", 0), ("started", 0), ("resumed", 1)], 1, id="resumed-after-a-loss"),
    ],
)
def test_present_life(tmp_path: Path, events: list[tuple[str, int]], life: int) -> None:
    run = toy_run(tmp_path, toy_plan())
    for event, number in events:
        run.append_event(event, life=number)
    assert present_life(run) == life


def test_present_life_after_one_that_failed_before_it_started(tmp_path: Path) -> None:
    run = toy_run(tmp_path, toy_plan())
    run.append_event("submitted", life=0)
    run.life(0).mkdir()
    run.supervisor_log(0).touch()
    assert present_life(run) == 0
    run.append_event("failed", life=0)
    assert present_life(run) == 1


def test_submission_by_submitit(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_ACCOUNT", "SLURM_CPUS_PER_TASK", "PMI_RANK", "PYTHONPATH"):
        monkeypatch.setenv(name, "leaks")
    monkeypatch.setenv("SLURM_CONF", "/etc/where/slurm.conf")
    run = toy_run(tmp_path / "my runs", slurm_plan())
    assert submit(run) == "4711" and last_job_id(run) == "4711"
    (call,) = slurm.calls("sbatch")
    assert call["argv"] == ["sbatch", "--parsable", str(run.root / "job.sbatch")]
    assert call["env"]["FTLAUNCH_SUBMITIT"] == "1" and call["env"]["SLURM_CONF"] == "/etc/where/slurm.conf"
    assert "leaks" not in call["env"].values()
    assert run.record()["tools"] == slurm.tools
    (pickle,) = run.submitit.glob("*.pkl")
    assert pickle.name == "4711_submitted.pkl" and str(run.root).encode() in pickle.read_bytes() and pickle.stat().st_size < 1000
    assert names(run) == ["submitted"] and run.events()[0]["job_id"] == "4711"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(
            {
                "code": 1,
                "err": "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
            },
            "Batch job submission failed: Invalid account or account/partition combination specified",
            id="account",
        ),
        pytest.param({"code": 1, "err": "sbatch: lua: give a time\nsbatch: error: refused\n"}, "lua: give a time; refused", id="lua"),
    ],
)
def test_refusal_is_one_line_and_leaves_nothing(tmp_path: Path, slurm: FakeSlurm, answer: dict[str, Any], message: str) -> None:
    slurm.answer("sbatch", answer)
    run = toy_run(tmp_path / "runs", slurm_plan())
    with pytest.raises(ActionError, match="sbatch refused") as caught:
        submit(run)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 5
    assert list((tmp_path / "runs").iterdir()) == []


def test_supervisor_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "runs", toy_plan())
    run.record_file.write_text(run.record_file.read_text().replace(sys.executable, "/nowhere/python"))
    with pytest.raises(ActionError, match="/nowhere/python: No such file"):
        submit(run)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_submission_waits_for_another_one(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    lock = run.root / ".submitting"
    lock.mkdir()
    (lock / "owner").write_text(f"another-host boot {os.getpid()} 1\n")
    other = threading.Timer(0.3, shutil.rmtree, [lock])
    other.start()
    assert submit(run) == "4711"
    other.join()


def test_it_does_not_wait_for_ever(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    lock = run.root / ".submitting"
    lock.mkdir()
    (lock / "owner").write_text(f"another-host boot {os.getpid()} 1\n")
    monkeypatch.setattr("launcher.submit.OTHER_SUBMISSION_S", 0.2)
    with pytest.raises(ActionError, match="is being submitted by somebody else"):
        submit(run)
    assert slurm.calls("sbatch") == []


def test_lock_of_a_dead_submission_is_taken_over(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    lock = run.root / ".submitting"
    lock.mkdir()
    (lock / "owner").write_text(f"{socket.gethostname()} {boot_id()} {os.getpid()} 1\n")
    assert submit(run) == "4711"
    assert not lock.exists()


def test_lock_of_a_dead_submission_is_taken_over_once(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    lock = run.root / ".submitting"
    lock.mkdir()
    (lock / "owner").write_text(f"{socket.gethostname()} {boot_id()} {os.getpid()} 1\n")

    def attempt(_: int) -> str:
        try:
            return submit(run)
        except ActionError:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        results = sorted(pool.map(attempt, range(8)))
    assert results == ["4711"] + ["refused"] * 7 and len(slurm.calls("sbatch")) == 1


def test_lock_of_the_living_is_not_moved_by_who_saw_the_dead_one(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    lock = run.root / ".submitting"
    dead, alive = (f"{socket.gethostname()} {boot_id()} {os.getpid()} {start}\n" for start in (1, process_start(os.getpid())))
    lock.mkdir()
    (lock / "owner").write_text(dead)
    read, times = Path.read_text, []

    def read_late(path: Path, *args: Any, **options: Any) -> str:
        text = read(path, *args, **options)
        if path == lock / "owner" and not times:  # another process takes over right after our look
            times.append(1)
            lock.rename(lock.with_name(f".submitting-{boot_id()}-{os.getpid()}-1"))
            lock.mkdir()
            (lock / "owner").write_text(alive)
        return text

    monkeypatch.setattr(Path, "read_text", read_late)
    monkeypatch.setattr("launcher.submit.OTHER_SUBMISSION_S", 0.2)
    with pytest.raises(ActionError, match="is being submitted by somebody else"):
        submit(run)
    assert (lock / "owner").read_text() == alive and slurm.calls("sbatch") == []


def test_second_submission_of_a_fresh_run_sees_that_it_goes(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Somebody found it created, and resumed it before who created it could submit it."""
    run = toy_run(tmp_path / "runs", slurm_plan())
    resume(run, seen=turns(run))
    with pytest.raises(AlreadyGoing) as caught:
        submit(run)
    assert caught.value.run == run and caught.value.exit_code == 5
    assert names(run) == ["resumed"] and len(slurm.calls("sbatch")) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"sleep_s": 60}, id="time-out"),
        pytest.param({"code": 1, "err": "sbatch: error: Socket timed out on send/recv operation\n"}, id="answer-lost"),
        pytest.param({"code": 0, "out": ""}, id="silence"),
        pytest.param({"code": 0, "out": "Submitted, I think\n"}, id="no-number"),
    ],
)
def test_job_that_may_have_been_accepted_keeps_its_run(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    slurm.answer("sbatch", answer)
    if "sleep_s" in answer:
        monkeypatch.setattr("launcher.slurm.tools.SBATCH_TIMEOUT_S", 0.5)
    run = toy_run(tmp_path / "runs", slurm_plan())
    with pytest.raises(Unanswered, match=r"may have been accepted.*squeue --name=toy") as caught:
        submit(run)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 5
    assert run.record_file.exists() and list(run.submitit.iterdir()) == []
    with pytest.raises(Unanswered):
        resume(run, job_script="#!/bin/bash\n")
    assert run.job_file(0).read_text() == "#!/bin/bash\n"


@pytest.mark.parametrize("act", [submit, resume])
def test_interrupt_cannot_lose_a_job(tmp_path: Path, slurm: FakeSlurm, act: Callable[[Run], str]) -> None:
    slurm.answer("sbatch", {"out": "4711\n", "interrupts": True})
    run = toy_run(tmp_path / "runs", slurm_plan())
    with pytest.raises(KeyboardInterrupt):
        act(run)
    assert last_job_id(run) == "4711" and not (run.root / ".submitting").exists()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
