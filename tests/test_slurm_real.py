"""Supervisor, batch script and submitit plugin on the real Slurm, with toy ranks and without an image: 2 nodes × 2 ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from launcher import metrics
from launcher.checkpoint import committed
from launcher.run import Run
from launcher.slurm.queue import look_up
from launcher.slurm.tools import find_tools
from launcher.state import state_of
from launcher.submit import last_job_id
from tests.conftest import REPOSITORY, Cluster
from tests.toy import names
from tests.toy_slurm import LONG, SlurmToys, gone_from_queue, story, wait_until

pytestmark = pytest.mark.slurm


@pytest.fixture
def toys(cluster: Cluster, slurm_path: None) -> Iterator[SlurmToys]:
    toys = SlurmToys(cluster, "runs of it's")
    yield toys
    toys.take_away()


@pytest.fixture
def toy_on_slurm(toys: SlurmToys) -> Callable[..., Run]:
    return toys.run


@pytest.fixture
def preempt(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Somebody more important takes both nodes for a moment."""
    jobs: list[str] = []

    def submit() -> None:
        options = ["--parsable", "-p", "high", "-N", "2", "--exclusive", "-t", "5", "-o", "/dev/null", "--wrap", "sleep 3"]
        jobs.append(cluster.run("sbatch", *options).stdout.strip())

    yield submit
    for job in jobs:
        cluster.run("scancel", job, check=False)


def trained(run: Run) -> int:
    return len(metrics.read(run.metrics_file, "train"))


def state(run: Run) -> str:
    job_id = last_job_id(run)
    return state_of(run, look_up([job_id], find_tools())[job_id])


def test_finishes_on_two_nodes(toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm({"steps": 10, "step_s": 0.1})
    wait_until(lambda: run.events("finished", "failed"), run)
    assert names(run) == ["submitted", "started", "finished"], story(run)
    assert run.events("started")[0]["nodes"] == ["node1", "node2"]
    seen = [json.loads((run.life(0) / f"environment-{rank}.json").read_text()) for rank in range(4)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["SLURMD_NODENAME"]) for one in seen] == [
        ("0", "0", "node1"),
        ("1", "1", "node1"),
        ("2", "0", "node2"),
        ("3", "1", "node2"),
    ]
    assert {one["MASTER_ADDR"] for one in seen} == {"127.0.0.1"} and len({one["MASTER_PORT"] for one in seen}) == 1
    wait_until(lambda: gone_from_queue(run), run)
    assert state(run) == "finished"
    assert len(list(run.submitit.glob("*_0_result.pkl"))) == 1


