"""Engines: each shares the state out as planned or says that it does not, and gives the gradients of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rank_server import RankServer
from training_runs import LORA, make_data, make_model, make_run, torch
from transformers import AutoModelForCausalLM

from launcher import metrics
from launcher.errors import EXIT_DO_NOT_RETRY, UsageError
from launcher.run import Run, read_exit_records
from launcher.train.pieces import PieceFiles
from launcher.train.supported import require_supported

pytestmark = pytest.mark.train

SHARED_OUT = {"ddp": (), "fsdp": ("model", "optimizer"), **dict.fromkeys(("zero1", "zero2", "zero3"), ("model", "optimizer"))}
"""Engine → kinds of files of which each rank writes its own part."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("five"), 5)


def one_step(root: Path, model: Path, data: Path, engine: str, ranks: int, **sections: Any) -> Run:
    training = {"effective_batch": 5, "micro_batch": 1, "warmup": 0, **sections.pop("training", {})}
    return make_run(root, model, data, ranks=ranks, parallelism=engine, training=training, **sections)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, server: RankServer, model: Path, five: Path) -> Run:
    run = one_step(tmp_path_factory.mktemp("alone") / "run", model, five, "ddp", 1)
    assert server.train(run) == [0]
    return run


def state(run: Run, kind: str, step: int = 1) -> dict[str, torch.Tensor]:
    with PieceFiles(sorted(run.checkpoint(step).glob(f"{kind}*.safetensors"))) as files:
        return {name: files.whole(name) for name in files.shapes}


@pytest.mark.parametrize("engine", SHARED_OUT)
def test_three_and_two_samples_give_the_gradients_of_one_process(
    tmp_path: Path, server: RankServer, model: Path, five: Path, alone: Run, engine: str
) -> None:
    run = one_step(tmp_path / "run", model, five, engine, 2)
    assert run.plan().batch.samples_per_rank == (3, 2) and run.plan().batch.micro_steps == 3
    assert server.train(run) == [0, 0]
    (expected,), (found,) = (metrics.read(each.metrics_file, "train") for each in (alone, run))
    assert found["samples_sha"] == expected["samples_sha"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5)
    gradients, sharded_gradients = state(alone, "optimizer"), state(run, "optimizer")  # AdamW's first moment is a tenth of the first one
    assert gradients.keys() == sharded_gradients.keys()
    for name in gradients:
        torch.testing.assert_close(sharded_gradients[name], gradients[name], rtol=1e-5, atol=1e-7)
    _check_shares(run, engine)
    trained, final = state(run, "model"), dict(AutoModelForCausalLM.from_pretrained(run.model).named_parameters())
    assert trained.keys() == final.keys() and all(torch.equal(trained[name], final[name]) for name in trained)
    assert json.loads((run.model / "config.json").read_text())["architectures"] == ["Starcoder2ForCausalLM"]


def _check_shares(run: Run, engine: str) -> None:
    """Ranks hold, and so write, about half each; without sharding the first writes all."""
    for kind in ("model", "optimizer"):
        sizes = [path.stat().st_size for path in sorted(run.checkpoint(1).glob(f"{kind}*.safetensors"))]
        if kind not in SHARED_OUT[engine]:
            assert len(sizes) == 1
        else:
            assert len(sizes) == 2 and 0.6 < sizes[0] / sizes[1] < 1.7


