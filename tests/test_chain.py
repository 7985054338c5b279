"""Building and staging as jobs that the training's job depends on: a pretended Slurm, real staging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.run import Run
from tests.fake_slurm import FakeSlurm

SITE = """\
extends: slurm
name: far
source: a test
container: {use: none}
stage: {on: slurm, partition: transfer, cpus: 2, memory_gib: 8, time: 30m}
build: {on: slurm, partition: cpu}
runs: RUNS
images: IMAGES
data: DATA
"""

DOCUMENTS = "".join(json.dumps({"content": f"def number_{number}():\n    return {number}\n" * 40}) + "\n" for number in range(60))


@dataclass(frozen=True)
class User:
    folder: Path
    slurm: FakeSlurm

    def types(self, *argv: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(self.folder), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *argv], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )

    def submits(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self.types("submit", "mine.yaml", "--site", "far.yaml", "--account", "project", *more)

    def sbatch(self) -> list[tuple[str, list[str]]]:
        """Name of each script that was submitted, and the options it was given."""
        calls: list[Any] = [call["argv"] for call in self.slurm.calls("sbatch")]
        return [(Path(argv[-1]).name, argv[2:-1]) for argv in calls]

    @property
    def state(self) -> str:
        return str(json.loads(self.types("status", "last", "--json").stdout)["state"])

    @property
    def run(self) -> Run:
        (record,) = self.folder.glob("runs/*/run.json")
        return Run(record.parent)


@pytest.fixture
def user(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> User:
    slurm.answer("sbatch", {"out": "101\n"}, {"out": "102\n"}, {"out": "103\n"}, {"out": "104\n"})
    slurm.answer("squeue", {"out": "102|PENDING|Dependency\n"})
    for name in ("runs", "images", "data"):
        monkeypatch.setenv(f"FTLAUNCH_{name.upper()}", str(tmp_path / name))
    site = SITE.replace("RUNS", str(tmp_path / "runs")).replace("IMAGES", str(tmp_path / "images")).replace("DATA", str(tmp_path / "data"))
    (tmp_path / "far.yaml").write_text(site)
    (tmp_path / "code.jsonl").write_text(DOCUMENTS)
    os.utime(tmp_path / "code.jsonl", (1_700_000_000, 1_700_000_000))  # of a file that was just written no hash is remembered
    (tmp_path / "mine.yaml").write_text(
        "extends: tiny\nname: mine\ndata: {path: code.jsonl, eval_share: 0.1}\ntraining: {effective_batch: 4, sequence_length: 64}\n"
    )
    return User(tmp_path, slurm)


@pytest.mark.train
def test_training_waits_for_the_job_that_stages(user: User) -> None:
    done = user.submits()
    assert done.returncode == 0, done.stderr
    assert user.sbatch() == [("ftlaunch-stage.sbatch", []), ("job.sbatch", ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"])]
    run = user.run
    assert user.state == "staging"
    assert (run.plan().staged, [event["event"] for event in run.events()]) == (None, ["staging", "submitted"])
    script = (run.root / "prepare" / "ftlaunch-stage.sbatch").read_text()
    for line in ("--cpus-per-task=2", "--mem=8G", "--time=0-00:30:00", "--partition=transfer", "--account=project"):
        assert f"#SBATCH {line}\n" in script
    assert user.submits().returncode == 0 and len(user.sbatch()) == 2, "the second submission is shown the first"

    ran = subprocess.run(["bash", run.root / "prepare" / "ftlaunch-stage.sbatch"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    staged = run.plan().staged
    assert staged is not None and staged.train_samples > 0 and run.events("staged")
    assert run.plan().identity == run.record()["identity"]
    assert user.state == "queued"
    assert user.submits().returncode == 0 and len(user.sbatch()) == 2, "what was staged meanwhile does not make it another run"

    again = user.submits("--new")
    assert again.returncode == 0 and user.sbatch()[2:] == [("job.sbatch", [])], "the data is there: no job stages it again"


@pytest.mark.train
def test_staging_that_fails_is_the_runs_failure(user: User) -> None:
    (user.folder / "code.jsonl").write_text(DOCUMENTS.splitlines()[0] + "\n")
    assert user.submits().returncode == 0
    run = user.run
    ran = subprocess.run(["bash", run.root / "prepare" / "ftlaunch-stage.sbatch"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    (failed,) = run.events("failed")
    assert failed["cause"].startswith("stage: ")
    assert user.state == "failed"
    (user.folder / "code.jsonl").write_text(DOCUMENTS)
    assert user.types("resume", run.id).returncode == 2, "it has no data to go on with"


def test_nothing_is_left_when_the_training_is_refused(user: User) -> None:
    user.slurm.answer("sbatch", {"out": "101\n"}, {"code": 1, "err": "sbatch: error: Invalid account"})
    done = user.submits()
    assert done.returncode == 5 and "Invalid account" in done.stderr
    assert [call["argv"][1:] for call in user.slurm.calls("scancel")] == [["101"]]
    assert not list(user.folder.glob("runs/*/run.json"))


def test_nothing_is_left_when_the_first_job_is_refused(user: User) -> None:
    user.slurm.answer("sbatch", {"code": 1, "err": "sbatch: error: Invalid partition"})
    done = user.submits()
    assert done.returncode == 5 and "Invalid partition" in done.stderr
    assert not user.slurm.calls("scancel") and not list(user.folder.glob("runs/*/run.json"))


def test_cancel_takes_the_chain_along(user: User) -> None:
    assert user.submits().returncode == 0
    user.slurm.answer("squeue", {"out": "102|PENDING|Dependency\n"}, {"out": "102|CANCELLED|None\n"})
    assert user.types("cancel", user.run.id).returncode == 0
    cancelled: list[Any] = [call["argv"] for call in user.slurm.calls("scancel")]
    assert ["scancel", "101"] in cancelled
    assert user.state == "cancelled"


def test_killed_staging_is_the_runs_failure(user: User) -> None:
    """By its time limit, or out of memory: it can write nothing, and Slurm cancels the job that waits for it."""
    assert user.submits().returncode == 0
    user.slurm.answer("squeue", {"out": "102|CANCELLED|DependencyNeverSatisfied\n"})
    assert user.state == "failed"


def test_image_first_then_data_then_training(user: User) -> None:
    site = (user.folder / "far.yaml").read_text().replace("{use: none}", "{use: apptainer}")
    (user.folder / "far.yaml").write_text(site)
    done = user.submits()
    assert done.returncode == 0, done.stderr
    after = [options[0].partition(":")[2] if options else "" for _, options in user.sbatch()]
    assert [(name, job) for (name, _), job in zip(user.sbatch(), after)] == [
        ("ftlaunch-build.sbatch", ""),
        ("ftlaunch-stage.sbatch", "101"),
        ("job.sbatch", "102"),
    ]
    assert "#SBATCH --partition=cpu\n" in (user.run.root / "prepare" / "ftlaunch-build.sbatch").read_text()


@pytest.mark.parametrize("command", [["build", "cpu"], ["stage", "mine.yaml"]], ids=["build", "stage"])
def test_a_command_of_its_own_as_a_job(user: User, command: list[str]) -> None:
    done = user.types(*command, "--site", "far.yaml")
    assert done.returncode == 0, done.stderr
    ((name, options),) = user.sbatch()
    assert (name, options) == (f"ftlaunch-{command[0]}.sbatch", [])
    assert done.stdout.startswith("job 101, log ")


@pytest.mark.parametrize(
    ("site", "command", "code", "message"),
    [
        ("local", ["build", "cpu", "--on", "slurm"], 2, "site local has no scheduler"),
        ("far.yaml", ["build", "cpu", "--on", "moon"], 2, "'moon' is no place"),
    ],
)
def test_places_that_cannot_be(user: User, site: str, command: list[str], code: int, message: str) -> None:
    done = user.types(*command, "--site", site)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_images_that_are_built_elsewhere(user: User) -> None:
    site = (
        (user.folder / "far.yaml")
        .read_text()
        .replace("{use: none}", "{use: apptainer}")
        .replace("build: {on: slurm, partition: cpu}", "build: {on: elsewhere}")
    )
    (user.folder / "far.yaml").write_text(site)
    done = user.submits()
    assert (done.returncode, user.sbatch()) == (4, [])
    assert "images are built elsewhere" in done.stderr and "ftlaunch build cpu" in done.stderr
