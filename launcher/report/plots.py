"""Training loss, evaluation loss and learning rate over optimizer steps, one PNG each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import metrics
from launcher.errors import MissingError, UsageError
from launcher.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_IN = (8.0, 4.5)
DPI = 150
BLUE, ORANGE, GREY = "#2a6fb0", "#c8641b", "#8a8a8a"
SMOOTH_FROM_STEPS = 50
"""Shorter runs are drawn as they are; longer ones also as a running mean."""


def plots(run: Run) -> list[Path]:
    """Draw what the run has recorded into its ``report/`` and give the files; no evaluation, no ``eval-loss.png``.

    Errors: MissingError without matplotlib, UsageError when no step is recorded.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingError("matplotlib is not installed", code="missing-package", hint="pip install 'ftlaunch[report]'") from error
    train, evaluation = metrics.read(run.metrics_file, "train"), metrics.read(run.metrics_file, "eval")
    if not train:
        raise UsageError(f"{run.id} has recorded no step yet", file=str(run.metrics_file), code="no-metrics")
    run.report.mkdir(parents=True, exist_ok=True)
    files = [_draw_train_loss(run, train)]
    if evaluation:
        files.append(_draw_eval_loss(run, train, evaluation))
    return [*files, _draw_learning_rate(run, train)]


def _draw_train_loss(run: Run, train: Sequence[dict[str, Any]]) -> Path:
    steps, losses = _column(train, "step"), _column(train, "loss")

    def draw(axes: Axes) -> None:
        if len(steps) < SMOOTH_FROM_STEPS:
            axes.plot(steps, losses, color=BLUE, linewidth=1.6, marker="." if len(steps) < 3 else "", label="each step")
            return
        window = max(5, len(steps) // 40)
        axes.plot(steps, losses, color=BLUE, linewidth=0.7, alpha=0.4, label="each step")
        axes.plot(steps, _running_mean(losses, window), color=BLUE, linewidth=1.8, label=f"mean of {window} steps")

    return _draw(run, train, "train-loss.png", "Training loss", "loss (nats per target token)", draw)


def _draw_eval_loss(run: Run, train: Sequence[dict[str, Any]], evaluation: Sequence[dict[str, Any]]) -> Path:
    steps, losses = _column(evaluation, "step"), _column(evaluation, "loss")

    def draw(axes: Axes) -> None:
        axes.plot(steps, losses, color=ORANGE, linewidth=1.6, marker="o", markersize=4.5, label="evaluation")
        best = min(range(len(losses)), key=losses.__getitem__)
        axes.plot(
            steps[best],
            losses[best],
            "o",
            color="none",
            markeredgecolor=ORANGE,
            markersize=11,
            label=f"best: {losses[best]:.4f} at step {steps[best]:.0f}",
        )

    return _draw(run, train, "eval-loss.png", "Evaluation loss", "loss (nats per target token)", draw)


def _draw_learning_rate(run: Run, train: Sequence[dict[str, Any]]) -> Path:
    def draw(axes: Axes) -> None:
        axes.plot(_column(train, "step"), _column(train, "learning_rate"), color=BLUE, linewidth=1.6, label="learning rate")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")

    return _draw(run, train, "learning-rate.png", "Learning rate", "learning rate", draw)


def _draw(run: Run, train: Sequence[dict[str, Any]], name: str, title: str, unit: str, draw: Any) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_IN, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    last = train[-1]["step"]
    axes.set_xlim(0, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for index, step in enumerate(_life_starts(train)):
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0, label="next life" if index == 0 else "_")
    axes.set_xlabel("optimizer step", fontsize=11)
    axes.set_ylabel(unit, fontsize=11)
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    per_step = float(train[-1]["epoch"]) / last
    if per_step > 0:
        epochs = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda epoch: epoch / per_step))
        epochs.set_xlabel("epoch", fontsize=9, color=GREY)
        epochs.tick_params(labelsize=8, colors=GREY)
        epochs.spines["top"].set_color(GREY)
    axes.set_title(f"{title}: {run.id}", fontsize=12, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, run.report / name)


def _save(figure: Any, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


def _life_starts(train: Sequence[dict[str, Any]]) -> list[int]:
    """The first recorded step of every life but the first."""
    return [after["step"] for before, after in itertools.pairwise(train) if after["life"] != before["life"]]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` values, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(sums))]


def _column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(record[name]) for record in records]
