"""A job that waits, or is held and would wait for ever: said in a line with the command that releases or mends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.cli import app, follow, walltime
from launcher.run import Run
from launcher.site.limits import Limits, Maintenance
from launcher.slurm.queue import look_up
from launcher.slurm.waiting import explain
from launcher.submit import submit
from tests.fake_slurm import FakeSlurm
from tests.toy import toy_run
from tests.toy_runs import slurm_plan

ALWAYS = """
JobHeldAdmin JobHeldUser JobHoldMaxRequeue JobLaunchFailure SystemFailure ReservationDeleted ReservationInvalid BurstBufferOperation
BadConstraints Constraints PartitionConfig PartitionNodeLimit PartitionTimeLimit InvalidAccount InvalidQOS QOSNotAllowed AccountNotAllowed
DependencyNeverSatisfied DeadLine MaxMemPerLimit QOSUsageThreshold FrontEndDown
QOSMaxCpuPerJobLimit QOSMaxCpuMinutesPerJobLimit QOSMaxNodePerJobLimit QOSMaxWallDurationPerJobLimit QOSMaxCpuPerNode QOSMaxGRESPerJob
QOSMinCpuNotSatisfied QOSMinGRES QOSMinNode AssocMaxCpuPerJobLimit AssocMaxCpuMinutesPerJobLimit AssocMaxNodePerJobLimit
AssocMaxWallDurationPerJobLimit AssocMaxGRESPerNode AssocMaxGRESMinutesPerJob AssocMaxMemPerJob AssocMaxBillingMinutesPerJob
AssocGrpCPUMinutesLimit AssocGrpGRESMinutes AssocGrpBillingMinutes AssocGrpWallLimit QOSGrpCPUMinutesLimit QOSGrpGRESMinutes QOSGrpWallLimit
"""
"""Reasons of which Slurm's own list says that time alone does not help (job_reason_codes.html, 24.05)."""

FOR_A_WHILE = """
None Prolog Priority Dependency Resources PartitionDown PartitionInactive BeginTime Licenses AssociationJobLimit AssociationResourceLimit
AssociationTimeLimit Reservation ReqNodeNotAvail SchedDefer NodeDown QOSJobLimit QOSResourceLimit QOSTimeLimit Cleaning JobArrayTaskLimit
QOSGrpCpuLimit QOSGrpCPURunMinutesLimit QOSGrpJobsLimit QOSGrpMemLimit QOSGrpNodeLimit QOSGrpSubmitJobsLimit QOSGrpGRES QOSGrpGRESRunMinutes
QOSMaxCpuPerUserLimit QOSMaxJobsPerUserLimit QOSMaxNodePerUserLimit QOSMaxSubmitJobPerUserLimit QOSMaxGRESPerUser QOSMaxMemoryPerUser
AssocGrpCpuLimit AssocGrpCPURunMinutesLimit AssocGrpJobsLimit AssocGrpMemLimit AssocGrpNodeLimit AssocGrpGRES AssocGrpGRESRunMinutes
AssocMaxJobsLimit AssocMaxSubmitJobLimit AssocGrpBilling AssocGrpBillingRunMinutes MaxCpuPerAccount MaxGRESPerAccount MaxJobsPerAccount
MaxNodePerAccount AccountingPolicy PowerNotAvail BurstBufferResources BurstBufferStageIn FedJobLock
"""


@pytest.mark.parametrize("reason", ALWAYS.split())
def test_what_waits_for_ever_has_a_command(reason: str) -> None:
    found = explain(reason, job="7", run="tiny-01")
    assert found.stuck and found.command is not None and ("7" in found.command or "tiny-01" in found.command)
    assert "{" not in str(found) and "Slurm says" not in found.text


@pytest.mark.parametrize("reason", FOR_A_WHILE.split())
def test_what_waits_for_a_while_is_no_alarm(reason: str) -> None:
    found = explain(reason, job="7", run="tiny-01")
    assert not found.stuck and "Slurm says" not in found.text and "{" not in str(found)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("JobHeldUser", "held, by you or for you: scontrol release 7"),
        ("launch failed requeued held", "Slurm could not start it on its nodes and holds it: scontrol release 7"),
        ("launch_failed_requeued_held", "Slurm could not start it on its nodes and holds it: scontrol release 7"),
        ("(job requeued in held state)", "requeued and held, by you or an administrator: scontrol release 7"),
        (
            "ReqNodeNotAvail, Reserved for maintenance",
            "its time limit reaches into a maintenance: it starts after it, or before if shorter: "
            "scontrol update JobId=7 TimeLimit=MINUTES",
        ),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", "what it asks for is not there (nodes down, drained or reserved)"),
        (
            "QOSMaxWallDurationPerJobLimit",
            "its time limit is above what the QoS allows: scontrol update JobId=7 TimeLimit=MINUTES",
        ),
        (
            "BadConstraints",
            "no node has what it asks for: ftlaunch cancel tiny-01, then ftlaunch resume tiny-01 with --constraint, --partition, --gpus or "
            "--nodes",
        ),
        ("SomethingNew", "Slurm says SomethingNew: scontrol show job 7"),
    ],
)
def test_in_words(reason: str, said: str) -> None:
    assert str(explain(reason, job="7", run="tiny-01")) == said


