"""Run folders and what is done with them: created once, found again, submitted, resumed, cancelled."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher import checkpoint
from launcher.errors import ActionError, MissingError, UsageError
from launcher.follow import follow
from launcher.run import Run, boot_id, process_start, read_lease
from launcher.runs import RunExists, all_runs, create_run, find_existing, find_run
from launcher.slurm.tools import Unanswered
from launcher.state import Known, state_of
from launcher.submit import AlreadyGoing, cancel, find_checkpoint, last_job_id, present_life, resume, submit, turns
from tests.fake_slurm import FakeSlurm, make_fake_slurm
from tests.toy import names, toy_plan, toy_run

FOREVER = {"steps": 1_000_000, "step_s": 0.02}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = make_fake_slurm(tmp_path / "bin", monkeypatch)
    fake.answer("sbatch", {"out": "4711\n"})
    return fake


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Toy runs on this machine, whose supervisors are gone at the end."""
    made: list[Run] = []

    def make(**behaviour: Any) -> Run:
        made.append(toy_run(tmp_path / "runs", toy_plan(), new=True, **behaviour))
        return made[-1]

    yield make
    for run in made:
        lease = read_lease(run)
        if lease and process_start(lease.pid) == lease.pid_start:
            os.kill(lease.pid, signal.SIGKILL)


def wait_until(what: Callable[[], Any], run: Run) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, run.events_file.read_text() + "".join(log.read_text() for log in run.root.rglob("*.log"))
        time.sleep(0.05)


def ended(run: Run) -> bool:
    return state_of(run, Known()) not in ("queued", "running", "stopping", "continuing")


def slurm_plan(**changes: Any) -> Any:
    return toy_plan(site={"name": "cluster", "scheduler": "slurm"}, nodes=2, time_limit_min=60, **changes)


def fake_checkpoint(run: Run, step: int, epoch: int | None = None) -> None:
    stage = checkpoint.stage_folder(run, step, 0)
    stage.mkdir(parents=True)
    (stage / "weights").write_text(str(step))
    checkpoint.commit(run, step, 0, "epoch" if epoch else "steps", epoch, 1)


# creating


def test_run_folder_is_whole_and_private(tmp_path: Path) -> None:
    plan = toy_plan()
    run = create_run(plan, lambda run: {"image.def": f"{run.root}\n"}, "name: toy  # as written\n", tmp_path / "runs")
    assert run.id == "toy-01234567"
    assert run.preset_file.read_text() == "name: toy  # as written\n"
    assert run.definition_file.read_text() == f"{tmp_path}/runs/toy-01234567\n"
    assert run.plan() == plan
    record = run.record()
    assert (record["id"], record["identity"], record["scheduler"], record["python"]) == (run.id, plan.identity, "none", sys.executable)
    for path in (run.root, *run.root.rglob("*")):
        if "code" not in path.relative_to(run.root).parts[:1]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert list((tmp_path / "runs").iterdir()) == [run.root]


def test_code_of_a_run_is_whole_and_has_no_caches(tmp_path: Path) -> None:
    run = create_run(toy_plan(), lambda run: {}, "", tmp_path)
    assert not [path for path in run.code.rglob("*") if path.suffix == ".pyc" or path.name in ("__pycache__", "templates", "presets")]
    environment = {**os.environ, "PYTHONPATH": str(run.code)}
    script = "import launcher.supervise; print(launcher.supervise.__file__)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.startswith(str(run.code))


def test_same_identity_is_created_once(tmp_path: Path) -> None:
    plan = toy_plan()
    first = create_run(plan, lambda run: {}, "", tmp_path)
    with pytest.raises(RunExists) as caught:
        create_run(plan, lambda run: {}, "", tmp_path)
    assert caught.value.run == first and caught.value.exit_code == 5


def test_new_counts_up(tmp_path: Path) -> None:
    plan = toy_plan()
    made = [create_run(plan, lambda run: {}, "", tmp_path, new=True).id for _ in range(3)]
    assert made == ["toy-01234567", "toy-01234567-2", "toy-01234567-3"]
    assert find_existing(plan, tmp_path) == Run(tmp_path / "toy-01234567-3")


