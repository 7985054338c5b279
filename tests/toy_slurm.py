"""Toy runs on the test Slurm: submitted as its user, waited for, taken away whole."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launcher.run import Run
from launcher.slurm.queue import look_up
from launcher.slurm.tools import find_tools
from launcher.submit import last_job_id
from tests.conftest import REPOSITORY, Cluster

LONG = {"steps": 1_000_000, "step_s": 0.1, "more": 5}
"""Goes on until it is stopped; the lives after that have little to do."""


class SlurmToys:
    """Submits toy runs and takes them away. ``find_tools`` must find the test Slurm's tools: the fixture ``slurm_path``."""

    def __init__(self, cluster: Cluster, runs: str) -> None:
        self.cluster = cluster
        self.folder = cluster.home / "toy"
        self.runs = self.folder / runs
        self._submitted: list[Run] = []
        cluster.run("mkdir", "-p", self.folder, cwd=cluster.root)
        put_scripts(self.folder)

    def submit(self, toy: dict[str, Any], *, train: bool = False, **plan: Any) -> dict[str, Any]:
        """What ``toy_submit.py`` answers. ``plan`` replaces fields of the toy plan of two nodes."""
        wanted = {"plan": {"nodes": 2, "time_limit_min": 10, **plan}, "toy": toy, "train": train}
        words = [self.folder / "toy_submit.py", self.runs, json.dumps(wanted)]
        done = self.cluster.run(self.cluster.python, *words, env={"SLURM_PROCID": "9"})  # as from within a step
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "run" in answer:
            self._submitted.append(Run(Path(answer["run"])))
        return answer

    def run(self, toy: dict[str, Any], **wanted: Any) -> Run:
        answer = self.submit(toy, **wanted)
        assert "run" in answer, answer
        return self._submitted[-1]

    def take_away(self) -> None:
        """Not before the jobs are gone: one that still ends writes into the folder while it is removed."""
        for run in self._submitted:
            self.cluster.run("scancel", last_job_id(run), check=False)
        for run in self._submitted:
            wait_until(partial(gone_from_queue, run), run)
            shutil.rmtree(run.root)


def put_scripts(folder: Path) -> None:
    """What a toy run is submitted with, to be read by the cluster's user."""
    for name in ("toy.py", "toy_train.py", "toy_submit.py"):
        shutil.copy(REPOSITORY / "tests" / name, folder)
        (folder / name).chmod(0o644)


def wait_until(what: Callable[[], Any], run: Run | None = None, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, what if run is None else story(run)
        time.sleep(0.2)


def story(run: Run) -> str:
    logs = [*sorted(run.root.glob("lives/*/*.log")), *run.submitit.glob("*.out")]
    return "\n".join([*map(json.dumps, run.events()), *(f"== {log}\n{log.read_text()}" for log in logs)])


def gone_from_queue(run: Run) -> bool:
    return look_up([last_job_id(run)], find_tools())[last_job_id(run)].state not in ("pending", "running", "ending")