def test_factored_moments_over_ranks_are_those_of_transformers(tmp_path: Path, server: RankServer, model: Path) -> None:
    data = make_data(tmp_path / "data", 24)
    changes = {"training": {"effective_batch": 6, "optimizer": "adafactor", "learning_rate": 1e-3}}
    theirs, ours = (
        one_step(tmp_path / name, model, data, name, ranks, **{**changes, "training": dict(changes["training"])})
        for name, ranks in (("ddp", 1), ("fsdp", 4))
    )
    assert server.train(theirs) == [0] and server.train(ours) == [0] * 4
    for kind in ("model", "optimizer"):
        expected, found = state(theirs, kind, 4), state(ours, kind, 4)
        assert expected.keys() == found.keys()
        assert kind == "model" or {name.rpartition("/")[2] for name in found} == {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_adapters_in_bf16_are_saved_whole(tmp_path: Path, server: RankServer, model: Path, five: Path, engine: str) -> None:
    data = make_data(tmp_path / "data", 10, 3)
    sections = {"adapter": {**LORA, "dropout": 0.0}, "training": {"dtype": "bf16"}, "evaluation": {"every": "1"}}
    plain, run = (
        one_step(tmp_path / name, model, data, name, 2, **{**sections, "training": dict(sections["training"])}) for name in ("ddp", engine)
    )
    assert server.train(plain) == [0, 0] and server.train(run) == [0, 0]
    adapter = state(run, "model", 2)
    assert adapter.keys() == state(plain, "model", 2).keys() and all(tensor.numel() for tensor in adapter.values())
    assert all(bool(tensor.any()) and tensor.dtype == torch.float32 for name, tensor in adapter.items() if "lora_B" in name)
    for kind in ("train", "eval"):
        for one, other in zip(metrics.read(plain.metrics_file, kind), metrics.read(run.metrics_file, kind), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=0.02)
    assert AutoModelForCausalLM.from_pretrained(run.model) is not None


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "zero3"])
def test_weights_are_computed_with_in_the_planned_dtype(
    tmp_path: Path, server: RankServer, model: Path, five: Path, alone: Run, engine: str
) -> None:
    run = one_step(tmp_path / "run", model, five, engine, 2, training={"dtype": "bf16"})
    assert server.train(run) == [0, 0]
    (half,), (whole,) = (metrics.read(each.metrics_file, "train") for each in (run, alone))
    assert 1e-6 < abs(half["loss"] - whole["loss"]) < 0.05


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_another_dtype_than_planned_is_refused(tmp_path: Path, server: RankServer, model: Path, five: Path, engine: str) -> None:
    run = one_step(tmp_path / "run", model, five, engine, 2, training={"dtype": "bf16"})
    file = run.deepspeed_file()
    file.write_text(file.read_text().replace('"bf16": {"enabled": true}', '"bf16": {"enabled": false}'))
    assert server.train(run) == [EXIT_DO_NOT_RETRY] * 2
    assert "DeepSpeed set up torch.float32 weights for bf16" in read_exit_records(run, 0)[0].reason


@pytest.mark.parametrize(("engine", "offload"), [("zero2", "optimizer"), ("zero3", "all"), ("fsdp", "all")])
def test_offload_changes_no_loss(
    tmp_path: Path, server: RankServer, model: Path, five: Path, alone: Run, engine: str, offload: str
) -> None:
    run = one_step(tmp_path / "run", model, five, engine, 2, offload=offload)
    assert server.train(run) == [0, 0]
    expected, found = state(alone, "model"), state(run, "model")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_another_stage_than_planned_is_refused(tmp_path: Path, server: RankServer, model: Path, five: Path) -> None:
    run = one_step(tmp_path / "run", model, five, "zero3", 2)
    file = run.deepspeed_file()
    file.write_text(file.read_text().replace('"stage": 3', '"stage": 1'))
    assert server.train(run) == [EXIT_DO_NOT_RETRY] * 2
    assert "DeepSpeed set up DeepSpeedZeroOptimizer of stage 1 for zero3" in read_exit_records(run, 0)[0].reason


def test_a_model_that_is_not_sharded_is_refused(tmp_path: Path, model: Path, five: Path) -> None:
    from launcher.train.engine_fsdp import require_sharded
    from launcher.train.layers import decoder_layers

    whole = AutoModelForCausalLM.from_pretrained(model)
    plan = one_step(tmp_path / "run", model, five, "fsdp", 2).plan()
    mesh: Any = SimpleNamespace(size=lambda: 2)
    with pytest.raises(UsageError, match="FSDP2 set up Starcoder2ForCausalLM whose layers are not sharded one by one"):
        require_sharded(plan, whole, decoder_layers(whole), mesh)
    smaller: Any = SimpleNamespace(size=lambda: 1)
    with pytest.raises(UsageError, match="FSDP2 set up 1 ranks, the plan has 2"):
        require_sharded(plan, whole, decoder_layers(whole), smaller)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallelism": "zero1", "training": {"optimizer": "adafactor"}}, "Adafactor has nothing to factor then"),
        ({"parallelism": "ddp", "offload": "optimizer"}, "ddp keeps everything on the GPUs"),
        ({"parallelism": "zero2", "offload": "all"}, r"zero2 does not shard the weights \(offload: optimizer\)"),
        ({"parallelism": "fsdp", "offload": "optimizer"}, r"fsdp offloads weights and optimizer state together \(offload: all\)"),
    ],
    ids=["adafactor in partitions", "nothing sharded", "whole weights", "half an offload"],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, five: Path, sections: dict[str, Any], message: str) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=message):
        require_supported(make_run(tmp_path / "run", tmp_path / "model", five, **sections).plan())
