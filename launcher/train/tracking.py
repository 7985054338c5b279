"""Trackers beside ``metrics.jsonl``: TensorBoard, W&B, MLflow, through accelerate's classes. Rank 0 only; nothing here ends training.

A thread of its own talks to them: a server that does not answer must not hold up a step. ``metrics.jsonl`` stays the record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.files import write_json
from launcher.metrics import Kind
from launcher.plan import Plan
from launcher.run import Run

LOG = logging.getLogger("launcher.train")

FINISH_S = 30.0
"""How long the end of a life waits for trackers to hand in what they hold: less than what schedulers grant after a stop."""


class Tracking:
    """The trackers that the plan's preset names under ``tracking.to``. They start with the first record, which says the first step.

    Every life of a run goes on with the same tracker run; its ids lie in ``<run>/tracking/ids.json``.
    """

    def __init__(self, run: Run, life: int, plan: Plan) -> None:
        self._run, self._life, self._plan = run, life, plan
        self._names = list(plan.preset.get("tracking", {}).get("to", ()))  # a plan of an earlier version has no such section
        self._records: queue.SimpleQueue[tuple[Kind, int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def log(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Hand a record of ``metrics.jsonl`` on; returns at once."""
        if not self._names:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()
        self._records.put((kind, step, named(kind, values)))

    def close(self) -> None:
        """Let the trackers finish, for ``FINISH_S`` at most."""
        if self._thread is None:
            return
        self._records.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            LOG.warning("tracking: %s did not finish within %.0f s; metrics.jsonl has everything", ", ".join(self._names), FINISH_S)
        self._thread = None

    def _work(self) -> None:
        trackers: dict[str, Any] | None = None
        newest = 0
        while (record := self._records.get()) is not None:
            kind, step, values = record
            if trackers is None:
                trackers = self._open(step if kind == "train" else step + 1)
            newest = max(newest, step)
            for name in list(trackers):
                try:  # W&B drops what comes later than the next step, as the record of a checkpoint does that was written beside training
                    trackers[name].log(values, step=newest if name == "wandb" else step)
                except Exception as error:
                    _give_up(name, error)
                    del trackers[name]
        for name, tracker in (trackers or {}).items():
            try:
                tracker.finish()
            except Exception as error:
                _give_up(name, error)

    def _open(self, first_step: int) -> dict[str, Any]:
        opened = {}
        for name in self._names:
            try:
                opened[name] = open_tracker(name, self._run, self._plan, first_step, new=self._life == 0)
            except Exception as error:  # a package that is missing, no login, no server: each has its own
                _give_up(name, error)
        return opened


def open_tracker(name: str, run: Run, plan: Plan, first_step: int, *, new: bool) -> Any:
    """One of accelerate's trackers, started, with the preset as its configuration where the life is ``new``.

    ``first_step``: of this life; what an earlier life wrote at it or later was lost with that life. Errors: whatever the tracker raises.
    """
    from accelerate import tracking

    folder = run.root / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    wish, ids = plan.preset["tracking"], _read_ids(folder)
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker("tensorboard", str(folder), purge_step=first_step)
    elif name == "wandb":
        ids.setdefault("wandb", f"{run.id}-{uuid.uuid4().hex[:6]}")
        for variable in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # a container has no home
            os.environ.setdefault(variable, str(folder / "wandb-cache"))
        mode = wandb_mode(plan)
        if mode == "offline":
            LOG.info("tracking: W&B is offline; later, where there is Internet: wandb sync %s/wandb/offline-run-*", folder)
        settings = {"console": "off", "silent": True}  # a rank's log is its own
        tracker = tracking.WandBTracker(
            wish["project"], id=ids["wandb"], name=run.id, resume="allow", mode=mode, dir=str(folder), settings=settings
        )
    else:
        assert name == "mlflow", f"the schema knows no tracker {name}"
        if wish["mlflow_uri"] is not None:
            os.environ["MLFLOW_TRACKING_URI"] = wish["mlflow_uri"]
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        tracker = tracking.MLflowTracker(wish["project"], logging_dir=str(folder / "mlflow"), run_id=ids.get("mlflow"), run_name=run.id)
    if hasattr(tracker, "start"):  # accelerate 0.30 starts it in the constructor
        tracker.start()
    if name == "mlflow":
        ids["mlflow"] = tracker.tracker.info.run_id  # its server chooses it
    write_json(folder / "ids.json", ids)
    if new:
        tracker.store_init_configuration(configuration(plan))
    return tracker


def named(kind: Kind, values: Mapping[str, Any]) -> dict[str, float]:
    """A record's finite numbers under the names that trackers show: ``train/loss``; and tokens per second, raw and useful."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    if kind == "train" and numbers.get("step_s"):
        rates = {"tokens": "tokens_per_s", "useful_tokens": "useful_tokens_per_s"}
        numbers.update({rate: numbers[name] / numbers["step_s"] for name, rate in rates.items() if name in numbers})
    return {f"{kind}/{name}": value for name, value in numbers.items()}


def configuration(plan: Plan) -> dict[str, Any]:
    """The resolved preset with dotted keys, and what of the plan compares runs. Only values that every tracker takes."""
    found: dict[str, Any] = {
        "identity": plan.identity,
        "world_size": plan.world_size,
        "micro_steps": plan.batch.micro_steps,
        "gpu": (plan.hardware.get("gpu") or {}).get("kind", "none"),
    }

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                walk(f"{prefix}.{key}" if prefix else key, entry)
        elif value is not None:
            found[prefix] = value if isinstance(value, (bool, int, float)) else str(value)

    walk("", plan.preset)
    return found


def wandb_mode(plan: Plan) -> str:
    """``online`` only where the preset says so, or where it leaves it open and the site says that the partition has Internet."""
    wanted = str(plan.preset["tracking"]["wandb"])
    if wanted != "auto":
        return wanted
    partition = plan.site.get("partitions", {}).get(plan.slurm.get("partition", ""), {})
    return "online" if partition.get("internet") else "offline"


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(ids)


def _give_up(name: str, error: Exception) -> None:
    """Once for each tracker and life: it is not asked again."""
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"{type(error).__name__}: {first}"
    LOG.warning("tracking: %s failed and is left out of this life (%s); metrics.jsonl has everything", name, what)
