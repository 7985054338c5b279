"""The supervisor without Slurm: real processes, real signals, toy ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launcher import metrics
from launcher.checkpoint import committed
from launcher.processes import LocalRanks
from launcher.run import ExitRecord, Run, may_commit, process_start, read_lease, renew_lease, take_lease
from launcher.state import Known, state_of
from launcher.supervise import claim_life, in_order_of_failure
from tests.toy import names, toy_plan, toy_run

FOREVER = {"steps": 1_000_000, "step_s": 0.02}


@pytest.fixture
def supervisor() -> Iterator[Callable[[Run], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(run: Run) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(run.code), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "launcher.supervise", str(run.root)]
        with open(run.root / "supervisor.out", "ab") as log:
            started.append(subprocess.Popen(command, env=environment, cwd=run.code, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until(what: Callable[[], Any], run: Run) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, story(run)
        time.sleep(0.02)


def story(run: Run) -> str:
    logs = [run.root / "supervisor.out", *run.root.glob("lives/*/*.log")]
    return "\n".join([*map(json.dumps, run.events()), *(f"== {log}\n{log.read_text()}" for log in logs if log.exists())])


def trained(run: Run) -> int:
    return len(metrics.read(run.metrics_file, "train"))


def rank_pids(run: Run, life: int = 0) -> list[int]:
    """Processes whose environment names this life of this run."""
    wanted = {f"FTLAUNCH_LIFE={life}", f"HF_HOME={run.cache}/huggingface"}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted <= set(path.read_bytes().decode(errors="replace").split("\0")):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_finishes(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan())
    assert supervisor(run).wait(60) == 0, story(run)
    assert names(run) == ["started", "finished"]
    assert [record["step"] for record in metrics.read(run.metrics_file, "train")] == [1, 2, 3, 4, 5]
    started = run.events("started")[0]
    assert (started["life"], started["world_size"], started["pid"]) == (0, 2, read_lease(run).pid)


def test_ranks_find_their_place(tmp_path: Path, supervisor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "7")
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    run = toy_run(tmp_path / "with space 'and quote", toy_plan())
    assert supervisor(run).wait(60) == 0, story(run)
    for rank in (0, 1):
        seen = json.loads((run.life(0) / f"environment-{rank}.json").read_text())
        wanted = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "FTLAUNCH_LIFE": "0"}
        assert wanted.items() <= seen.items()
        assert {
            "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }.items() <= seen.items()
        assert seen["PYTHONPATH"] == str(run.code) and seen["HF_HOME"].startswith(str(run.cache))
        assert not {"SLURM_PROCID", "PYTHONHASHSEED"} & seen.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT], ids=["TERM", "USR2", "INT"])
def test_stop_saves_and_resumes_at_the_next_step(tmp_path: Path, supervisor: Any, number: int) -> None:
    run = toy_run(tmp_path, toy_plan(), **FOREVER)
    process = supervisor(run)
    wait_until(lambda: trained(run) >= 3, run)
    process.send_signal(number)
    assert process.wait(60) == 7, story(run)
    assert names(run) == ["started", "stop_requested", "stopped"]
    assert run.events("stop_requested")[0]["source"] == signal.Signals(number).name[3:]
    saved = committed(run)[-1].step
    assert run.events("stopped")[0]["step"] == saved == trained(run)
    (run.root / "toy.json").write_text(json.dumps({"steps": saved + 2, "step_s": 0.01}))
    assert supervisor(run).wait(60) == 0, story(run)
    assert [record["life"] for record in metrics.read(run.metrics_file, "train")][-3:] == [0, 1, 1]


def test_fifty_signals_are_one_stop(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan(), **FOREVER)
    process = supervisor(run)
    wait_until(lambda: trained(run) >= 3, run)
    for index in range(50):
        process.send_signal((signal.SIGTERM, signal.SIGUSR2)[index % 2])
    assert process.wait(60) == 7, story(run)
    assert names(run) == ["started", "stop_requested", "stopped"]
    assert len(committed(run)) == 1


def test_stop_before_the_ranks_have_handlers(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan(), faults=[{"rank": 1, "step": 0, "what": "hang"}], **FOREVER)
    process = supervisor(run)
    wait_until(lambda: run.events("started") and "ranks started" in run.supervisor_log(0).read_text(), run)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: (run.life(0) / "rank-0.json").exists(), run)
    process.send_signal(signal.SIGQUIT)
    assert process.wait(60) == 7, story(run)
    assert names(run)[-1] == "stopped" and "crashed" not in names(run)


def test_supervisor_started_with_blocked_signals_loses_none(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan(), **FOREVER)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        process = supervisor(run)
        process.send_signal(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.wait(60) == 7, story(run)
    assert names(run) == ["started", "stop_requested", "stopped"]
    assert run.events("stopped")[0]["cause"] == "before the first step"
    assert rank_pids(run) == []


def test_crash_names_the_rank_and_ends_the_others(tmp_path: Path, supervisor: Any) -> None:
    faults = [{"rank": 1, "step": 2, "what": 1}, {"rank": 0, "step": 3, "what": "hang"}]
    run = toy_run(tmp_path, toy_plan(preset={"limits": {"max_lives": 1}}), steps=1000, step_s=0.01, faults=faults)
    assert supervisor(run).wait(60) == 6, story(run)
    assert names(run) == ["started", "crashed", "failed"]
    cause = run.events("crashed")[0]["cause"]
    assert "rank 1 ended with 1; a fault at step 2" in cause and str(run.rank_log(0, 1)) in cause
    assert "limits.max_lives" in run.events("failed")[0]["cause"]
    assert rank_pids(run) == []


def test_killed_rank_is_named(tmp_path: Path, supervisor: Any) -> None:
    faults = [{"rank": 0, "step": 2, "what": "kill"}, {"rank": 1, "step": 250, "what": 1}]
    run = toy_run(tmp_path, toy_plan(preset={"limits": {"max_lives": 1}}), steps=1000, step_s=0.01, faults=faults)
    assert supervisor(run).wait(60) == 6, story(run)
    assert "rank 0 was killed by signal 9" in run.events("failed")[0]["cause"]


def record(rank: int, code: int, time: str) -> ExitRecord:
    return ExitRecord(rank, code, 0, "", "", time)


@pytest.mark.parametrize(
    ("codes", "records", "order"),
    [
        pytest.param({0: 1, 1: 1}, [record(0, 1, "b"), record(1, 1, "a")], [1, 0], id="records-know-who-was-first"),
        pytest.param({1: -9, 0: 1}, [record(0, 1, "a")], [1, 0], id="a-killed-peer-comes-first"),
        pytest.param({0: 1, 1: -6}, [record(0, 1, "a")], [0, 1], id="an-abort-seen-later-is-a-consequence"),
        pytest.param({}, [record(3, 1, "b"), record(2, 1, "a"), record(1, 85, "0")], [2, 3], id="records-of-ranks-that-hang-in-their-exit"),
        pytest.param({0: 85, 1: 0, 2: 1}, [record(0, 85, "a"), record(2, 1, "b")], [0, 1, 2], id="good-ones-stay"),
    ],
)
def test_order_of_failure(codes: dict[int, int], records: list[ExitRecord], order: list[int]) -> None:
    assert list(in_order_of_failure(codes, {one.rank: one for one in records})) == order


def test_do_not_retry(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan(), faults=[{"rank": 1, "step": 1, "what": 93}])
    assert supervisor(run).wait(60) == 6, story(run)
    assert names(run) == ["started", "crashed", "failed"]
    assert run.events("failed")[0]["cause"].startswith("rank 1 ended with 93")


def test_crash_loop_is_bounded(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan(), faults=[{"rank": 0, "step": 2, "what": 1}])
    assert supervisor(run).wait(60) == 6, story(run)
    assert names(run) == ["started", "crashed"] * 3 + ["failed"]
    assert "3 lives without a new checkpoint" in run.events("failed")[0]["cause"]


def test_progress_between_crashes_is_no_crash_loop(tmp_path: Path, supervisor: Any) -> None:
    faults = [{"rank": 0, "step": step, "what": 1, "lives": [life]} for life, step in enumerate((3, 5, 7, 9))]
    run = toy_run(tmp_path, toy_plan(), steps=10, every=2, step_s=0.2, faults=faults)
    assert supervisor(run).wait(120) == 0, story(run)
    assert names(run) == ["started", "crashed"] * 4 + ["started", "finished"]
    assert trained(run) == 10


def test_killed_supervisor_takes_its_ranks_along(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan(), **FOREVER)
    process = supervisor(run)
    wait_until(lambda: trained(run) >= 2, run)
    pids = rank_pids(run)
    assert len(pids) == 2
    process.kill()
    wait_until(lambda: [process_start(pid) for pid in pids] == [None, None], run)


HIDES_FROM_THE_DEATH_SIGNAL = "sleep 600 & echo $! > inside.part; mv inside.part inside; wait"
"""What a container does: the rank is a child of the command, and hears nothing of the death of the command's parent."""

