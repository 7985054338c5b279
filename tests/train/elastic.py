"""Runs that go on on another number of ranks or in another engine, measured against one that nobody interrupted. No assertions here."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_server import RankServer
from training_runs import make_data, make_model, make_run

from launcher import metrics
from launcher.errors import EXIT_STOPPED
from launcher.run import Run

STEPS, EPOCHS = 50, 3
STOP_AT = 23
"""In the middle of epoch 2 of 3."""
SECTIONS: dict[str, Any] = {
    "training": {"effective_batch": 6, "micro_batch": 1},  # on 4 ranks 2, 2, 1, 1: two of them run a dummy each step
    "checkpoint": {"every": "never"},
}
SAMPLES = 100


@dataclass(frozen=True)
class Layout:
    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} on {self.ranks}"


@dataclass(frozen=True)
class Outcome:
    exit_codes: list[int]
    steps: int
    same_samples: bool
    """samples_sha, useful tokens and learning rate of every step."""
    largest_difference: float
    """Of the losses."""


class Bench:
    """Makes each interrupted run once, and a copy for each way to go on."""

    def __init__(self, folder: Path, server: RankServer, optimizer: str = "adamw", epochs: int = EPOCHS, stop_at: int = STOP_AT) -> None:
        self._folder, self._server, self._optimizer, self._epochs, self._stop_at = folder, server, optimizer, epochs, stop_at
        self._model, self._data = make_model(folder / "model"), make_data(folder / "data", SAMPLES)
        self._reference: list[dict[str, Any]] | None = None
        self._stopped: dict[Layout, Run] = {}

    def go_on(self, first: Layout, then: Layout) -> Outcome:
        """``stop_at`` steps in one layout, the rest in the other; against one rank without interruption."""
        if self._reference is None:
            whole = self._run("reference", Layout("ddp", 1))
            assert self._server.train(whole) == [0]
            self._reference = metrics.read(whole.metrics_file, "train")
        if first not in self._stopped:
            run = self._run(f"{first.engine}-{first.ranks}", first)
            assert self._server.train(run, stop_at=self._stop_at) == [EXIT_STOPPED] * first.ranks
            self._stopped[first] = run
        name = f"{first.engine}-{first.ranks}-then-{then.engine}-{then.ranks}"
        moved = Run(Path(shutil.copytree(self._stopped[first].root, self._folder / name)))
        moved.life(1).mkdir(parents=True)
        for file in self._run(f"{name}-plan", then).root.iterdir():
            shutil.copyfile(file, moved.life(1) / file.name)
        codes = self._server.train(moved, life=1)
        return self._outcome(codes, metrics.read(moved.metrics_file, "train"))

    def _run(self, name: str, layout: Layout) -> Run:
        training = {**SECTIONS["training"], "optimizer": self._optimizer, "epochs": self._epochs}
        sections = {**SECTIONS, "training": training, "parallelism": layout.engine}
        return make_run(self._folder / name, self._model, self._data, ranks=layout.ranks, **sections)

    def _outcome(self, codes: list[int], found: list[dict[str, Any]]) -> Outcome:
        assert self._reference is not None
        exact = ("step", "samples_sha", "useful_tokens", "learning_rate")
        pairs = list(zip(self._reference, found))
        same = all(one[key] == other[key] for one, other in pairs for key in exact)
        differences = [abs(one["loss"] - other["loss"]) for one, other in pairs]
        return Outcome(codes, len(found), same, max(differences))