def test_same_name_and_prefix_of_another_identity_is_another_run(tmp_path: Path) -> None:
    create_run(toy_plan(), lambda run: {}, "", tmp_path)
    other = dataclasses.replace(toy_plan(), identity="01234567" + "f" * 56)
    assert find_existing(other, tmp_path) is None


def test_race_of_many_submissions_creates_one(tmp_path: Path) -> None:
    plan = toy_plan()

    def attempt(_: int) -> str:
        try:
            return create_run(plan, lambda run: {"image.def": "x\n"}, "", tmp_path).id
        except RunExists:
            return "exists"

    with ThreadPoolExecutor(8) as pool:
        results = sorted(pool.map(attempt, range(8)))
    assert results == ["exists"] * 7 + ["toy-01234567"]
    assert [path.name for path in tmp_path.iterdir()] == ["toy-01234567"]


def test_race_with_new_creates_all(tmp_path: Path) -> None:
    plan = toy_plan()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_run(plan, lambda run: {}, "", tmp_path, new=True).id, range(8)))
    assert len(set(made)) == 8 and len(all_runs(tmp_path)) == 8


def test_failed_rendering_leaves_nothing(tmp_path: Path) -> None:
    def broken(run: Run) -> dict[str, str]:
        raise UsageError("a broken template")

    with pytest.raises(UsageError, match="broken template"):
        create_run(toy_plan(), broken, "", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["a:b", "a,b", "50%j", "back\\slash", "new\nline", "escape\x1b", "\u2028", "\u202eabc"])
def test_folder_that_no_tool_could_name(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UsageError, match="the runs folder") as caught:
        create_run(toy_plan(), lambda run: {}, "", tmp_path / folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["with space", "it's", 'double"quote', "$(touch gone)", "`id`", "-rf", "*", "ünï"])
def test_hostile_folder_is_only_a_name(tmp_path: Path, folder: str) -> None:
    run = toy_run(tmp_path / folder, toy_plan())
    submit(run)
    wait_until(lambda: ended(run), run)
    assert state_of(run, Known()) == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder]


def test_no_slurm_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="sbatch, srun, scontrol, scancel: not found") as caught:
        create_run(slurm_plan(), lambda run: {}, "", tmp_path / "runs")
    assert caught.value.exit_code == 4 and not (tmp_path / "runs").exists()


# finding


def test_find_run(tmp_path: Path) -> None:
    plan = toy_plan()
    first, second = (create_run(plan, lambda run: {}, "", tmp_path, new=True) for _ in range(2))
    assert find_run(tmp_path, "last") == second
    assert find_run(tmp_path, "toy-01234567") == first
    assert find_run(tmp_path, "toy-01234567-") == second
    assert find_run(Path("/nowhere"), str(first.root)) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [("toy-0", "could be toy-01234567, toy-01234567-2"), ("nothing", "no run 'nothing'"), ("/nowhere/else", "is not a run folder")],
)
def test_find_run_says_what_there_is(tmp_path: Path, text: str, message: str) -> None:
    for _ in range(2):
        create_run(toy_plan(), lambda run: {}, "", tmp_path, new=True)
    with pytest.raises(UsageError, match=message):
        find_run(tmp_path, text)


def test_last_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run 'last'"):
        find_run(tmp_path, "last")


# on this machine


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


def test_resume_goes_on(local: Callable[..., Run]) -> None:
    run = local(**FOREVER)
    submit(run)
    wait_until(run.metrics_file.exists, run)
    cancel(run, now=False)
    wait_until(lambda: ended(run), run)
    saved = checkpoint.committed(run)[-1].step
    (run.root / "toy.json").write_text(json.dumps({"steps": saved + 1, "step_s": 0.01}))
    resume(run)
    wait_until(lambda: ended(run), run)
    assert state_of(run, Known()) == "finished"
    assert names(run)[-3:] == ["resumed", "started", "finished"]


