"""The whole line on this machine, as a user types it: submit, Ctrl-C, resume, submit again, a run that dies, a preset with a typo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import metrics
from launcher.run import Run, read_lease

pytestmark = pytest.mark.train

SMALL = """\
extends: tiny
name: small
data: {num_samples: 90}
training: {effective_batch: 5, micro_batch: 3, epochs: 3}
evaluation: {every: epoch}
checkpoint: {every: epoch}
"""


@dataclass(frozen=True)
class User:
    """Somebody at a terminal in a folder of their own."""

    folder: Path
    data: Path

    @property
    def environment(self) -> dict[str, str]:
        own = {"FTLAUNCH_DATA": str(self.data), "HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        return {**os.environ, **own, "COLUMNS": "160"}

    def types(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *argv],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def starts(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *argv],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def run(self) -> Run:
        (record,) = self.folder.glob("runs/*/run.json")
        return Run(record.parent)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Staged once for all of them."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def user(tmp_path: Path, data: Path) -> Iterator[User]:
    (tmp_path / "small.yaml").write_text(SMALL)
    somebody = User(tmp_path, data)
    yield somebody
    for record in tmp_path.glob("runs/*/run.json"):
        lease = read_lease(Run(record.parent))
        if lease is not None and not Run(record.parent).events("finished", "failed", "stopped"):
            os.kill(lease.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s:g} s"
        time.sleep(0.1)


def steps_of(user: User) -> int:
    records = list(user.folder.glob("runs/*/metrics.jsonl"))
    return len(metrics.read(records[0], "train")) if records else 0


def test_ctrl_c_resume_and_again(user: User) -> None:
    following = user.starts("submit", "small.yaml", "--follow")
    wait_for(lambda: steps_of(user) >= 3 or following.poll() is not None, "training")
    following.send_signal(signal.SIGINT)
    said, _ = following.communicate(timeout=120)
    assert following.returncode == 7, said
    assert "ftlaunch resume" in said and "Traceback" not in said
    run = user.run
    before = steps_of(user)
    assert json.loads(user.types("status", "last", "--json").stdout)["state"] in ("stopped", "cancelled")

    resumed = user.types("resume", "last", "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    rows = metrics.read(run.metrics_file, "train")
    assert [row["step"] for row in rows] == list(range(1, (run.plan().total_steps or 0) + 1))
    assert rows[before]["life"] == 1 and rows[before - 1]["life"] == 0, "the next life did not begin at the next step"
    assert {path.name for path in run.report.iterdir()} == {"train-loss.png", "eval-loss.png", "learning-rate.png"}
    assert str(run.model) in resumed.stdout and (run.model / "config.json").exists()

    again = user.types("submit", "small.yaml")
    assert again.returncode == 0 and "is finished already" in again.stdout
    assert user.run == run, "a second run folder"
    refused = user.types("resume", "last")
    assert refused.returncode == 2 and "--from" in refused.stderr
    other = user.types("resume", "last", "--from", "epoch-1", "--set", "training.learning_rate=1")
    assert other.returncode == 2 and "training.learning_rate" in other.stderr

    back = user.types("resume", "last", "--from", "epoch-1", "--follow")
    assert back.returncode == 0, back.stdout + back.stderr
    assert metrics.read(run.metrics_file, "train")[-1]["life"] == 2
    assert [{**row, "life": 0, "step_s": 0} for row in rows] == [
        {**row, "life": 0, "step_s": 0} for row in metrics.read(run.metrics_file, "train")
    ], "the same steps came out differently"


def test_submit_twice_at_once_is_one_run(user: User) -> None:
    both = [user.starts("submit", "small.yaml") for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all(user.run.id in text for text in said)
    assert len(user.run.events("submitted", "resumed")) == 1
    user.types("cancel", "last", "--now")
    wait_for(lambda: user.run.events("stopped", "finished", "failed"), "the end")


def test_a_rank_that_dies_is_named(user: User) -> None:
    following = user.starts("submit", "small.yaml", "--follow", "--set", "training.micro_batch=5", "--set", "limits.max_lives=1")
    wait_for(lambda: steps_of(user) >= 1 or following.poll() is not None, "training")
    lease = read_lease(user.run)
    assert lease is not None
    ranks = subprocess.run(["ps", "--ppid", str(lease.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 1
    os.kill(int(ranks[0]), signal.SIGKILL)
    said, _ = following.communicate(timeout=120)
    assert following.returncode == 6, said
    assert "rank 0 was killed by signal 9" in said and "ftlaunch logs" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.learnin_rate=1e-5"], ["training.learnin_rate", "learning_rate"]),
        (["training.epochs=many"], ["training.epochs"]),
        (["training.sequence_length=1024"], ["training.sequence_length", "512"]),
        (["hardware=cpy"], ["hardware", "cpu"]),
        (["data.path=/nowhere/at/all"], ["data.path", "/nowhere/at/all"]),
    ],
    ids=["typo", "type", "context", "hardware", "missing-file"],
)
def test_bad_input_is_one_line_and_writes_nothing(user: User, settings: list[str], words: list[str]) -> None:
    done = user.types("submit", "small.yaml", *(word for value in settings for word in ("--set", value)))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (user.folder / "runs").exists()


def test_typo_in_a_preset_names_its_line(user: User) -> None:
    (user.folder / "typo.yaml").write_text("extends: small.yaml\ntraining:\n  epochss: 2\n")
    done = user.types("check", "typo.yaml", "--json")
    document = json.loads(done.stdout)
    (finding,) = document["findings"]
    assert done.returncode == 2 and not document["ok"]
    assert (finding["file"], finding["line"], finding["key"]) == ("typo.yaml", 3, "training.epochss")
    assert "epochs" in (finding["hint"] or finding["message"])
