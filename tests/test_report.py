"""The report of a run, from metrics and events that were written as a run writes them."""

from __future__ import annotations

import builtins
import math
import struct
from pathlib import Path

import pytest

from launcher import metrics
from launcher.errors import MissingError, UsageError
from launcher.report import plots, summary, table
from launcher.run import Run


def write_run(root: Path, *, steps: int = 200, lives: int = 3, evaluation: bool = True) -> Run:
    run = Run(root)
    root.mkdir(parents=True)
    for step in range(1, steps + 1):
        life = (step - 1) * lives // steps
        metrics.append(
            run.metrics_file,
            "train",
            step=step,
            epoch=3 * step / steps,
            loss=2 + 4 * math.exp(-step / 40) + 0.15 * math.sin(step * 1.7),
            learning_rate=3e-5 * min(step / 20, (steps - step) / (steps - 20)) if steps > 20 else 3e-5,
            grad_norm=1.0,
            step_s=0.5 if step % 2 else 1.5,
            tokens=1000,
            useful_tokens=770,
            samples_sha="0" * 16,
            life=life,
        )
        if evaluation and step % 16 == 0:
            metrics.append(
                run.metrics_file, "eval", step=step, epoch=3 * step / steps, loss=2.3 + 3 * math.exp(-step / 50) + step / 1000, life=life
            )
    return run


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", head[16:24])


def test_plots_are_written_into_the_report_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny-0123abcd")
    files = plots(run)
    assert [file.name for file in files] == ["train-loss.png", "eval-loss.png", "learning-rate.png"]
    assert {file.parent for file in files} == {run.report}
    assert all(width >= 1000 and height >= 600 for width, height in map(png_size, files))
    assert sorted(file.name for file in run.report.iterdir()) == sorted(file.name for file in files)


def test_a_run_without_evaluation_has_no_such_plot(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5, lives=1, evaluation=False)
    assert [file.name for file in plots(run)] == ["train-loss.png", "learning-rate.png"]


def test_one_step_can_be_drawn(tmp_path: Path) -> None:
    assert len(plots(write_run(tmp_path / "run", steps=1, lives=1, evaluation=False))) == 2


def test_a_run_without_a_step_cannot_be_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0)
    with pytest.raises(UsageError, match="no step"):
        plots(run)
    assert not run.report.exists()


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingError, match=r"ftlaunch\[report\]") as caught:
        plots(write_run(tmp_path / "run", steps=3))
    assert caught.value.exit_code == 4


def test_summary_counts_every_step_once_and_every_life(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100, lives=2)
    for time, event, life in (
        ("2026-01-01T10:00:00.000Z", "started", 0),
        ("2026-01-01T10:01:00.000Z", "requeued", 0),
        ("2026-01-01T12:00:00.000Z", "started", 1),
        ("2026-01-01T12:00:30.500Z", "finished", 1),
    ):
        run.append_event(event, life=life)
        lines = run.events_file.read_text().splitlines()
        written = lines[-1].split('"time": "')[1].split('"')[0]
        run.events_file.write_text("\n".join([*lines[:-1], lines[-1].replace(written, time)]) + "\n")
    found = summary(run)
    assert (found.steps, found.epochs, found.lives, found.wall_s) == (100, 3.0, 2, 90.5)
    assert (found.tokens_per_s, found.useful_tokens_per_s, found.median_step_s) == (1000.0, 770.0, 1.0)
    evaluation = metrics.read(run.metrics_file, "eval")
    assert found.best_eval_loss == min(record["loss"] for record in evaluation)
    rows = dict(table(run))
    assert rows["tokens/s"] == "1,000"
    assert rows["wall time"] == "1 min 30 s"
    assert rows["best eval loss"].endswith(f"at step {found.best_eval_step}")


def test_table_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    assert [what for what, _ in table(write_run(tmp_path / "run", steps=0))] == ["steps", "epochs", "lives"]