def test_script_by_hand(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm({"steps": 2, "step_s": 0.1})
    wait_until(lambda: run.events("finished"), run)
    (run.root / "toy.json").write_text(json.dumps({"steps": 4, "step_s": 0.1}))
    cluster.run("bash", "-c", 'cd "$1" && sbatch job.sbatch', "-", run.root)
    wait_until(lambda: len(run.events("finished")) == 2, run)
    assert names(run)[-2:] == ["started", "finished"]
    assert [record["step"] for record in metrics.read(run.metrics_file, "train")] == [1, 2, 3, 4]
    assert len(list(run.submitit.glob("*_0_result.pkl"))) == 1


def test_preempted_requeued_and_finished(toy_on_slurm: Callable[..., Run], preempt: Callable[[], None]) -> None:
    run = toy_on_slurm(LONG)
    wait_until(lambda: trained(run) >= 5, run)
    preempt()
    wait_until(lambda: run.events("requeued"), run)
    assert state(run) in ("continuing", "running")
    saved = committed(run)[-1].step
    wait_until(lambda: run.events("finished", "failed"), run)
    assert names(run) == ["submitted", "started", "stop_requested", "requeued", "started", "finished"], story(run)
    assert run.events("requeued")[0]["step"] == saved
    assert len({event["job_id"] for event in run.events("started")}) == 1
    steps = metrics.read(run.metrics_file, "train")
    assert [record["step"] for record in steps] == list(range(1, saved + 6))
    assert {record["life"] for record in steps} == {0, 1}


def test_follow_up_job_where_requeue_is_forbidden(toy_on_slurm: Callable[..., Run], preempt: Callable[[], None]) -> None:
    up = REPOSITORY / "tests" / "hpc" / "up"
    subprocess.run([up, "--job-requeue", "0"], check=True, stdin=subprocess.DEVNULL)
    try:
        run = toy_on_slurm(LONG)
        wait_until(lambda: trained(run) >= 5, run)
        preempt()
        wait_until(lambda: run.events("finished", "failed"), run)
    finally:
        subprocess.run([up], check=True, stdin=subprocess.DEVNULL)
    assert names(run) == ["submitted", "started", "stop_requested", "continued", "started", "finished"], story(run)
    assert "disabled" in run.events("continued")[0]["cause"]
    assert [event["job_id"] for event in run.events("started")][1] == run.events("continued")[0]["next_job_id"]


def test_user_signal_at_preemption(toy_on_slurm: Callable[..., Run], preempt: Callable[[], None]) -> None:
    """The batch step alone hears of it; the supervisor tells the ranks."""
    up = REPOSITORY / "tests" / "hpc" / "up"
    subprocess.run([up, "--preempt-signal", "user"], check=True, stdin=subprocess.DEVNULL)
    try:
        run = toy_on_slurm(LONG)
        wait_until(lambda: trained(run) >= 5, run)
        preempt()
        wait_until(lambda: run.events("finished", "failed"), run)
    finally:
        subprocess.run([up], check=True, stdin=subprocess.DEVNULL)
    assert names(run) == ["submitted", "started", "stop_requested", "requeued", "started", "finished"], story(run)


def test_stop_right_after_the_start_loses_nothing(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm(LONG)
    wait_until((run.submitit / f"{last_job_id(run)}_0_log.out").exists, run)
    cluster.run("scancel", "--batch", "--signal=USR2", last_job_id(run))
    wait_until(lambda: run.events("requeued", "failed"), run)
    assert names(run)[-2:] == ["stop_requested", "requeued"] and "crashed" not in names(run), story(run)
    wait_until(lambda: run.events("finished", "failed"), run)
    assert names(run)[-2:] == ["started", "finished"], story(run)


def test_resubmitted_where_the_site_says_so(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm(LONG, site={"continuation": "resubmit"})
    wait_until(lambda: trained(run) >= 5, run)
    cluster.run("scancel", "--batch", "--signal=USR2", last_job_id(run))
    wait_until(lambda: run.events("finished", "failed"), run)
    assert names(run) == ["submitted", "started", "stop_requested", "continued", "started", "finished"], story(run)


def test_killed_without_notice_is_failed_and_can_be_resumed(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm({**LONG, "every": 3})
    wait_until(lambda: committed(run), run)
    os.kill(run.events("started")[0]["pid"], signal.SIGKILL)  # every node is this machine
    wait_until(lambda: gone_from_queue(run), run)
    assert state(run) == "failed" and names(run) == ["submitted", "started"], story(run)
    script = "import sys; from pathlib import Path; from launcher.run import Run; from launcher.submit import resume"
    cluster.run(cluster.python, "-c", f"{script}; resume(Run(Path(sys.argv[1])))", run.root)
    wait_until(lambda: run.events("finished"), run)
    assert names(run)[2:] == ["resumed", "started", "finished"], story(run)


def test_time_limit_over_lives(toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm(LONG, time_limit_min=1, signal_lead_s=30)
    wait_until(lambda: run.events("finished", "failed"), run)
    assert names(run) == ["submitted", "started", "stop_requested", "requeued", "started", "finished"], story(run)
    assert run.events("stop_requested")[0]["source"] == "USR2"


def test_crashed_rank_ends_the_step_and_is_named(toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm({**LONG, "faults": [{"rank": 3, "step": 3, "what": "kill"}]}, preset={"limits": {"max_lives": 1}})
    wait_until(lambda: run.events("failed"), run)
    assert "rank 3 was killed by signal 9" in run.events("failed")[0]["cause"]
    wait_until(lambda: gone_from_queue(run), run)
    assert state(run) == "failed"


def test_cancel_saves_and_does_not_go_on(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm(LONG)
    wait_until(lambda: trained(run) >= 5, run)
    script = "import sys; from pathlib import Path; from launcher.run import Run; from launcher.submit import cancel"
    cluster.run(cluster.python, "-c", f"{script}; cancel(Run(Path(sys.argv[1])), now=False)", run.root)
    wait_until(lambda: run.events("stopped"), run)
    assert names(run) == ["submitted", "started", "cancel_requested", "stop_requested", "stopped"], story(run)
    assert committed(run)[-1].step == trained(run)
    wait_until(lambda: gone_from_queue(run), run)
    assert state(run) == "cancelled"


def test_job_cancelled_behind_our_back_is_not_requeued(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm(LONG)
    wait_until(lambda: trained(run) >= 5, run)
    cluster.run("scancel", last_job_id(run))
    wait_until(lambda: gone_from_queue(run), run)
    assert names(run)[:3] == ["submitted", "started", "stop_requested"] and "requeued" not in names(run), story(run)
    assert state(run) == "cancelled"


def test_refused_account_is_one_line_and_leaves_nothing(toys: SlurmToys) -> None:
    before = set(toys.runs.glob("*"))
    answer = toys.submit({}, slurm={"account": "nonsense"})
    assert answer["exit_code"] == 5 and "\n" not in answer["error"]
    assert "Invalid account or account/partition combination specified" in answer["error"]
    assert set(toys.runs.glob("*")) - before == set()


def test_unusable_interpreter_is_one_sentence(cluster: Cluster, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm({"steps": 2, "step_s": 0.1})
    wait_until(lambda: run.events("finished"), run)
    script = run.root / "job.sbatch"
    script.write_text(script.read_text().replace(f"python={cluster.python}", "python=/nowhere/python"))
    cluster.run("bash", "-c", 'cd "$1" && sbatch --wait job.sbatch', "-", run.root, check=False)
    assert "the Python of the submission is missing or older than 3.10" in run.events("failed")[0]["cause"]