def test_follow_until_the_end(local: Callable[..., Run]) -> None:
    run, looks = local(), []
    submit(run)
    assert follow(run, lambda: looks.append(state_of(run, Known())), interval_s=0.05) == "finished"
    assert looks[-1] == "finished" and looks[0] in ("queued", "running")


FOLLOWER = """
import sys
from pathlib import Path
from launcher.follow import follow
from launcher.run import Run
print(follow(Run(Path(sys.argv[1])), lambda: None, interval_s=0.05))
"""


@pytest.mark.parametrize(
    ("sent", "answer", "saved"),
    [
        pytest.param([signal.SIGINT], "stopped", 1, id="INT-saves"),
        pytest.param([signal.SIGTERM], "stopped", 1, id="TERM-saves"),
        pytest.param([signal.SIGHUP], "detached", 0, id="HUP-detaches"),
    ],
)
def test_follow_passes_signals_on(local: Callable[..., Run], sent: list[int], answer: str, saved: int) -> None:
    run = local(**FOREVER)
    submit(run)
    wait_until(run.metrics_file.exists, run)
    follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(run.root)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: "SigCgt" in Path(f"/proc/{follower.pid}/status").read_text() and _catches(follower.pid, signal.SIGHUP), run)
    for number in sent:
        follower.send_signal(number)
    assert follower.communicate(timeout=60)[0].strip() == answer
    assert len(checkpoint.committed(run)) == saved
    assert ended(run) is (answer == "stopped")


def test_second_interrupt_kills_the_ranks(local: Callable[..., Run]) -> None:
    run = local(faults=[{"rank": 0, "step": 3, "what": "hang"}], **FOREVER)
    submit(run)
    wait_until(lambda: run.metrics_file.exists() and len(run.metrics_file.read_text().splitlines()) == 3, run)
    follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(run.root)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: _catches(follower.pid, signal.SIGHUP), run)
    follower.send_signal(signal.SIGINT)
    wait_until(lambda: run.events("stop_requested"), run)
    follower.send_signal(signal.SIGINT)
    assert follower.communicate(timeout=60)[0].strip() == "stopped"
    assert "killed on request" in run.events("stopped")[0]["cause"]


