"""Every layout resumed in every other that may continue it, and the table of it: ``make test-matrix``."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from elastic import SAMPLES, SECTIONS, STEPS, STOP_AT, Bench, Layout
from rank_server import RankServer
from training_runs import SOURCE, torch
from transformers import __version__ as transformers_version

pytestmark = [pytest.mark.train, pytest.mark.matrix]

RANKS = (1, 2, 4)
DOCS = SOURCE / "docs" / "benchmarks"
LIMIT = 1e-5


def _pairs(first: str, then: str) -> list[tuple[Layout, Layout]]:
    return [(Layout(first, before), Layout(then, after)) for before in RANKS for after in RANKS]


WAYS = [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")]
CASES = [
    *(("adamw", *pair) for way in [*WAYS, ("zero1", "zero1"), ("zero2", "zero2"), ("zero3", "zero3")] for pair in _pairs(*way)),
    *(("adafactor", *pair) for way in WAYS for pair in _pairs(*way)),
]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory, server: RankServer) -> dict[str, Bench]:
    return {optimizer: Bench(tmp_path_factory.mktemp(optimizer), server, optimizer) for optimizer in ("adamw", "adafactor")}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """What was found; written down when every case was run."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == len(CASES):
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS / "elastic-matrix.json").write_text(json.dumps({"machine": _machine(), "rows": found}, indent=1) + "\n")
        _write_table(DOCS / "elastic-matrix.md", found)


@pytest.mark.parametrize(("optimizer", "first", "then"), CASES, ids=str)
def test_a_run_goes_on(benches: dict[str, Bench], rows: list[dict[str, Any]], optimizer: str, first: Layout, then: Layout) -> None:
    outcome = benches[optimizer].go_on(first, then)
    good = outcome.exit_codes == [0] * then.ranks and outcome.steps == STEPS and outcome.same_samples
    good = good and outcome.largest_difference < LIMIT
    rows.append({"optimizer": optimizer, "first": asdict(first), "then": asdict(then), **asdict(outcome), "good": good})
    assert good, outcome


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers_version}"
    return f"{platform.machine()} CPU, gloo, {versions}"


def _write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    training = SECTIONS["training"]
    lines = [
        "# Runs resumed on other ranks and in other engines",
        "",
        f"Made by `make test-matrix` on {_machine()}.",
        "",
        f"Each row: {STOP_AT} steps in the layout of the second column, stopped in the middle of epoch 2, the rest of {STEPS} steps in the",
        f"one of the third, against {STEPS} steps of one process that nobody interrupted. {SAMPLES} samples, 3 epochs, effective batch",
        f"{training['effective_batch']} in micro batches of {training['micro_batch']}, so that 4 ranks hold 2, 2, 1 and 1 samples.",
        "fp32, no dropout. The number is the largest difference of a step's loss. Where the last column says yes, it is below",
        f"{LIMIT:g}, and samples, target tokens and learning rate of every step are the same.",
        "",
        "| optimizer | first | then | largest difference of a loss | as uninterrupted |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        first, then = (f"{row[key]['engine']}, {row[key]['ranks']}" for key in ("first", "then"))
        difference, good = f"{row['largest_difference']:.1e}", "yes" if row["good"] else "**no**"
        lines.append(f"| {row['optimizer']} | {first} | {then} | {difference} | {good} |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