@pytest.mark.parametrize("word", ["PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUED"])
def test_the_reason_is_kept_in_every_state_that_waits(slurm: FakeSlurm, word: str) -> None:
    slurm.answer("squeue", {"out": f"7|{word}|JobHeldAdmin\n"})
    assert look_up(["7"], slurm.tools)["7"].reason == "JobHeldAdmin"


@pytest.fixture
def waiting(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose job 4711 waits."""
    monkeypatch.setenv("FTLAUNCH_RUNS", str(tmp_path / "runs"))
    run = toy_run(tmp_path / "runs", slurm_plan())
    assert submit(run) == "4711"
    return run


def status(*argv: str) -> Result:
    done = CliRunner().invoke(app, ["status", *argv])
    assert done.exit_code == 0, done.output
    return done


def test_status_of_a_held_job(slurm: FakeSlurm, waiting: Run) -> None:
    slurm.answer("squeue", {"out": "4711|PENDING|JobHeldUser\n"})
    shown = " ".join(status("last").stdout.split())
    assert "state queued" in shown and "waits held, by you or for you" in shown and "next scontrol release 4711" in shown
    document = json.loads(status("last", "--json").stdout)
    assert (document["waits"], document["stuck"], document["next"]) == ("held, by you or for you", True, "scontrol release 4711")


def test_a_job_that_waits_for_a_maintenance_is_told_how_long_it_may_be(
    slurm: FakeSlurm, waiting: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now()
    coming = Maintenance("service", now + timedelta(minutes=51), now + timedelta(hours=8))
    monkeypatch.setattr(walltime, "ask_limits", lambda options, nodes, user: Limits(maintenances=(coming,)))
    slurm.answer("squeue", {"out": "4711|PENDING|ReqNodeNotAvail, Reserved for maintenance\n"})
    document = json.loads(status("last", "--json").stdout)
    assert (document["stuck"], document["next"]) == (False, "scontrol update JobId=4711 TimeLimit=40")


def test_a_requeued_job_that_is_held_goes_on_with_a_command(slurm: FakeSlurm, waiting: Run) -> None:
    waiting.append_event("started", life=0, job_id="4711")
    waiting.append_event("requeued", life=0, job_id="4711")
    slurm.answer("squeue", {"out": "4711|PENDING|launch failed requeued held\n"})
    document = json.loads(status("last", "--json").stdout)
    assert (document["state"], document["next"]) == ("continuing", "scontrol release 4711")


def test_status_of_all_runs_names_only_what_is_stuck(slurm: FakeSlurm, waiting: Run, tmp_path: Path) -> None:
    slurm.answer("squeue", {"out": "4711|PENDING|Priority\n"})
    assert "waits for" not in status().stdout
    slurm.answer("squeue", {"out": "4711|PENDING|JobHeldUser\n"})
    assert status().stdout.splitlines()[-1] == f"{waiting.id}: held, by you or for you: scontrol release 4711"


def test_a_run_that_stages_shows_what_holds_the_job_before_it(slurm: FakeSlurm, waiting: Run) -> None:
    waiting.append_event("staging", jobs={"build": "4709", "stage": "4710"})
    slurm.answer("squeue", {"out": "4711|PENDING|Dependency\n4710|PENDING|Dependency\n4709|PENDING|JobHeldUser\n"})
    document = json.loads(status("last", "--json").stdout)
    assert (document["state"], document["next"]) == ("staging", "scontrol release 4709")
    slurm.answer("squeue", {"out": "4711|PENDING|Dependency\n4710|RUNNING|None\n"})
    document = json.loads(status("last", "--json").stdout)
    assert (document["waits"], document["stuck"]) == ("waits for another job to end", False)


def test_follow_says_a_new_reason_once(slurm: FakeSlurm, waiting: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "QUEUE_LOOK_S", 0)
    monkeypatch.setattr(follow, "FIRST_LOOK_S", 0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = ["Priority", "Priority", "JobHeldUser", "JobHeldUser", "Resources"]
    slurm.answer("squeue", *({"out": f"4711|PENDING|{word}\n"} for word in words), {"out": "4711|CANCELLED|None\n"})
    said: list[str] = []
    watch: Callable[..., str] = follow._watch_slurm
    assert watch(waiting, lambda: None, said.append) == "cancelled"
    assert said == [
        "job 4711: waits for jobs that come first",
        "job 4711: held, by you or for you: scontrol release 4711",
        "job 4711: waits for nodes to become free",
    ]


@pytest.mark.parametrize("ended", ["stopped", "failed"])
def test_what_ended_is_resumed(slurm: FakeSlurm, waiting: Run, ended: str) -> None:
    waiting.append_event("started", life=0, job_id="4711")
    waiting.append_event(ended, life=0, job_id="4711", cause="this site continues by hand")
    assert f"next ftlaunch resume {waiting.id}" in " ".join(status("last").stdout.split())
    assert slurm.calls("squeue") == []