HOLDER = f"""
import os, sys, time
from pathlib import Path
from launcher.processes import LocalRanks
ranks = LocalRanks([["sh", "-c", {HIDES_FROM_THE_DEATH_SIGNAL!r}]], [dict(os.environ)], [Path("rank-0.log")], Path("."))
time.sleep(600)
"""


def pid_inside(folder: Path) -> int:
    end = time.monotonic() + 60
    while not (folder / "inside").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return int((folder / "inside").read_text())


def wait_for_the_end_of(pid: int) -> None:
    end = time.monotonic() + 60
    while process_start(pid) is not None:
        assert time.monotonic() < end, f"process {pid} goes on"
        time.sleep(0.02)


def test_killed_supervisor_takes_along_what_runs_in_containers(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path)
    try:
        inside = pid_inside(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    wait_for_the_end_of(inside)


@pytest.mark.parametrize("dies_first", [False, True], ids=["running", "its-command-is-dead"])
def test_killed_ranks_leave_nothing_in_containers(tmp_path: Path, dies_first: bool) -> None:
    ranks = LocalRanks([["sh", "-c", HIDES_FROM_THE_DEATH_SIGNAL]], [dict(os.environ)], [tmp_path / "rank-0.log"], tmp_path)
    inside = pid_inside(tmp_path)
    if dies_first:
        ranks.pass_on(signal.SIGKILL)
        wait_until(ranks.all_ended, Run(tmp_path))
        assert process_start(inside) is not None and ranks.exit_codes() == {0: -signal.SIGKILL}
    ranks.kill()
    wait_for_the_end_of(inside)


def test_nothing_guards_a_life_that_is_over(tmp_path: Path) -> None:
    ranks = LocalRanks([["sh", "-c", "ps -o pgid= -p $$ > group"]], [dict(os.environ)], [tmp_path / "rank-0.log"], tmp_path)
    wait_until(ranks.all_ended, Run(tmp_path))
    guards = in_group(int((tmp_path / "group").read_text()))
    assert len(guards) == 1 and ranks.exit_codes() == {0: 0}
    ranks.kill()
    wait_for_the_end_of(guards[0])


def in_group(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getpgid(int(path.name)) == group:
                found.append(int(path.name))
    return found


def test_newer_life_ends_the_older(tmp_path: Path, supervisor: Any) -> None:
    """Its rank 0 sees the newer life first and ends with 93; that is no failure of the run, and nothing is repeated."""
    run = toy_run(tmp_path, toy_plan(), **FOREVER)
    older = supervisor(run)
    wait_until(lambda: trained(run) >= 2, run)
    newer = supervisor(run)
    assert older.wait(60) == 7, story(run)
    assert names(run) == ["started", "started"]
    assert "a newer life owns the run" in run.supervisor_log(0).read_text()
    assert rank_pids(run, 0) == []
    newer.send_signal(signal.SIGTERM)
    assert newer.wait(60) == 7, story(run)
    assert read_lease(run).life == 1


def test_newer_life_ends_an_older_one_that_hangs(tmp_path: Path, supervisor: Any) -> None:
    faults = [{"rank": rank, "step": 2, "what": "hang", "lives": [0]} for rank in (0, 1)]
    run = toy_run(tmp_path, toy_plan(), faults=faults, **FOREVER)
    source = run.code / "launcher" / "supervise.py"
    source.write_text(source.read_text().replace("HEARTBEAT_S = 30.0", "HEARTBEAT_S = 0.1"))
    older = supervisor(run)
    wait_until(lambda: trained(run) >= 2, run)
    newer = supervisor(run)
    assert older.wait(60) == 7, story(run)
    wait_until(lambda: len(names(run)) >= 2, run)
    assert names(run) == ["started", "started"]
    assert rank_pids(run, 0) == []
    newer.send_signal(signal.SIGTERM)
    assert newer.wait(60) == 7, story(run)


def test_older_life_that_breaks_says_nothing_of_the_run(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan())
    run.plan_file().write_text("{}")
    take_lease(run, 1, None)
    assert supervisor(run).wait(60) == 7, story(run)
    assert run.supervisor_log(0).exists() and names(run) == []


def test_older_life_is_refused(tmp_path: Path) -> None:
    run = toy_run(tmp_path, toy_plan())
    take_lease(run, 1, None)
    with pytest.raises(RuntimeError, match="life 1 holds the run"):
        take_lease(run, 0, None)


def test_older_life_cannot_overwrite_the_newer_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked just before the newer one came, and writes just after."""
    run = toy_run(tmp_path, toy_plan())
    older = take_lease(run, 0, None)
    assert may_commit(run, 0) and renew_lease(run, older)
    newer = take_lease(run, 1, None)
    with monkeypatch.context() as late:
        late.setattr("launcher.run.may_commit", lambda run, life: True)
        renew_lease(run, older)
    assert read_lease(run) == newer
    assert not may_commit(run, 0) and not renew_lease(run, older)
    assert may_commit(run, 1) and renew_lease(run, newer)


def test_life_ten_is_newer_than_life_nine(tmp_path: Path) -> None:
    run = toy_run(tmp_path, toy_plan())
    for life in (9, 10):
        take_lease(run, life, None)
    assert read_lease(run).life == 10


def test_lives_are_claimed_once(tmp_path: Path) -> None:
    run = toy_run(tmp_path, toy_plan())
    assert [claim_life(run), claim_life(run), claim_life(run)] == [0, 1, 2]


def test_full_disk_does_not_end_the_training(tmp_path: Path, supervisor: Any) -> None:
    """The heartbeat cannot be written; the ranks go on."""
    run = toy_run(tmp_path, toy_plan(), steps=100, step_s=0.02)
    source = run.code / "launcher" / "supervise.py"
    source.write_text(source.read_text().replace("HEARTBEAT_S = 30.0", "HEARTBEAT_S = 0.1"))
    process = supervisor(run)
    wait_until(lambda: trained(run) >= 2, run)
    run.lease_file(0).unlink()
    run.lease_file(0).mkdir()
    assert process.wait(60) == 0, story(run)
    assert "no heartbeat" in run.supervisor_log(0).read_text()


def test_broken_plan_is_one_line(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan())
    run.plan_file().write_text("{}")
    assert supervisor(run).wait(60) == 6
    (failed,) = run.events("failed")
    assert "plan of version None" in failed["cause"] and "\n" not in failed["cause"]


def test_run_of_slurm_outside_of_a_job(tmp_path: Path, supervisor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = toy_run(tmp_path, toy_plan())
    plan = toy_plan(site={"scheduler": "slurm"})
    run.plan_file().write_text(json.dumps(json.loads(run.plan_file().read_text()) | {"site": plan.site}))
    assert supervisor(run).wait(60) == 6
    assert "sbatch job.sbatch" in run.events("failed")[0]["cause"]


def test_resume_after_a_start_that_failed(tmp_path: Path, supervisor: Any) -> None:
    run = toy_run(tmp_path, toy_plan())
    plan = run.plan_file().read_text()
    run.plan_file().write_text("{}")
    run.append_event("submitted", life=0)
    assert supervisor(run).wait(60) == 6
    assert state_of(run, Known()) == "failed"
    run.plan_file().write_text(plan)
    run.append_event("resumed", life=run.lives_started())
    assert state_of(run, Known()) == "queued"
    assert supervisor(run).wait(60) == 0, story(run)
    assert state_of(run, Known()) == "finished" and run.events("started")[0]["life"] == 1
