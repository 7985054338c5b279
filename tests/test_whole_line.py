"""The whole line on the real Slurm, in the real image: preempted, refused a requeue, out of time; bit for bit the uninterrupted run.

One image and one reference run serve all of it. Runs as the cluster's unprivileged user, from the wheel, on a Python without torch.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from launcher import metrics
from launcher.checkpoint import committed
from launcher.files import read_json_lines
from launcher.run import Run
from tests.conftest import REPOSITORY, Cluster

pytestmark = pytest.mark.slurm

SITE = REPOSITORY / "tests" / "hpc" / "site.yaml"

SETTINGS = [
    "ranks_per_node=2",
    "training.effective_batch=25",
    "training.micro_batch=3",
    "training.epochs=8",
    "data.num_samples=600",
    "checkpoint.every=epoch",
]
TWO_BY_TWO = ["--nodes", "2", *(word for setting in SETTINGS for word in ("--set", setting))]
"""25 samples on 4 ranks: 7, 6, 6, 6; and enough steps for several lives."""


HandedOver = Literal["requeued", "continued"]
"""The event of a life that another one follows."""


@dataclass(frozen=True)
class Line:
    """``ftlaunch`` on the test cluster, and the folders that it writes to."""

    cluster: Cluster
    folder: Path

    def __call__(self, *argv: object, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return self.cluster.run(self.cluster.ftlaunch, *argv, cwd=self.folder, check=check, timeout=timeout)

    def submit(self, *argv: object, name: str) -> Run:
        """A run of ``tiny`` on 2 nodes × 2 ranks, queued."""
        options = ["--site", self.folder / "site.yaml", "--new", "--json", *TWO_BY_TWO, "--set", f"name={name}"]
        document = json.loads(self("submit", "tiny", *options, *argv).stdout)
        return Run(Path(document["folder"]))

    def state(self, run: Run) -> str:
        return str(json.loads(self("status", run.root, "--json").stdout)["state"])

    def wait(self, run: Run, until: Callable[[], bool], what: str, timeout_s: float = 600) -> None:
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, f"{what} did not happen in {timeout_s:g} s\n{story(run)}"
            failed = list(run.events("failed"))
            assert not failed, f"{failed}\n{story(run)}"
            time.sleep(1)

    def finish(self, run: Run, timeout_s: float = 600) -> None:
        self.wait(run, lambda: bool(run.events("finished")), "the end", timeout_s)


def story(run: Run) -> str:
    """What there is to know about a run that did not do what it should."""
    parts = [json.dumps(event) for event in run.events()]
    for log in sorted([*run.root.glob("lives/*/*.log"), *run.submitit.glob("*.out"), *run.submitit.glob("*.err")]):
        parts += [f"== {log.relative_to(run.root)}", *log.read_text(errors="replace").splitlines()[-15:]]
    return "\n".join(parts)


def steps(run: Run) -> list[dict[str, Any]]:
    """What must not differ between an interrupted and an uninterrupted run."""
    exact = ("step", "epoch", "loss", "grad_norm", "learning_rate", "samples_sha", "tokens", "useful_tokens")
    return [{key: row[key] for key in exact} for row in metrics.read(run.metrics_file, "train")]


def weights_sha(run: Run) -> dict[str, str]:
    files = sorted(run.model.glob("*.safetensors"))
    assert files, f"no weights in {run.model}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same(run: Run, reference: Run) -> None:
    assert steps(run) == steps(reference)
    assert weights_sha(run) == weights_sha(reference)
    evaluations = [[(row["step"], row["loss"]) for row in metrics.read(one.metrics_file, "eval")] for one in (run, reference)]
    assert evaluations[0] == evaluations[1]


@pytest.fixture(scope="module")
def line(cluster: Cluster) -> Line:
    folder = cluster.home
    site = folder / "site.yaml"
    site.write_text(SITE.read_text())
    site.chmod(0o644)
    made = Line(cluster, folder)
    made("build", "tiny", "--site", site, timeout=1500)
    return made


@pytest.fixture(scope="module")
def reference(line: Line) -> Run:
    """The uninterrupted run that the others are compared with."""
    run = line.submit(name="reference")
    line.finish(run)
    assert run.lives_started() == 1
    return run


@pytest.fixture
def another(line: Line) -> Iterator[Callable[..., str]]:
    """Submits a job of somebody more important, and takes it away at the end."""
    jobs: list[str] = []

    def submit_job(seconds: int = 5) -> str:
        options = ["--parsable", "-p", "high", "-N", "2", "--exclusive", "-t", "5", "-o", "/dev/null", "--wrap", f"sleep {seconds}"]
        jobs.append(line.cluster.run("sbatch", *options).stdout.strip())
        return jobs[-1]

    yield submit_job
    for job in jobs:
        line.cluster.run("scancel", job, check=False)


def steps_by_life(run: Run) -> list[tuple[int, int]]:
    """Life and step of every step that was done, in order, those done twice included."""
    return [(row["life"], row["step"]) for row in read_json_lines(run.metrics_file) if row["kind"] == "train"]


def preempt(line: Line, run: Run, life: int, another: Callable[..., str], handed_over: HandedOver) -> int | None:
    """Ten steps into this life; returns the epoch that it ended with, if it was stopped on the last step of one."""
    line.wait(run, lambda: [one for one, _ in steps_by_life(run)].count(life) >= 10, "training")
    another()
    line.wait(run, lambda: len(run.events(handed_over)) > life, "the end of the life")
    return committed(run)[-1].epoch


def preempt_inside_an_epoch(line: Line, run: Run, another: Callable[..., str], handed_over: HandedOver) -> int:
    """How many preemptions it took: an epoch has about 22 steps, and where a stop falls on its last one, another follows."""
    for life in range(3):
        if preempt(line, run, life, another, handed_over) is None:
            return life + 1
    raise AssertionError(f"stopped at the end of an epoch each time\n{story(run)}")


def assert_nothing_was_lost_or_done_twice(run: Run, handed_over: HandedOver) -> None:
    """Every step was done once; each life but the last saved the last step that it did, and handed over there."""
    assert not run.events("crashed")
    done, total_steps = steps_by_life(run), run.plan().total_steps
    assert total_steps is not None
    assert [step for _, step in done] == list(range(1, total_steps + 1))
    last_done = dict(done)
    last_saved = {event["life"]: event["step"] for event in run.events("checkpoint")}
    ends = {event["life"]: event["step"] for event in run.events(handed_over)}
    assert list(ends) == list(range(run.lives_started() - 1))
    assert last_saved == last_done
    assert all(ends[life] == step for life, step in last_done.items() if life in ends), "a life may end before its first step"


def test_reference_trains(line: Line, reference: Run) -> None:
    rows = metrics.read(reference.metrics_file, "train")
    plan = reference.plan()
    assert len(rows) == plan.total_steps and len(rows) >= 100
    assert plan.world_size == 4 and plan.batch.samples_per_rank == (7, 6, 6, 6)
    assert sum(row["loss"] for row in rows[-10:]) < 0.8 * sum(row["loss"] for row in rows[:10])
    assert [manifest.epoch for manifest in committed(reference) if manifest.epoch] == list(range(1, 9))
    assert line.state(reference) == "finished"
    assert {path.name for path in reference.report.glob("*.png")} <= {"train-loss.png", "eval-loss.png", "learning-rate.png"}


def test_preempted_and_requeued(line: Line, reference: Run, another: Callable[..., str]) -> None:
    run = line.submit("--partition", "low", name="preempted")
    preemptions = preempt_inside_an_epoch(line, run, another, "requeued")
    line.finish(run)
    assert run.lives_started() == preemptions + 1
    assert_nothing_was_lost_or_done_twice(run, "requeued")
    assert_same(run, reference)


def test_follow_up_job_where_requeue_is_forbidden(line: Line, reference: Run, another: Callable[..., str]) -> None:
    up = REPOSITORY / "tests" / "hpc" / "up"
    subprocess.run([up, "--job-requeue", "0"], check=True, stdin=subprocess.DEVNULL)
    try:
        run = line.submit("--partition", "low", name="no-requeue")
        preemptions = preempt_inside_an_epoch(line, run, another, "continued")
        line.finish(run)
    finally:
        subprocess.run([up], check=True, stdin=subprocess.DEVNULL)
    jobs = [event["job_id"] for event in run.events("started")]
    assert len(jobs) == len(set(jobs)) == preemptions + 1, f"the same job went on: {jobs}"
    assert_nothing_was_lost_or_done_twice(run, "continued")
    assert_same(run, reference)


def test_three_minutes_at_a_time(line: Line, reference: Run) -> None:
    site = line.folder / "early-notice.yaml"
    site.write_text((line.folder / "site.yaml").read_text().replace("signal_lead_s: 45", "signal_lead_s: 90"))
    run = line.submit("--time", "3m", "--site", site, name="short-lives")
    line.finish(run, timeout_s=1800)
    assert run.lives_started() >= 2
    assert_nothing_was_lost_or_done_twice(run, "requeued")
    assert_same(run, reference)


def test_resume_with_another_walltime(line: Line, reference: Run) -> None:
    """Changed where it may change, refused where it would be another run."""
    other = line("resume", reference.root, "--from", "epoch-7", "--set", "training.learning_rate=1", check=False)
    assert other.returncode == 2 and "training.learning_rate" in other.stderr
    run = line.submit("--set", "checkpoint.every=epoch", name="resumed")
    line.wait(run, lambda: len(metrics.read(run.metrics_file, "train")) >= 3, "training")
    line("cancel", run.root)
    line.wait(run, lambda: bool(run.events("stopped", "cancelled")), "the stop")
    line("resume", run.root, "--time", "20m", "--set", "slurm.partition=high")
    line.wait(run, lambda: len(run.events("started")) == 2, "the next life")
    script = run.job_file(1).read_text()
    assert "--time=0-00:20:00" in script and "--partition=high" in script
    line("cancel", run.root, "--now")


def test_one_rank_takes_the_same_samples(line: Line, reference: Run) -> None:
    options = ["--nodes", "1", "--set", "ranks_per_node=1", "--set", "name=one-rank", "--set", "checkpoint.every=never"]
    run = line.submit(*options, name="one-rank")
    line.wait(run, lambda: len(metrics.read(run.metrics_file, "train")) >= 50, "50 steps")
    line("cancel", run.root, "--now")
    ours, theirs = (metrics.read(one.metrics_file, "train")[:50] for one in (run, reference))
    assert [row["samples_sha"] for row in ours] == [row["samples_sha"] for row in theirs]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs)) < 1e-5


def test_refused_account_is_one_line(line: Line) -> None:
    done = line("submit", "tiny", "--site", line.folder / "site.yaml", "--new", "--account", "nonsense", check=False)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr and "account" in done.stderr.splitlines()[-1].lower()


def test_image_and_data_made_ready_by_jobs(line: Line) -> None:
    """Where a site wants nothing heavy on its login node: the training's job waits for the one that stages."""
    site = line.folder / "jobs.yaml"
    fresh = line.folder / f"data-{time.time_ns()}"
    text = (line.folder / "site.yaml").read_text()
    text = "\n".join(row for row in text.splitlines() if not row.startswith("data:"))
    jobs = "build: {on: slurm}\nstage: {on: slurm, partition: high, cpus: 2, memory_gib: 4, time: 20m}"
    site.write_text(f"{text}\ndata: {fresh}\n{jobs}\n")
    site.chmod(0o644)
    small = ["--set", "data.num_samples=60", "--set", "training.epochs=1", "--set", "name=by-jobs", "--partition", "high"]
    submitted = json.loads(line("submit", "tiny", "--site", site, "--new", "--json", *small).stdout)
    assert submitted["state"] == "staging"
    run = Run(Path(submitted["folder"]))
    assert run.plan().staged is None and not fresh.exists()
    line.finish(run)
    assert [event["event"] for event in run.events("staging", "submitted", "staged", "started", "finished")] == [
        "staging", "submitted", "staged", "started", "finished",
    ]  # fmt: skip
    staged = run.plan().staged
    assert staged is not None and staged.data.startswith(str(fresh))
    assert json.loads(line("submit", "tiny", "--site", site, "--json", *small).stdout)["id"] == run.id
