"""Trackers beside metrics.jsonl: the hook with a stub of accelerate's class, and the real packages where they are installed."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking

from launcher import metrics
from launcher.errors import EXIT_STOPPED
from launcher.run import Run
from launcher.train import tracking
from tests.train.training_runs import make_data, make_model, make_run, train_here

WISH = {"to": ["tensorboard"], "project": "study", "wandb": "auto", "mlflow_uri": None}


class Stub(accelerate_tracking.GeneralTracker):  # type: ignore[misc]
    name = "tensorboard"
    requires_logging_directory = True
    started: list[Stub] = []

    def __init__(self, run_name: str, logging_dir: str, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.logged, self.configuration, self.finished = arguments, [], None, False
        self.thread = ""

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        Stub.started.append(self)
        self.thread = threading.current_thread().name

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("material")
    return make_model(folder / "model"), make_data(folder / "data", held_out=8)


def run_of(root: Path, material: tuple[Path, Path], **wish: Any) -> Run:
    return make_run(root, *material, tracking={**WISH, **wish}, evaluation={"every": "4"})


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setattr(accelerate_tracking, "TensorBoardTracker", Stub)
    monkeypatch.setattr(Stub, "started", [])
    return Stub


def test_every_record_reaches_the_tracker(tmp_path: Path, material: tuple[Path, Path], stub: type[Stub]) -> None:
    run = run_of(tmp_path / "run", material)
    assert train_here(run) == 0
    (tracker,) = stub.started
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("checkpoint", "bytes")):
        recorded = [(record["step"], record[name]) for record in metrics.read(run.metrics_file, kind)]  # type: ignore[arg-type]
        assert [(step, values[f"{kind}/{name}"]) for step, values in tracker.logged if f"{kind}/{name}" in values] == recorded != []
    assert tracker.configuration["training.learning_rate"] == 3e-3 and tracker.configuration["identity"] == "0" * 64
    assert tracker.finished and tracker.thread == "tracking"


def test_a_resumed_life_goes_on_where_the_other_lost_nothing(tmp_path: Path, material: tuple[Path, Path], stub: type[Stub]) -> None:
    run = run_of(tmp_path / "run", material)
    assert train_here(run, stop_at=3) == EXIT_STOPPED
    assert train_here(run, life=1) == 0
    first, second = stub.started
    assert (first.arguments, second.arguments) == ({"purge_step": 1}, {"purge_step": 4})
    assert second.configuration is None
    steps = [step for tracker in stub.started for step, values in tracker.logged if "train/loss" in values]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    where: str,
    tmp_path: Path,
    material: tuple[Path, Path],
    stub: type[Stub],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no server\nsecond line")

    monkeypatch.setattr(stub, where, fail)
    run = run_of(tmp_path / "run", material)
    with caplog.at_level(logging.WARNING, "launcher.train"):
        assert train_here(run) == 0
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("tracking")]
    assert said == ["tracking: tensorboard failed and is left out of this life (ConnectionError: no server); metrics.jsonl has everything"]
    assert len(metrics.read(run.metrics_file, "train")) == 8


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, material: tuple[Path, Path], stub: type[Stub], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    monkeypatch.setattr(stub, "log", lambda *_, **__: never.wait())
    monkeypatch.setattr(tracking, "FINISH_S", 0.01)
    run = run_of(tmp_path / "run", material)
    assert train_here(run) == 0
    assert "tracking: tensorboard did not finish within 0 s; metrics.jsonl has everything" in caplog.text
    never.set()


def test_without_trackers_nothing_starts(tmp_path: Path, material: tuple[Path, Path], stub: type[Stub]) -> None:
    run = run_of(tmp_path / "run", material, to=[])
    assert train_here(run) == 0
    assert stub.started == [] and not (run.root / "tracking").exists()


@pytest.mark.parametrize(
    ("wanted", "internet", "mode"),
    [
        ("auto", True, "online"),
        ("auto", False, "offline"),
        ("auto", None, "offline"),
        ("online", False, "online"),
        ("offline", True, "offline"),
    ],
)
def test_wandb_sends_only_where_it_may(wanted: str, internet: bool | None, mode: str, tmp_path: Path, material: tuple[Path, Path]) -> None:
    from dataclasses import replace

    plan = run_of(tmp_path / "run", material, wandb=wanted).plan(0)
    there = replace(plan, site={"partitions": {"gpu": {"internet": internet}}}, slurm={"partition": "gpu"})
    assert tracking.wandb_mode(there) == mode
    assert tracking.wandb_mode(plan) == ("online" if wanted == "online" else "offline")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real tracker is waited for, however slow this machine is to import and start it."""
    monkeypatch.setattr(tracking, "FINISH_S", 600.0)


def two_lives(run: Run) -> None:
    assert train_here(run, stop_at=3) == EXIT_STOPPED
    assert train_here(run, life=1) == 0


def test_real_tensorboard_shows_one_run(tmp_path: Path, material: tuple[Path, Path], patient: None) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_of(tmp_path / "run", material)
    two_lives(run)
    seen = EventAccumulator(str(run.root / "tracking" / "tensorboard"))
    seen.Reload()
    recorded = [(record["step"], pytest.approx(record["loss"])) for record in metrics.read(run.metrics_file, "train")]
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == recorded


def test_real_mlflow_goes_on_with_its_run(
    tmp_path: Path, material: tuple[Path, Path], patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back afterwards
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = run_of(tmp_path / "run", material, to=["mlflow"], mlflow_uri=str(tmp_path / "mlruns"))
    two_lives(run)
    run_id = json.loads((run.root / "tracking" / "ids.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(str(tmp_path / "mlruns"))
    (experiment,) = client.search_experiments(filter_string="name = 'study'")
    assert [found.info.run_id for found in client.search_runs([experiment.experiment_id])] == [run_id]
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(1, 9))


def test_real_wandb_keeps_its_id_offline(tmp_path: Path, material: tuple[Path, Path], patient: None) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    run = run_of(tmp_path / "run", material, to=["wandb"])
    two_lives(run)
    run_id = json.loads((run.root / "tracking" / "ids.json").read_text())["wandb"]
    files = sorted((run.root / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
