"""Exact and elastic: a run that is interrupted is the one that is not, on as many ranks bit for bit, on others to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic import STEPS, Bench, Layout
from rank_server import RankServer
from training_runs import history, make_data, make_model, make_run, state_of

from launcher.errors import EXIT_STOPPED
from launcher.metrics import read

pytestmark = pytest.mark.train

DDP_PAIRS = [(Layout("ddp", first), Layout("ddp", then)) for first in (1, 2, 4) for then in (1, 2, 4)]
OTHER_PAIRS = [
    ("adamw", Layout("fsdp", 1), Layout("fsdp", 2)),
    ("adamw", Layout("fsdp", 4), Layout("fsdp", 2)),
    ("adamw", Layout("ddp", 2), Layout("fsdp", 2)),
    ("adamw", Layout("fsdp", 4), Layout("ddp", 1)),
    ("adamw", Layout("zero2", 1), Layout("zero2", 2)),
    ("adamw", Layout("zero2", 4), Layout("zero2", 2)),
    ("adamw", Layout("zero3", 1), Layout("zero3", 2)),
    ("adamw", Layout("zero3", 4), Layout("zero3", 2)),
    ("adafactor", Layout("fsdp", 2), Layout("ddp", 1)),
    ("adafactor", Layout("ddp", 1), Layout("fsdp", 4)),
]
SHORT = {"epochs": 1, "stop_at": 8}
SHORT_STEPS = 17


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory, server: RankServer) -> dict[str, Bench]:
    return {
        "ddp": Bench(tmp_path_factory.mktemp("ddp"), server),
        "adamw": Bench(tmp_path_factory.mktemp("adamw"), server, "adamw", **SHORT),
        "adafactor": Bench(tmp_path_factory.mktemp("adafactor"), server, "adafactor", **SHORT),
    }


@pytest.mark.parametrize(("first", "then"), DDP_PAIRS, ids=str)
def test_ddp_goes_on_on_any_number_of_ranks(benches: dict[str, Bench], first: Layout, then: Layout) -> None:
    outcome = benches["ddp"].go_on(first, then)
    assert outcome.exit_codes == [0] * then.ranks and outcome.steps == STEPS and outcome.same_samples
    assert outcome.largest_difference < 1e-5


@pytest.mark.parametrize(("optimizer", "first", "then"), OTHER_PAIRS, ids=str)
def test_a_run_goes_on_in_another_layout(benches: dict[str, Bench], optimizer: str, first: Layout, then: Layout) -> None:
    """One that grows and one that shrinks of each engine; all of them, over 50 steps: ``make test-matrix``."""
    outcome = benches[optimizer].go_on(first, then)
    assert outcome.exit_codes == [0] * then.ranks and outcome.steps == SHORT_STEPS and outcome.same_samples
    assert outcome.largest_difference < 1e-5


@pytest.mark.parametrize(
    ("engine", "ranks", "optimizer", "packing"),
    [
        ("ddp", 4, "adamw", "none"),
        ("ddp", 2, "adamw", "flatten"),
        ("fsdp", 2, "adafactor", "none"),
        ("fsdp", 2, "adamw", "flatten"),
        ("zero2", 2, "adamw", "none"),
        ("zero3", 2, "adamw", "flatten"),
    ],
    ids=str,
)
def test_interrupted_in_every_epoch_bit_for_bit(
    tmp_path: Path, server: RankServer, engine: str, ranks: int, optimizer: str, packing: str
) -> None:
    model, data = make_model(tmp_path / "model", dropout=True), make_data(tmp_path / "data", 33)
    sections = {
        "parallelism": engine,
        "data": {"packing": packing},
        "training": {"epochs": 3, "effective_batch": 7, "micro_batch": 1, "optimizer": optimizer},
        "checkpoint": {"every": "never"},
    }
    whole, cut = (make_run(tmp_path / name, model, data, ranks=ranks, **sections) for name in ("whole", "cut"))
    assert server.train(whole) == [0] * ranks
    for life, stop_at in enumerate((2, 7, 12)):  # epochs of 33 samples in steps of 7: after 4.7 and 9.4 steps
        assert server.train(cut, life=life, stop_at=stop_at) == [EXIT_STOPPED] * ranks
    assert server.train(cut, life=3) == [0] * ranks
    assert {record["life"] for record in read(cut.metrics_file, "train")} == {0, 1, 2, 3}
    assert history(cut) == history(whole) and len(history(whole)) == 15
    assert state_of(cut, 15) == state_of(whole, 15)
