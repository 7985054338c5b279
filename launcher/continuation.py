"""What happens after a life: the run ends here, or goes on, and for how long that may repeat. Standard library only (Python 3.9).

``decide`` is pure; what it needs to know is read from the run's events and checkpoints by the functions beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from launcher import metrics
from launcher.checkpoint import Manifest, committed
from launcher.plan import Plan
from launcher.run import Run, Verdict

CRASHES_WITHOUT_PROGRESS = 3
"""So many lives that crashed at the same newest checkpoint end the run."""


@dataclass(frozen=True)
class History:
    """What earlier lives leave to decide with. Counting starts anew when a person submits or resumes."""

    lives: int
    """Lives begun, this one included."""
    crashes: int
    """Lives that crashed since the newest checkpoint was written, this one included."""
    gpu_hours: float


@dataclass(frozen=True)
class Decision:
    event: Literal["finished", "failed", "stopped", "again"]
    """again: another life, here or through the scheduler."""
    cause: str = ""


def decide(verdict: Verdict, history: History, plan: Plan, *, cancelled: bool = False) -> Decision:
    """``cancelled``: a person ended the run, so that nothing goes on by itself."""
    if verdict.kind == "finished":
        return Decision("finished")
    here = plan.site["scheduler"] == "none"
    crashed = verdict.kind == "failed"
    if cancelled or (here and not crashed):
        return Decision("stopped", verdict.cause)
    if crashed and not verdict.retry:
        return Decision("failed", verdict.cause)
    if crashed and history.crashes >= CRASHES_WITHOUT_PROGRESS:
        return Decision("failed", f"{verdict.cause}; {history.crashes} lives without a new checkpoint")
    ended: Literal["failed", "stopped"] = "failed" if crashed else "stopped"
    if not here and plan.site["continuation"] == "manual":
        return Decision(ended, verdict.cause or "this site continues by hand")
    limit = _limit_reached(history, plan.preset["limits"])
    return Decision(ended, "; ".join(filter(None, (verdict.cause, limit)))) if limit else Decision("again", verdict.cause)


def history(run: Run, plan: Plan) -> History:
    """From the events, this life's own ``crashed`` among them."""
    events = run.events()
    newest_step = newest(run).step if newest(run) else 0  # type: ignore[union-attr]
    recent = events[_last_word_of_a_person(events) :]
    crashes = [event for event in recent if event["event"] == "crashed" and event.get("checkpoint") == newest_step]
    lives = [event for event in recent if event["event"] == "started"]
    return History(len(lives), len(crashes), gpu_hours(events, plan.layout.nodes * plan.layout.gpus_per_node))


def newest(run: Run) -> Manifest | None:
    """The newest committed checkpoint."""
    manifests = committed(run)
    return manifests[-1] if manifests else None


def whole(run: Run, manifest: Manifest) -> bool:
    """Whether every file of a checkpoint has its size. Its hashes are checked by the rank that loads it, which has the time."""
    folder = run.checkpoint(manifest.step)
    try:
        return all((folder / name).stat().st_size == entry["size"] for name, entry in manifest.files.items())
    except OSError:
        return False


def did_a_step(run: Run, life: int) -> bool:
    return any(record["life"] == life for record in metrics.read(run.metrics_file, "train"))


def full_time_min(run: Run) -> int | None:
    """The time limit that a follow-up job takes again, where that of this life was cut to end before a maintenance."""
    sent = run.events("submitted", "resumed")
    return sent[-1].get("full_time_min") if sent else None


def gpu_hours(events: Sequence[dict[str, Any]], gpus: int) -> float:
    """GPUs × hours from the start of each life to the last that is known of it."""
    spans: dict[int, tuple[str, str]] = {}
    for event in events:
        if "life" not in event or (event["event"] != "started" and event["life"] not in spans):
            continue
        start, _ = spans.get(event["life"], (event["time"], ""))
        spans[event["life"]] = (start, event["time"])
    return gpus * sum((_time(end) - _time(start)).total_seconds() for start, end in spans.values()) / 3600


def _limit_reached(history: History, limits: dict[str, Any]) -> str:
    if history.lives >= limits["max_lives"]:
        return f"limits.max_lives: {limits['max_lives']} lives are used up"
    if limits["max_gpu_hours"] is not None and history.gpu_hours >= limits["max_gpu_hours"]:
        return f"limits.max_gpu_hours: {history.gpu_hours:.1f} of {limits['max_gpu_hours']:g} GPU hours are used up"
    return ""


def _last_word_of_a_person(events: Sequence[dict[str, Any]]) -> int:
    return max((index for index, event in enumerate(events) if event["event"] in ("submitted", "resumed")), default=0)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
