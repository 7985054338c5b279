"""Toy runs in the states that tests need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from launcher import checkpoint
from launcher.run import Run
from launcher.state import Known, state_of
from tests.toy import toy_plan

FOREVER = {"steps": 1_000_000, "step_s": 0.02}


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
