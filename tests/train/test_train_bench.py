"""The bench with torch: a cell is a step of the training's own engine, a bad one is a row, rivals train on the same samples."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the training's tests need torch: pip install -e '.[train,dev]'")
pytest.importorskip("pydantic", reason="the bench is the command's, and the source's stack has no command")

from typer.testing import CliRunner

from launcher.bench.inside import tell
from launcher.bench.lengths import code_lengths, sample_lengths
from launcher.bench.material import make_data
from launcher.cli import app
from launcher.train.batches import Samples
from launcher.train.order import Order
from tests.conftest import REPOSITORY

SMALL = (
    "model.config={model_type: starcoder2, vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
)


def bench(folder: Path, *arguments: str, **environ: str) -> Any:
    preset = str(REPOSITORY / "presets/bench/tiny.yaml")
    words = ["bench", preset, "--site", "local", "--json", "--set", SMALL, "--set", "training.effective_batch=4", "--out", str(folder)]
    before = dict(os.environ)
    os.environ.update({"FTLAUNCH_DATA": str(folder.parent / "data"), **environ})
    try:
        return CliRunner().invoke(app, [*words, "--sequence-length", "64", "--steps", "2", "--warm-up", "1", *arguments])
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_sweep_measures_what_fits_and_names_the_fastest(tmp_path: Path) -> None:
    """torch has no cudnn attention on CPU, and the planner does not look at single backends: that cell fails, the others do not."""
    varied = ("--attention", "sdpa,sdpa:cudnn,flash2", "--adapter", "lora", "--micro-batch", "2", "--checkpointing", "full")
    result = bench(tmp_path / "out", *varied)
    assert result.exit_code == 0, result.output + str(result.exception)
    document = json.loads(result.stdout)
    measured, failed, skipped = document["rows"]
    assert (measured["outcome"], measured["steps"], measured["gradient_accumulation"]) == ("measured", 2, 2)
    assert 0 < measured["trained_parameters"] < measured["parameters"] and measured["memory_gib"] > 0.1
    lengths = [tokens for step in sample_lengths(code_lengths(), 64, 3, 4)[1:] for tokens in step]  # flatten: no pads are computed
    assert measured["useful_share"] == pytest.approx((sum(lengths) - len(lengths)) / sum(lengths))
    assert failed["outcome"] == "failed" and failed["reason"].startswith("RuntimeError") and failed["step_s"] is None
    assert skipped["outcome"] == "skipped" and skipped["step_s"] is None
    (best,) = document["fastest"]
    assert "--set 'adapter={kind: lora}' --set training.micro_batch=2" in best["submit"] and "--set attention" not in best["submit"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"bench.md", "bench.csv", "bench.json", "rows.jsonl"}


def test_rivals_train_on_the_same_samples(tmp_path: Path) -> None:
    result = bench(tmp_path / "out", "--against", "trainer")
    assert result.exit_code == 0, result.output + str(result.exception)
    contests = json.loads(result.stdout)["against"]
    assert [(contest["rival"], contest["outcome"], contest["micro_batch"]) for contest in contests] == [
        ("trainer", "measured", 1),
        ("memtune", "measured", 4),
    ]
    lengths = [tokens for step in sample_lengths(code_lengths(), 64, 3, 4)[1:] for tokens in step]
    for contest in contests:
        assert contest["bound"] == pytest.approx(64 * len(lengths) / sum(lengths))
        assert contest["ratio"] > 0 and contest["cpu_ratio"] > 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("No available kernel. Aborting execution."), "failed"),
        (SystemExit(3), "failed"),
    ],
)
def test_what_went_wrong_is_told(error: BaseException, outcome: str, tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        raise error

    assert tell(tmp_path / "result.json", work) == 1
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["outcome"] == outcome and told["reason"].startswith(type(error).__name__)


@pytest.mark.parametrize("packing", ["none", "flatten", "documents", "concatenate"])
def test_material_gives_every_step_its_lengths(packing: str, tmp_path: Path) -> None:
    wish = {"sequence_length": 128, "steps": 3, "samples_per_step": 4, "packing": packing, "seed": 5, "vocabulary": 300}
    facts = make_data(wish, tmp_path / "data")
    samples, order = Samples(tmp_path / "data" / "train"), Order(5, 12, 1, 4)
    assert len(samples) == facts["train_samples"] == 12 and facts["train_targets"] == samples.num_targets.sum()
    seen = [[len(samples.tokens_and_targets(index)[0]) for index in order.samples(step)] for step in (1, 2, 3)]
    if packing in ("none", "flatten"):
        assert seen == sample_lengths(code_lengths(), 128, 3, 4)
    elif packing == "concatenate":
        assert seen == [[128] * 4] * 3
    else:
        assert max(map(max, seen)) <= 128


def test_interpreters_of_images_can_read_it() -> None:
    """What runs in the image must parse on its Python."""
    import ast

    for name in ("cell", "lengths", "inside", "material", "measure", "rival"):
        source = (REPOSITORY / "launcher" / "bench" / f"{name}.py").read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 9))
    assert sys.version_info >= (3, 10)