def _catches(pid: int, number: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


# from a checkpoint


@pytest.fixture
def trained(local: Callable[..., Run]) -> Run:
    run = local(steps=10)
    for step, epoch in ((2, None), (4, 1), (6, None), (8, 2)):
        fake_checkpoint(run, step, epoch)
    run.model.mkdir()
    return run


@pytest.mark.parametrize(("text", "step"), [("epoch-1", 4), ("epoch-2", 8), ("step-6", 6), ("step-00000002", 2)])
def test_find_checkpoint(trained: Run, text: str, step: int) -> None:
    assert find_checkpoint(trained, text).step == step


@pytest.mark.parametrize("text", ["epoch-3", "step-5", "4", "epoch", "epoch--1", "latest"])
def test_unknown_checkpoint_lists_what_there_is(trained: Run, text: str) -> None:
    with pytest.raises(UsageError, match="there are: step-2, epoch-1, step-6, epoch-2"):
        find_checkpoint(trained, text)


def test_resume_from_sets_newer_ones_aside(trained: Run) -> None:
    resume(trained, from_checkpoint="epoch-1")
    wait_until(lambda: ended(trained), trained)
    aside = trained.checkpoints / "superseded-0"
    assert sorted(path.name for path in aside.iterdir()) == ["model", "step-00000006", "step-00000008"]
    assert [manifest.step for manifest in checkpoint.committed(trained)] == [2, 4, 10]
    assert trained.events("resumed")[0]["from_step"] == 4


def test_resume_with_changed_plan_and_current_code(trained: Run) -> None:
    changed = dataclasses.replace(trained.plan(), signal_lead_s=77)
    (trained.code / "launcher" / "marker").touch()
    resume(trained, code_current=True, plan=changed, job_script="#!/bin/bash\n")
    wait_until(lambda: ended(trained), trained)
    assert (trained.plan(0).signal_lead_s, trained.job_file(0)) == (77, trained.life(0) / "job.sbatch")
    assert (trained.life(0) / "code-before" / "marker").exists() and not (trained.code / "launcher" / "marker").exists()
    assert len(trained.events("resumed")[0]["code"]) == 64


def test_resume_refuses_another_identity(trained: Run) -> None:
    with pytest.raises(UsageError, match="determines the weights"):
        resume(trained, plan=dataclasses.replace(trained.plan(), identity="f" * 64))
    assert names(trained) == []


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


# through Slurm


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


def test_refused_resume_keeps_the_run(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("sbatch", {"code": 1, "err": "sbatch: error: no\n"})
    with pytest.raises(ActionError, match="no"):
        resume(run)
    assert names(run) == ["submitted"] and [path.name for path in run.submitit.iterdir()] == ["4711_submitted.pkl"]


def test_two_submissions_of_one_run_submit_once(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    lock = run.root / ".submitting"
    lock.mkdir()
    (lock / "owner").write_text(f"another-host boot {os.getpid()} 1\n")
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


@pytest.mark.parametrize("event", ["resumed", "started", "continued"])
def test_resume_of_a_run_that_went_on_meanwhile(tmp_path: Path, slurm: FakeSlurm, event: str) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    seen = turns(run)
    run.append_event(event, life=0, job_id="4712")
    with pytest.raises(AlreadyGoing):
        resume(run, seen=seen, job_script="#!/bin/bash\n")
    assert len(slurm.calls("sbatch")) == 1 and not run.life(0).exists()


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


def tree(run: Run) -> dict[str, bytes | None]:
    found = (path for path in run.root.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(run.root)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.parametrize("failure", ["sbatch refuses", "interrupt while copying", "interrupt while writing"])
@pytest.mark.parametrize("resumed_before", [False, True], ids=["first", "again"])
def test_refused_resume_leaves_no_trace(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, failure: str, resumed_before: bool
) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    for step, epoch in ((2, None), (4, 1), (6, None)):
        fake_checkpoint(run, step, epoch)
    run.model.mkdir()
    change = {"code_current": True, "plan": dataclasses.replace(run.plan(), signal_lead_s=77), "job_script": "#!/bin/sh\n"}
    if resumed_before:
        resume(run, **change)
    before = tree(run)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    error: type[BaseException] = KeyboardInterrupt
    if failure == "sbatch refuses":
        error = ActionError
        slurm.answer("sbatch", {"code": 1, "err": "sbatch: error: no\n"})
    else:
        monkeypatch.setattr(f"launcher.submit.{'copy_code' if 'copying' in failure else 'code_sha'}", interrupted)
    changes = {**change, "plan": dataclasses.replace(run.plan(), signal_lead_s=99), "job_script": "#!/bin/bash\n"}
    with pytest.raises(error):
        resume(run, from_checkpoint="step-2", **changes)
    assert tree(run) == before
    monkeypatch.undo()
    slurm.answer("sbatch", {"out": "4712\n"})
    assert resume(run, from_checkpoint="step-2", **changes) == "4712"
    assert (run.plan(0).signal_lead_s, [manifest.step for manifest in checkpoint.committed(run)]) == (99, [2])
    kept = {"code-before", "code-before-2"} if resumed_before else {"code-before"}
    assert {path.name for path in run.life(0).iterdir()} == {"plan.json", "job.sbatch", *kept}


def test_resume_whose_supervisor_cannot_start_says_so(trained: Run) -> None:
    trained.record_file.write_text(trained.record_file.read_text().replace(sys.executable, "/nowhere/python"))
    with pytest.raises(ActionError, match="/nowhere/python: No such file"):
        resume(trained, from_checkpoint="step-2")
    assert state_of(trained, Known()) == "failed" and len(checkpoint.committed(trained)) == 4
    trained.record_file.write_text(trained.record_file.read_text().replace("/nowhere/python", sys.executable))
    resume(trained)
    wait_until(lambda: ended(trained), trained)
    assert state_of(trained, Known()) == "finished"


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
