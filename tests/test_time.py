"""The time model: published rows, facts that must hold whatever the constants, lengths, lives, checkpoint intervals."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from benchmarks import planner_report
from benchmarks.fit_efficiency import CONSTANTS, fit, in_use
from benchmarks.published import Row, rows
from launcher.hardware import cadence
from launcher.hardware.flops import flops_per_token
from launcher.hardware.lengths import Lengths, Shape, lengths_of, shape_of
from launcher.hardware.step import StepParts, missing_fact, predict_evaluation, step_parts
from launcher.hardware.time import predict_step, predict_time
from launcher.plan import Batch, Layout, Staged, Time, rank_slices
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.reading import read_hardware, read_model_facts
from launcher.preset.site import Site
from tests.plans import FACTS as TINY
from tests.plans import hardware, preset, site

OWN = ("fastcode", "memtune")
HELD_OUT = {
    "fastcode-v100-checkpointing-32x1",
    "fastcode-a100-checkpointing-16x2",
    "fastcode-a6000-32x1",
    "fastcode-a6000-8x4",
    "fastcode-a100-1024-xformers",
    "fastcode-a100-1024-flash",
    "fastcode-a100-1024-default",
    "fastcode-a100-2048-default",
    "fastcode-a100-2048-lora",
    "memtune-3b",
    "memtune-15b",
}
FACTS = read_model_facts("starcoder2-3b").value
A100 = read_hardware("a100-80gb").value
LENGTHS = Lengths(16, (5, 0, 10, 20, 0, 7) + (0,) * 20 + (3,) * 38)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_published_seconds(row: Row) -> None:
    """Both sources within 15 %; llm-foundry, which is another program, within 16 %."""
    assert abs(row.deviation()) <= (0.15 if row.source in OWN else 0.16)


def test_rows_that_are_held_out() -> None:
    own = [row for row in rows() if row.source in OWN]
    assert len(own) == 16
    assert {row.name for row in own if row.use == "test"} == HELD_OUT
    assert len(CONSTANTS) < sum(row.use == "fit" for row in rows()) < len(HELD_OUT)


def test_constants_are_those_that_the_rows_give() -> None:
    assert in_use() == fit()


def test_report_is_the_generated_one() -> None:
    assert planner_report.OUT.read_text(encoding="utf-8") == planner_report.text(), "python -m benchmarks.planner_report"


@pytest.mark.parametrize(
    ("model", "at_1024", "at_2048"),
    [("gpt_bigcode-santacoder", 7.33, 7.93), ("starcoder2-3b", 19.3, 20.5), ("starcoder2-7b", 44.9, 46.7), ("starcoder2-15b", 97.0, 100.0)],
)
def test_flops_per_token(model: str, at_1024: float, at_2048: float) -> None:
    facts = read_model_facts(model).value
    assert flops_per_token(facts, 1024) / 1e9 == pytest.approx(at_1024, rel=0.005)
    assert flops_per_token(facts, 2048) / 1e9 == pytest.approx(at_2048, rel=0.005)


def seconds(
    facts: ModelFacts = FACTS, at: Hardware = A100, *, gpus: int = 4, micro: int = 1, lengths: Lengths | None = None, **changes: Any
) -> float:
    return parts(facts, at, gpus=gpus, micro=micro, lengths=lengths, **changes).total_s


def parts(
    facts: ModelFacts = FACTS, at: Hardware = A100, *, gpus: int = 4, micro: int = 1, lengths: Lengths | None = None, **changes: Any
) -> StepParts:
    """A step of 48 samples."""
    attention = changes.get("attention", "sdpa")
    wish = preset(gpus=gpus, **changes)
    ranks = 1 if wish.parallelism == "device_map" else gpus
    shares = tuple(part.stop - part.start for part in rank_slices(48, ranks))
    batch = Batch(48, shares, micro, -(-max(shares) // micro))
    return step_parts(wish, facts, at, Layout(1, gpus, ranks, 64, 480, 8), batch, attention, lengths)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_more_gpus_are_not_slower(parallelism: str) -> None:
    taken = [seconds(gpus=gpus, parallelism=parallelism) for gpus in (2, 3, 4, 6, 8)]
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] > taken[0] / 4.01


def test_device_map_gains_nothing_from_gpus() -> None:
    taken = [seconds(gpus=gpus, parallelism="device_map") for gpus in (1, 2, 4, 6)]
    assert taken == sorted(taken)
    assert taken[-1] < 1.02 * taken[0]
    assert taken[-1] > 5 * seconds(gpus=6, parallelism="ddp")


SLOWER = {
    "checkpointing": ({}, {"training": {"activation_checkpointing": "full"}}),
    "fp32-than-bf16": ({}, {"training": {"dtype": "fp32"}}),
    "fp32-than-tf32": ({"training": {"dtype": "fp32", "tf32": True}}, {"training": {"dtype": "fp32"}}),
    "autocast-than-pure": ({"training": {"dtype": "bf16_pure"}}, {}),
    "full-than-lora": ({"adapter": {"kind": "lora"}}, {}),
    "qlora-than-lora": ({"adapter": {"kind": "lora"}, "training": {"dtype": "bf16_pure"}}, {"adapter": {"kind": "qlora"}}),
    "sdpa-than-flash": ({"attention": "flash2"}, {}),
    "eager-than-sdpa": ({}, {"attention": "eager"}),
    "plain-than-fused": ({"training": {"cross_entropy": "fused"}}, {}),
    "chunked-than-plain": ({}, {"training": {"cross_entropy": "chunked"}}),
    "offload": ({"parallelism": "zero2"}, {"parallelism": "zero2", "offload": "optimizer"}),
    "offload-all": ({"parallelism": "zero3", "offload": "optimizer"}, {"parallelism": "zero3", "offload": "all"}),
    "adamw-than-8bit": ({"training": {"optimizer": "adamw_8bit"}}, {}),
}


@pytest.mark.parametrize(("faster", "slower"), SLOWER.values(), ids=SLOWER)
def test_what_is_slower(faster: dict[str, Any], slower: dict[str, Any]) -> None:
    assert seconds(**faster) < seconds(**slower)


def test_small_micro_batches_are_slower() -> None:
    taken = [seconds(micro=micro) for micro in (1, 2, 4, 6, 12)]
    assert taken == sorted(taken, reverse=True)


def test_pcie_is_slower_than_nvlink() -> None:
    assert A100.gpu is not None
    pcie = A100.model_copy(update={"gpu": A100.gpu.model_copy(update={"link": "pcie", "link_gb_s": None})})
    assert seconds(parallelism="zero3", at=pcie) > seconds(parallelism="zero3")


@pytest.mark.parametrize("attention", ["flash2", "xformers", "sdpa", "eager"])
def test_flatten_is_not_slower_than_padding(attention: str) -> None:
    padded = seconds(attention=attention, lengths=LENGTHS)
    assert seconds(attention=attention, lengths=LENGTHS, data={"name": "a/c", "packing": "flatten"}) < padded


def test_flatten_with_a_dense_mask_pays_for_the_whole_row() -> None:
    """eager computes what the mask of a flattened row hides: the square of its length."""
    flat = {"data": {"name": "a/c", "packing": "flatten"}, "lengths": LENGTHS}
    assert parts(micro=6, attention="eager", **flat).attention > 4 * parts(micro=1, attention="eager", **flat).attention
    for kind in ("flash2", "sdpa"):
        assert parts(micro=6, attention=kind, **flat).attention == pytest.approx(parts(micro=1, attention=kind, **flat).attention)


def test_lengths() -> None:
    lengths = Lengths(1, (0, 1, 3), 0.25)  # one sample of 2 tokens, three of 3
    assert (lengths.mean, lengths.mean_square) == (2.75, 7.75)

    def shape(packing: str, attention: str, lengths: Lengths | None, **training: Any) -> Shape:
        wish = preset(data={"name": "a/c", "packing": packing}, training={"sequence_length": 4, **training})
        return shape_of(wish, attention, 2, lengths)

    padded = shape("none", "sdpa", lengths)
    assert (padded.tokens, padded.useful_share, padded.span, padded.dense_mask) == (4, 0.6875, 4, True)
    own = shape("flatten", "flash2", lengths)
    assert (own.tokens, own.useful_share, own.dense_mask) == (2.75, 1.0, False)
    assert own.span == pytest.approx(7.75 / 2.75)
    assert shape("flatten", "sdpa", lengths) == own
    row = shape("flatten", "eager", lengths)
    assert shape("flatten", "sdpa", lengths, compile="layers") == row
    every = [(a, b) for a in (2, 3, 3, 3) for b in (2, 3, 3, 3)]  # E[T²]/E[T] over rows of two samples
    assert row.span == pytest.approx(sum((a + b) ** 2 for a, b in every) / sum(a + b for a, b in every))
    packed = Lengths(1, (0, 1, 3), per_sample=1.25)  # 5 documents in 4 rows
    for attention, span, dense in (("eager", 4, True), ("sdpa", 7.75 / 2.75, False), ("flash2", 7.75 / 2.75, False)):
        rows = shape("documents", attention, packed)
        assert (rows.tokens, rows.useful_share, rows.span, rows.dense_mask) == (4, 2.75 * 1.25 / 4, span, dense)
    assert shape("documents", "sdpa", None).useful_share == 1
    assert shape("none", "sdpa", None).useful_share is None
    assert shape("concatenate", "sdpa", None).useful_share == 1


def test_lengths_of_staged_data() -> None:
    facts: dict[str, Any] = {"model": "/m", "data": "/d", "train_samples": 4, "eval_samples": 0, "train_targets": 1, "data_sha": "abc"}
    assert lengths_of(None) is lengths_of(Staged(**facts)) is None
    staged = Staged(**facts, length_bin_tokens=16, length_counts=[1, 3], cut_share=0.1)
    assert lengths_of(staged) == Lengths(16, (1, 3), 0.1)
    rows = Staged(**facts, length_bin_tokens=16, length_counts=[5, 7])
    assert lengths_of(rows) == Lengths(16, (5, 7), per_sample=3)


MISSING = {
    "no-gpu": ({"gpu": None}, {}, "gpu"),
    "bandwidth": ({"gpu": {"kind": "x", "memory_gib": 32, "compute_capability": "7.0"}}, {}, "gpu.bandwidth_gb_s"),
    "peak": ({"gpu": {"kind": "x", "memory_gib": 32, "compute_capability": "7.0", "bandwidth_gb_s": 900}}, {}, "gpu.peak_tflops.bf16"),
    "cpu": ({}, {"gpus": 0}, "cpu_gflops_per_core"),
}


@pytest.mark.parametrize(("at", "wish", "missing"), MISSING.values(), ids=MISSING)
def test_missing_facts_are_named(at: dict[str, Any], wish: dict[str, Any], missing: str) -> None:
    node = hardware(**at)
    assert missing_fact(preset(**wish), node) == missing
    with pytest.raises(ValueError, match=f"hardware node has no {missing}"):
        predict_step(preset(**wish), TINY, node, Layout(1, 2, 2, 8, 64, 8), Batch(24, (12, 12), 4, 3), "sdpa")


def test_cpu() -> None:
    node = hardware(gpus=0, gpu=None, cpu_gflops_per_core=40)
    two, one = (
        predict_step(preset(gpus=0), TINY, node, Layout(1, 0, 1, 8, 64, threads), Batch(24, (24,), 4, 6), "sdpa") for threads in (2, 1)
    )
    assert 0 < two < one


def test_evaluation_is_a_forward_pass() -> None:
    wish = preset(evaluation={"every": "epoch", "micro_batch": 4})
    layout = Layout(1, 2, 2, 64, 480, 8)
    step = predict_step(wish, FACTS, A100, layout, Batch(48, (24, 24), 4, 6), "sdpa")
    assert step / 4 < predict_evaluation(wish, FACTS, A100, layout, "sdpa", 48) < step / 2.5
    assert predict_evaluation(wish, FACTS, A100, layout, "sdpa", 47) == predict_evaluation(wish, FACTS, A100, layout, "sdpa", 48)


def whole(at: Site | None = None, **changes: Any) -> Time:
    arguments: dict[str, Any] = {"num_samples": 20000, "eval_samples": 1000, "checkpoint_gib": 30.0, **changes}
    rule = arguments.pop("checkpoint", {"every": "epoch"})
    wish = preset(training={"epochs": 3}, evaluation={"every": "8%", "micro_batch": 8}, checkpoint=rule)
    batch = Batch(24, (12, 12), 4, 3)
    return predict_time(wish, FACTS, A100, at or site(), Layout(1, 2, 2, 64, 480, 8), batch, "sdpa", **arguments)


def test_a_whole_run_adds_up() -> None:
    time = whole(preempted_every_min=600)
    assert time.steps == 2500
    assert time.total_h is not None and time.evaluation_h is not None and time.checkpoint_h is not None and time.startup_h is not None
    assert time.total_h == pytest.approx(2500 * time.step_s / 3600 + time.evaluation_h + time.checkpoint_h + time.startup_h)
    assert time.gpu_hours == pytest.approx(2 * time.total_h)
    assert time.checkpoint_stop_s == pytest.approx(30 * 1.073741824)
    assert time.num_checkpoints == 3
    assert sum(time.step_parts.values()) == pytest.approx(time.step_s)
    assert set(time.step_parts) == {field.name for field in fields(StepParts)}
    assert time.mfu is not None and 0.3 < time.mfu < 0.6
    assert time.tokens_per_gpu_s == pytest.approx(12 * 1024 / time.step_s)
    json.dumps(vars(time), allow_nan=False)


def test_unknown_number_of_samples() -> None:
    time = whole(num_samples=None)
    assert time.step_s > 0 and time.startup_s > 0
    assert (time.steps, time.total_h, time.gpu_hours, time.continuations) == (None,) * 4
    json.dumps(vars(time), allow_nan=False)


def test_continuations() -> None:
    once = whole()
    assert once.continuations == 0
    assert once.total_h is not None
    work_s = 3600 * once.total_h - once.startup_s
    limit_min = math.ceil(once.total_h * 60 / 3)
    time = whole(time_limit_min=limit_min, signal_lead_s=120)
    room_s = 60 * limit_min - 120 - time.startup_s
    steps = math.floor(room_s / time.step_s)
    assert time.continuations == math.ceil(work_s / (steps * time.step_s)) - 1 >= 3
    assert time.total_h == pytest.approx(once.total_h + time.continuations * time.startup_s / 3600)
    assert whole(time_limit_min=2, signal_lead_s=60).continuations is None


@pytest.mark.parametrize(
    ("work_s", "limit_s", "lives"),
    [(1000, None, 1), (890, 1000, 1), (900, 1000, 2), (1780, 1000, 2), (1781, 1000, 3), (10, 119, None), (10, 121, 1)],
    ids=["no-limit", "just-fits", "just-not", "two", "three", "no-room", "room-for-all"],
)
def test_lives(work_s: float, limit_s: float | None, lives: int | None) -> None:
    """Start-up 50 s, notice 60 s, steps of 10 s: 890 s of steps in a life of 1000 s."""
    assert cadence.num_lives(work_s, limit_s, 50, 60, 10) == lives


@pytest.mark.parametrize("epochs", [1, 2.5, 3])
@pytest.mark.parametrize("every", ["never", "epoch", "7", "8%", "100%"])
def test_evaluations_are_as_many_as_the_training_does(every: str, epochs: float) -> None:
    order = pytest.importorskip("launcher.train.order").Order(seed=1, num_samples=100, epochs=epochs, effective_batch=8)
    steps = order.total_steps
    due = {step for step in range(1, steps + 1) if order.is_due(every, step)}
    assert cadence.num_due(every, steps, epochs) == len(due)
    assert cadence.num_evaluations(every, steps, epochs) == (0 if every == "never" else len(due | {steps}))


def test_timed_checkpoints() -> None:
    time = whole(checkpoint={"every": "never", "minutes": 5})
    assert time.total_h is not None and time.checkpoint_h is not None and time.num_checkpoints is not None
    assert time.num_checkpoints == pytest.approx((time.total_h - time.checkpoint_h) * 60 / 5, abs=2)
    assert whole(checkpoint={"every": "epoch", "minutes": 6000}).num_checkpoints == 3


@pytest.mark.parametrize(("save_s", "between_h"), [(1, 24), (30, 24), (30, 2), (300, 12), (600, 2)])
def test_best_interval_against_brute_force(save_s: float, between_h: float) -> None:
    between_s, restart_s = 3600 * between_h, 120.0
    tried = [10 * 1.002**k for k in range(6000) if 10 * 1.002**k < 4 * between_s]
    losses = [cadence.expected_loss_share(interval, save_s, between_s, restart_s) for interval in tried]
    least = min(losses)
    best_s = tried[losses.index(least)]
    daly, young = cadence.daly_interval_s(save_s, between_s), cadence.young_interval_s(save_s, between_s)
    assert daly == pytest.approx(best_s, rel=0.01)
    assert cadence.expected_loss_share(daly, save_s, between_s, restart_s) <= 1.001 * least
    assert abs(young - best_s) >= abs(daly - best_s)


def test_loss_is_what_preemptions_at_random_cost() -> None:
    """Against a sum over a run that is cut short, by first principles: without saves the work and restarts alone."""
    assert cadence.expected_loss_share(1000, 10, 1e12, 50) == pytest.approx(0.01, rel=1e-3)
    assert cadence.expected_loss_share(1000, 0, 1e6, 0) == pytest.approx(1000 / 2e6, rel=1e-3)


def test_interval_in_the_plan() -> None:
    time = whole(preempted_every_min=600)
    assert time.best_checkpoint_min == pytest.approx(cadence.daly_interval_s(time.checkpoint_stop_s, 36000) / 60)
    assert time.best_loss_share is not None and time.expected_loss_share is not None
    assert time.best_loss_share < time.expected_loss_share
    assert whole().best_checkpoint_min is None


def test_signal_lead() -> None:
    gib = 1e9 / 2**30
    assert cadence.signal_lead_s(100 * gib, 2.0, 10, 60) == 170
    assert cadence.signal_lead_s(0, 1.0, 0, 60) == 60


def test_slow_file_systems_cost_time() -> None:
    slow, fast = whole(site(checkpoint_write_gb_s=0.5)), whole(site(checkpoint_write_gb_s=4))
    assert slow.checkpoint_stop_s == pytest.approx(8 * fast.checkpoint_stop_s)
    assert slow.total_h is not None and fast.total_h is not None and slow.total_h > fast.total_h
