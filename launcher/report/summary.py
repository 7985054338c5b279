"""The numbers of a run, from its metrics and events. Nothing is drawn or printed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any

from launcher import metrics
from launcher.run import Run


@dataclass(frozen=True)
class Summary:
    """None where the run has not recorded what is needed."""

    steps: int
    """The last completed optimizer step."""
    epochs: float
    first_train_loss: float | None
    last_train_loss: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    tokens_per_s: float | None
    """Tokens computed, pads included, over the time of the steps."""
    useful_tokens_per_s: float | None
    """Target tokens that are no pads, over the time of the steps."""
    median_step_s: float | None
    lives: int
    wall_s: float | None
    """Time on nodes: from the first to the last event of each life, summed."""


def summary(run: Run) -> Summary:
    train, evaluation = metrics.read(run.metrics_file, "train"), metrics.read(run.metrics_file, "eval")
    best = min(evaluation, key=lambda record: float(record["loss"]), default=None)
    step_s = [float(record["step_s"]) for record in train]
    total_s = sum(step_s)
    return Summary(
        steps=train[-1]["step"] if train else 0,
        epochs=train[-1]["epoch"] if train else 0.0,
        first_train_loss=train[0]["loss"] if train else None,
        last_train_loss=train[-1]["loss"] if train else None,
        best_eval_loss=best["loss"] if best else None,
        best_eval_step=best["step"] if best else None,
        tokens_per_s=sum(record["tokens"] for record in train) / total_s if total_s else None,
        useful_tokens_per_s=sum(record["useful_tokens"] for record in train) / total_s if total_s else None,
        median_step_s=median(step_s) if step_s else None,
        lives=run.lives_started() or len({record["life"] for record in train}),
        wall_s=_wall_s(run.events()),
    )


def table(run: Run) -> list[tuple[str, str]]:
    """Rows of (what, value with unit) for a person; what is not known is left out."""
    found = summary(run)
    best = f"{found.best_eval_loss:.4f} at step {found.best_eval_step}" if found.best_eval_loss is not None else None
    rows = [
        ("trained parameters", _share(run)),
        ("steps", f"{found.steps}"),
        ("epochs", f"{found.epochs:.2f}"),
        ("first train loss", _number(found.first_train_loss, ".4f")),
        ("last train loss", _number(found.last_train_loss, ".4f")),
        ("best eval loss", best),
        ("tokens/s", _number(found.tokens_per_s, ",.0f")),
        ("useful tokens/s", _number(found.useful_tokens_per_s, ",.0f")),
        ("time per step, median", _number(found.median_step_s, ".3g", " s")),
        ("lives", f"{found.lives}"),
        ("wall time", _duration(found.wall_s)),
    ]
    return [(what, value) for what, value in rows if value is not None]


def _share(run: Run) -> str | None:
    counted = run.events("parameters")
    if not counted:
        return None
    trained, everything = counted[-1]["trained"], counted[-1]["all"]
    return f"{trained:,} of {everything:,} ({100 * trained / everything:.3g} %)"


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _wall_s(events: Sequence[dict[str, Any]]) -> float | None:
    times: dict[int, list[datetime]] = {}
    for event in events:
        if "life" in event:
            times.setdefault(event["life"], []).append(datetime.fromisoformat(event["time"].replace("Z", "+00:00")))
    return sum((max(of) - min(of)).total_seconds() for of in times.values()) if times else None
