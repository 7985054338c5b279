"""The states of a run, from its events, its lease and the scheduler's word."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from launcher.files import write_json
from launcher.run import Lease, Run, boot_id, now, process_start
from launcher.state import JobState, Known, state_of
from launcher.supervise import claim_life

SLURM = {"job_id": "7"}


def run_with(tmp_path: Path, *events: tuple[str, int | None, dict[str, Any]]) -> Run:
    run = Run(tmp_path)
    for name, life, details in events:
        run.append_event(name, life=life, **details)
    return run


def hold(run: Run, *, alive: bool = True, host: str | None = None, age_s: float = 0) -> None:
    """A lease whose process lives (it is this one) or does not, with a heartbeat of that age."""
    start = (process_start(os.getpid()) or 0) + (0 if alive else 1)
    beat = (datetime.now(timezone.utc) - timedelta(seconds=age_s)).isoformat()
    run.life(0).mkdir(parents=True, exist_ok=True)
    write_json(run.lease_file(0), asdict(Lease(0, None, host or socket.gethostname(), boot_id(), os.getpid(), start, beat)))


def events(*names: str, **details: Any) -> list[tuple[str, int | None, dict[str, Any]]]:
    """Events of a first life; a second ``started`` begins the next one."""
    life, made = 0, []
    for index, name in enumerate(names):
        life += name == "started" and "started" in names[:index]
        made.append((name, life, details))
    return made


@pytest.mark.parametrize(
    ("names", "state"),
    [
        ((), "created"),
        (("staging",), "staging"),
        (("submitted",), "queued"),
        (("submitted", "started"), "running"),
        (("started",), "running"),
        (("submitted", "started", "stop_requested"), "stopping"),
        (("submitted", "started", "cancel_requested"), "stopping"),
        (("submitted", "started", "stop_requested", "stopped"), "stopped"),
        (("submitted", "started", "cancel_requested", "stop_requested", "stopped"), "cancelled"),
        (("submitted", "started", "crashed"), "running"),
        (("submitted", "started", "crashed", "started"), "running"),
        (("submitted", "started", "crashed", "failed"), "failed"),
        (("submitted", "started", "finished"), "finished"),
        (("submitted", "started", "stopped", "resumed"), "queued"),
        (("submitted", "started", "stop_requested", "stopped", "resumed", "started"), "running"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_on_this_machine(tmp_path: Path, names: tuple[str, ...], state: str) -> None:
    made = events(*names)
    if "resumed" in names:  # it announces the next life
        at = names.index("resumed")
        made[at] = ("resumed", 1, {})
    run = run_with(tmp_path, *made)
    hold(run)
    assert state_of(run, Known()) == state


@pytest.mark.parametrize(
    "names", [("submitted", "started"), ("submitted", "started", "stop_requested"), ("submitted", "started", "crashed")]
)
def test_dead_supervisor_is_lost(tmp_path: Path, names: tuple[str, ...]) -> None:
    run = run_with(tmp_path, *events(*names))
    hold(run, alive=False)
    assert state_of(run, Known()) == "lost"


@pytest.mark.parametrize(("age_s", "state"), [(20, "running"), (1000, "lost")])
def test_supervisor_on_another_machine_lives_by_its_heartbeat(tmp_path: Path, age_s: float, state: str) -> None:
    run = run_with(tmp_path, *events("submitted", "started"))
    hold(run, host="elsewhere", age_s=age_s)
    assert state_of(run, Known()) == state


def test_supervisor_that_never_began_is_lost(tmp_path: Path) -> None:
    run = run_with(tmp_path, *events("submitted"))
    assert state_of(run, Known()) == "queued"
    assert state_of(run, Known(), at=datetime.now(timezone.utc) + timedelta(minutes=5)) == "lost"


@pytest.mark.parametrize(
    ("names", "job", "state"),
    [
        (("submitted",), "pending", "queued"),
        (("submitted",), "running", "running"),
        (("submitted",), "unknown", "queued"),
        (("submitted",), "gone", "lost"),
        (("submitted",), "completed", "lost"),
        (("submitted",), "cancelled", "cancelled"),
        (("submitted",), "failed", "failed"),
        (("submitted", "started"), "running", "running"),
        (("submitted", "started"), "ending", "stopping"),
        (("submitted", "started"), "unknown", "running"),
        (("submitted", "started"), "pending", "continuing"),
        (("submitted", "started"), "failed", "failed"),
        (("submitted", "started"), "completed", "lost"),
        (("submitted", "started"), "gone", "lost"),
        (("submitted", "started", "stop_requested"), "running", "stopping"),
        (("submitted", "started", "requeued"), "pending", "continuing"),
        (("submitted", "started", "requeued"), "ending", "continuing"),
        (("submitted", "started", "requeued"), "running", "running"),
        (("submitted", "started", "requeued"), "unknown", "continuing"),
        (("submitted", "started", "requeued"), "gone", "lost"),
        (("submitted", "started", "continued"), "pending", "continuing"),
        (("submitted", "started", "requeued", "started"), "running", "running"),
        (("submitted", "started", "requeued", "started", "finished"), "gone", "finished"),
        (("submitted", "started", "finished"), "failed", "finished"),
        (("submitted", "started", "stopped"), "failed", "stopped"),
        (("submitted", "started", "stop_requested", "cancelled"), "running", "cancelled"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_on_slurm(tmp_path: Path, names: tuple[str, ...], job: JobState, state: str) -> None:
    run = run_with(tmp_path, *events(*names, **SLURM))
    assert state_of(run, Known(job)) == state


def test_fresh_heartbeat_is_a_sign_of_life_that_slurm_does_not_know(tmp_path: Path) -> None:
    run = run_with(tmp_path, *events("submitted", "started", **SLURM))
    hold(run, host="node1", age_s=30)
    assert state_of(run, Known("gone")) == "running"
    hold(run, host="node1", age_s=1000)
    assert state_of(run, Known("gone")) == "lost"


def test_quick_job_may_write_before_its_submitter(tmp_path: Path) -> None:
    run = run_with(tmp_path, ("started", 0, SLURM), ("finished", 0, SLURM), ("submitted", 0, SLURM))
    assert state_of(run, Known("completed")) == "finished"


def test_batch_script_that_found_no_python(tmp_path: Path) -> None:
    run = run_with(tmp_path, ("submitted", 0, SLURM), ("failed", None, SLURM))
    assert state_of(run, Known("failed")) == "failed"
    run.append_event("resumed", life=0, job_id="8")
    assert state_of(run, Known("pending")) == "queued"


def test_job_that_slurm_cancelled_before_its_verdict(tmp_path: Path) -> None:
    run = run_with(tmp_path, *events("submitted", "started", "stop_requested", **SLURM), ("stopped", 0, {"cancelled": True}))
    assert state_of(run, Known("cancelled")) == "cancelled"


def test_torn_event_line_costs_itself_only(tmp_path: Path) -> None:
    run = run_with(tmp_path, *events("submitted", "started"))
    with open(run.events_file, "a") as file:
        file.write('{"time": "2026-')
    hold(run)
    assert state_of(run, Known()) == "running"
    assert now() > "2"


def test_resumed_after_a_start_that_failed(tmp_path: Path) -> None:
    """The life that failed has no ``started`` event, but its number is used up."""
    run = run_with(tmp_path, ("submitted", 0, SLURM))
    assert run.lives_started() == 0
    assert claim_life(run) == 0
    run.append_event("failed", life=0, **SLURM)
    assert state_of(run, Known("failed")) == "failed"
    assert run.lives_started() == 1
    run.append_event("resumed", life=run.lives_started(), job_id="8")
    assert state_of(run, Known("pending")) == "queued"
    run.append_event("started", life=claim_life(run), job_id="8")
    assert state_of(run, Known("running")) == "running"
    assert run.lives_started() == 2


def test_resumed_after_it_was_cancelled_while_waiting(tmp_path: Path) -> None:
    run = run_with(tmp_path, *events("submitted", "cancel_requested", **SLURM), ("cancelled", None, SLURM), ("resumed", 0, SLURM))
    assert state_of(run, Known("pending")) == "queued"
    run.append_event("started", life=0, **SLURM)
    assert state_of(run, Known("running")) == "running"
    run.append_event("stopped", life=0, **SLURM)
    assert state_of(run, Known("completed")) == "stopped"
