"""What a supervisor asks of Slurm: addresses, its job's fate, a requeue, a follow-up; and what the queue says, however it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ActionError
from launcher.slurm.job import Job
from launcher.slurm.queue import look_up
from launcher.slurm.tools import Answer, call
from launcher.state import JobState
from tests.fake_slurm import FakeSlurm, make_fake_slurm

QUICK = (0.0, 0.0)
RUNNING = {"out": "JobId=7 JobState=RUNNING Restarts=0 RunTime=00:00:10 TimeLimit=01:00:00 PreemptTime=None\n"}
UNREACHABLE = {"code": 1, "err": "scontrol: error: Unable to contact slurm controller (connect failure)\n"}
DISABLED = {"code": 1, "err": "Requested operation is presently disabled for job 7\n"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return make_fake_slurm(tmp_path / "bin", monkeypatch)


@pytest.mark.parametrize(
    ("facts", "fate"),
    [
        ("JobState=RUNNING Restarts=0 RunTime=00:00:10 TimeLimit=01:00:00", "running"),
        ("JobState=RUNNING Restarts=0 RunTime=02:00:00 TimeLimit=UNLIMITED", "running"),
        ("JobState=COMPLETING Restarts=1 RunTime=00:00:10 TimeLimit=01:00:00", "requeued"),
        ("JobState=PENDING Restarts=0 RunTime=00:00:00 TimeLimit=01:00:00", "requeued"),
        ("JobState=COMPLETING Restarts=0 RunTime=00:00:10 TimeLimit=01:00:00", "cancelled"),
        ("JobState=CANCELLED Restarts=0 RunTime=00:00:10 TimeLimit=UNLIMITED", "cancelled"),
        ("JobState=COMPLETING Restarts=0 RunTime=01:00:02 TimeLimit=01:00:00", "ending"),
        ("JobState=COMPLETING Restarts=0 RunTime=1-01:00:02 TimeLimit=1-01:00:00", "ending"),
        ("JobState=COMPLETING Restarts=0 RunTime=00:00:10 TimeLimit=01:00:00 PreemptTime=2026-11-22T15:41:21", "ending"),
    ],
)
def test_fate(slurm: FakeSlurm, facts: str, fate: str) -> None:
    slurm.answer("scontrol", {"out": f"JobId=7 JobName=a=b {facts}\n"})
    assert Job("7", slurm.tools).fate() == fate


def test_fate_of_an_earlier_restart(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", {"out": "JobState=COMPLETING Restarts=2 RunTime=00:00:10 TimeLimit=01:00:00"})
    assert (Job("7", slurm.tools, restarts=1).fate(), Job("7", slurm.tools, restarts=2).fate()) == ("requeued", "cancelled")


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        pytest.param([RUNNING, {}], ("accepted", ""), id="accepted"),
        pytest.param([RUNNING, DISABLED], ("refused", "Requested operation is presently disabled for job 7"), id="refused"),
        pytest.param([UNREACHABLE, UNREACHABLE, RUNNING, {}], ("accepted", ""), id="controller-came-back"),
        pytest.param([UNREACHABLE], ("refused", "Unable to contact slurm controller (connect failure)"), id="controller-down"),
        pytest.param([{"out": "JobState=PENDING"}], ("accepted", "Slurm had requeued it already"), id="slurm-was-faster"),
        pytest.param([{"out": "JobState=COMPLETING Restarts=0"}], ("cancelled", "the job was cancelled"), id="cancelled"),
    ],
)
def test_requeue(slurm: FakeSlurm, answers: list[dict[str, Any]], outcome: tuple[str, str]) -> None:
    slurm.answer("scontrol", *answers)
    assert Job("7", slurm.tools).requeue(delays_s=QUICK) == outcome


def test_cancelled_job_is_never_requeued(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", {"out": "JobState=COMPLETING Restarts=0"})
    Job("7", slurm.tools).requeue(delays_s=QUICK)
    assert [call["argv"][1] for call in slurm.calls("scontrol")] == ["show"]


def test_scontrol_is_gone(slurm: FakeSlurm) -> None:
    (slurm.folder / "scontrol").unlink()
    outcome, reason = Job("7", slurm.tools).requeue(delays_s=QUICK)
    assert outcome == "refused" and "No such file" in reason


def test_follow_up_waits_for_this_job_in_a_clean_environment(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "FTLAUNCH_SUBMITIT", "FTLAUNCH_LIFE", "PYTHONPATH", "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "leaks")
    slurm.answer("sbatch", {"out": "8;cluster\n"})
    assert Job("7", slurm.tools).follow_up(tmp_path / "job.sbatch") == "8"
    (call,) = slurm.calls("sbatch")
    assert call["argv"] == ["sbatch", "--parsable", "--dependency=afterany:7", str(tmp_path / "job.sbatch")]
    assert "leaks" not in call["env"].values() and call["cwd"] == str(tmp_path)


def test_node_names_and_address(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", {"out": "node1\nnode2\n"}, {"out": "NodeName=node1 NodeAddr=10.0.0.1 NodeHostName=x\n"})
    job = Job("7", slurm.tools)
    assert (job.node_names("node[1-2]"), job.node_address("node1")) == (["node1", "node2"], "10.0.0.1")


def test_node_that_slurm_does_not_know(slurm: FakeSlurm) -> None:
    slurm.answer("scontrol", {"code": 1, "out": "Node node9 not found\n"})
    with pytest.raises(ActionError, match="does not say where node9 is: Node node9 not found"):
        Job("7", slurm.tools).node_address("node9")


def test_slow_program_is_not_waited_for(tmp_path: Path) -> None:
    assert call(["sleep", "60"], timeout_s=0.1) == Answer(124, "", "sleep did not answer within 0.1 s")


# the queue


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("PENDING", "pending"),
        ("CONFIGURING", "pending"),
        ("REQUEUE_HOLD", "pending"),
        ("RUNNING", "running"),
        ("SUSPENDED", "running"),
        ("COMPLETING", "ending"),
        ("CANCELLED", "cancelled"),
        ("CANCELLED by 1000", "cancelled"),
        ("NODE_FAIL", "failed"),
        ("OUT_OF_MEMORY", "failed"),
        ("TIMEOUT", "failed"),
        ("COMPLETED", "completed"),
        ("SOMETHING_NEW", "unknown"),
        ("", "unknown"),
    ],
)
def test_words_of_slurm(slurm: FakeSlurm, word: str, state: JobState) -> None:
    slurm.answer("squeue", {"out": f"7|{word}|None\n"})
    assert look_up(["7"], slurm.tools)["7"].state == state
    assert slurm.calls("sacct") == []


def test_reason_of_a_waiting_job(slurm: FakeSlurm) -> None:
    slurm.answer("squeue", {"out": "7|PENDING|QOSMaxJobsPerUserLimit\n"})
    assert look_up(["7"], slurm.tools)["7"].reason == "QOSMaxJobsPerUserLimit"


def test_accounting_is_asked_for_what_left_the_queue(slurm: FakeSlurm) -> None:
    slurm.answer("squeue", {"out": "7|RUNNING|None\n"})
    slurm.answer("sacct", {"out": "8|COMPLETED|0:0\n8|COMPLETED|0:0\n"})
    found = look_up(["7", "8", "8"], slurm.tools)
    assert {job: known.state for job, known in found.items()} == {"7": "running", "8": "completed"}
    assert slurm.calls("sacct")[0]["argv"][-1] == "--jobs=8"


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        pytest.param({"out": ""}, {"out": ""}, "gone", id="nobody-knows-it"),
        pytest.param({"code": 1, "err": "slurm_load_jobs error: Invalid job id specified\n"}, {"out": ""}, "gone", id="invalid-job-id"),
        pytest.param(
            {"code": 1, "err": "Invalid job id"}, {"code": 1, "err": "accounting storage is disabled"}, "gone", id="no-accounting"
        ),
        pytest.param({"code": 1, "err": "Unable to contact"}, {"code": 1, "err": "no accounting"}, "unknown", id="nobody-answers"),
        pytest.param({"code": 1, "err": "Unable to contact slurm controller"}, {"out": ""}, "unknown", id="no-controller"),
        pytest.param({"code": 1, "err": "Unable to contact"}, {"out": "7|FAILED|1:0\n"}, "failed", id="accounting-alone"),
        pytest.param({"out": ""}, {"out": "7|REQUEUED|0:9\n"}, "gone", id="requeued-then-cancelled"),
        pytest.param({"code": 1, "err": "Unable to contact"}, {"out": "7|REQUEUED|0:9\n"}, "pending", id="requeued-and-no-controller"),
        pytest.param({"out": "rubbish\n|||\n"}, {"out": "\x00\xff\n"}, "gone", id="rubbish"),
    ],
)
def test_never_by_guess(slurm: FakeSlurm, squeue: dict[str, Any], sacct: dict[str, Any], state: JobState) -> None:
    slurm.answer("squeue", squeue)
    slurm.answer("sacct", sacct)
    assert look_up(["7"], slurm.tools)["7"].state == state


def test_squeue_alone_is_enough(slurm: FakeSlurm) -> None:
    slurm.answer("squeue", {"code": 1, "err": "slurm_load_jobs error: Invalid job id specified\n"})
    assert look_up(["7"], {"squeue": slurm.tools["squeue"]})["7"].state == "gone"


def test_missing_programs(slurm: FakeSlurm) -> None:
    assert look_up(["7"], {})["7"].state == "unknown"
    assert look_up([], slurm.tools) == {} and look_up(["no number"], slurm.tools) == {}
