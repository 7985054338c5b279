"""What a run is doing, from its folder first and from the scheduler for what the folder cannot know. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from launcher.run import Run, State, is_process_alive, read_lease

FRESH_S = 180
"""A heartbeat younger than this is a sign of life where the process itself cannot be looked at (six are missed by then)."""

STARTING_S = 60
"""A supervisor on this machine has this long from its submission to its first event."""

JobState = Literal["pending", "running", "ending", "cancelled", "failed", "completed", "gone", "unknown"]
"""gone: the scheduler knows no such job. unknown: it could not be asked, or said something new."""


@dataclass(frozen=True)
class Known:
    """What the scheduler says of the run's present job; ``unknown`` on this machine, where nobody asks."""

    state: JobState = "unknown"
    reason: str = ""
    """Why it waits, or Slurm's own word for its state."""


def state_of(run: Run, job: Known, *, at: datetime | None = None) -> State:
    """``job`` is that of ``launcher.submit.last_job_id``. Never finished by guess: only an event says so."""
    events = run.events()
    turn = _present(events)
    names = [event["event"] for event in turn]
    for name in reversed(names):
        if name == "finished" or name == "failed":
            return "finished" if name == "finished" else "failed"
        if name == "cancelled":
            return "cancelled"
        if name == "stopped":
            return "cancelled" if "cancel_requested" in names or any(event.get("cancelled") for event in turn) else "stopped"
    if not turn:
        return "staging" if any(event["event"] == "staging" for event in events) else "created"
    if any(event.get("job_id") for event in turn):
        return _on_slurm(run, turn, job, at or datetime.now(timezone.utc))
    return _here(run, turn, at or datetime.now(timezone.utc))


def _present(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events since a person last submitted or resumed. By life, since a quick job may write before its submitter does."""
    begun = [index for index, event in enumerate(events) if event["event"] in ("submitted", "resumed")]
    started = [event for event in events if event["event"] == "started"]
    if not begun and not started:
        return []
    first = int(events[begun[-1]]["life"]) if begun else int(started[-1]["life"])
    since = begun[-1] if begun else -1

    def belongs(index: int, event: dict[str, Any]) -> bool:
        # A batch script that cannot start Python knows no life, and a waiting run that was cancelled is resumed under the same life.
        by_place = "life" not in event or event["event"] == "cancel_requested"
        return index > since if by_place else event["life"] >= first

    return [event for index, event in enumerate(events) if belongs(index, event)]


def _phase(turn: Sequence[dict[str, Any]]) -> State:
    """What the folder alone says of a run that has not ended."""
    life = max((int(event["life"]) for event in turn if event["event"] == "started"), default=None)
    if life is None:
        return "queued"
    names = [event["event"] for event in turn if event.get("life") == life]
    if "requeued" in names or "continued" in names:
        return "continuing"
    return "stopping" if "stop_requested" in names or "cancel_requested" in names else "running"


def _here(run: Run, turn: Sequence[dict[str, Any]], at: datetime) -> State:
    phase = _phase(turn)
    lease = read_lease(run)
    if phase == "queued":
        return "queued" if _age_s(str(turn[-1]["time"]), at) < STARTING_S else "lost"
    alive = is_process_alive(lease) if lease else False
    if alive is None and lease is not None:
        alive = _age_s(lease.heartbeat, at) < FRESH_S
    return phase if alive else "lost"


def _on_slurm(run: Run, turn: Sequence[dict[str, Any]], job: Known, at: datetime) -> State:
    phase = _phase(turn)
    if job.state == "cancelled":
        return "failed" if _is_staging(run, turn) else "cancelled"  # it waited for a job that failed
    if job.state == "pending":
        if phase == "queued" and _is_staging(run, turn):
            return "staging"
        return "queued" if phase == "queued" else "continuing"
    if job.state == "running":
        return "running" if phase in ("queued", "continuing") else phase
    if job.state == "ending":
        return "continuing" if phase == "continuing" else "stopping"
    if job.state == "failed":
        return "failed"
    if job.state == "unknown":
        return phase
    lease = read_lease(run)
    alive = lease is not None and phase in ("running", "stopping") and _age_s(lease.heartbeat, at) < FRESH_S
    return phase if alive else "lost"


def _is_staging(run: Run, turn: Sequence[dict[str, Any]]) -> bool:
    """Whether the run waits for a job that makes its image or data ready, or waited for one when it ended."""
    names = [event["event"] for event in run.events("staging", "staged", "cancel_requested")]
    return names[-1:] == ["staging"] and all(event["event"] != "cancel_requested" for event in turn)


def _age_s(time: str, at: datetime) -> float:
    return (at - datetime.fromisoformat(time.replace("Z", "+00:00"))).total_seconds()
