"""The memory model against what was measured (the committed values), against the sources' tables, and against common sense."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.memory_cases import CASES, MODELS, Case, case_of, facts_of, preset_of, stack_of, surroundings
from benchmarks.published import FitFact, fit_facts
from launcher.hardware.host import careless_loading_gib, predict_host
from launcher.hardware.memory import WORKSPACE_GIB, fullest_moment, largest_micro_batch, predict_memory
from launcher.hardware.split import split
from launcher.plan import Batch, Layout, Memory, rank_slices
from launcher.preset.model import ModelFacts, facts_of_config
from launcher.preset.reading import read_hardware, read_model_facts, read_preset, read_stack
from launcher.preset.schema import Preset
from tests.conftest import REPOSITORY

GIB = 2**30
MEASURED: list[dict[str, Any]] = json.loads((REPOSITORY / "benchmarks/results/memory-fake.json").read_text(encoding="utf-8"))["rows"]


def model(name: str) -> ModelFacts:
    return read_model_facts(name).value


def changed(preset: Preset, **changes: Any) -> Preset:
    """``training`` and ``data`` are merged, the rest is put in place of what is there."""
    value = preset.model_dump(mode="json")
    for name, change in changes.items():
        value[name] = {**value[name], **change} if name in ("training", "data") else change
    return Preset.model_validate(value)


def predict(preset: Preset, facts: ModelFacts, **node: Any) -> Memory:
    """As the planner would have it, all CPUs and RAM of the node being asked for."""
    hardware = read_hardware(preset.hardware).value.model_copy(update=node)
    ranks = preset.ranks_per_node or (1 if preset.parallelism == "device_map" else max(preset.gpus, 1))
    layout = Layout(preset.nodes, preset.gpus, ranks, hardware.cpus, hardware.memory_gib, 1)
    shares = tuple(part.stop - part.start for part in rank_slices(preset.training.effective_batch, layout.world_size))
    assert preset.training.micro_batch != "auto"
    micro_batch = min(preset.training.micro_batch, max(shares))
    batch = Batch(preset.training.effective_batch, shares, micro_batch, -(-max(shares) // micro_batch))
    attention = "sdpa" if preset.attention == "auto" else preset.attention
    stack = read_stack(preset.stack).value if isinstance(preset.stack, str) else None
    return predict_memory(preset, facts, hardware, layout, batch, attention, stack)


def shipped(name: str, **changes: Any) -> Memory:
    preset = changed(read_preset(name).value, **changes)
    assert preset.model.name is not None
    return predict(preset, model(preset.model.name.rpartition("/")[2].lower()))


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: str(row["name"]))
def test_predicted_as_measured(row: dict[str, Any]) -> None:
    """Tensors alone, and with what torch's allocator needs around them: within 5 %, never more than 3 % under.

    Of the allocator that holds with expandable segments. Without them, two of the 58 steps need more than 3 % more than predicted.
    """
    case = case_of(row["case"])
    hardware, layout, batch = surroundings(case)
    arguments = (preset_of(case), facts_of(case), hardware, layout, batch, case.attention, stack_of(case))
    assert 0.97 <= fullest_moment(*arguments).total / row["peak_bytes"] <= 1.05
    with_allocator = (predict_memory(*arguments).per_gpu_gib - WORKSPACE_GIB["9.0"]) * GIB
    assert 0.97 <= with_allocator / row["expandable_bytes"] <= 1.05
    assert 0.90 <= with_allocator / row["needed_bytes"] <= 1.05


def test_enough_was_measured() -> None:
    assert {row["name"] for row in MEASURED} == {case.name for case in CASES}
    assert len(MEASURED) >= 40
    assert {row["case"]["model"] for row in MEASURED} == set(MODELS)
    assert all(row["case"]["layers"] == 0 for row in MEASURED), "at full size"


FACTS = fit_facts()
"""What the two sources ran, and what they could not."""


@pytest.mark.parametrize("fact", FACTS, ids=[fact.name for fact in FACTS])
def test_what_fits_and_what_does_not(fact: FitFact) -> None:
    assert shipped(fact.preset, training=fact.training).fits is fact.fits


def test_memtunes_ram_cannot_hold_15b_carelessly_loaded() -> None:
    facts = model("starcoder2-15b")
    assert careless_loading_gib(facts) > 32
    preset = read_preset("starcoder2-15b").value
    host = predict_host(preset, facts, Layout(1, 6, 1, 32, 32, 8))
    assert host.processes + host.loading < 32, "weights go straight to their GPU"
    assert host.peak == pytest.approx(host.processes + host.saving), "a checkpoint's copy of all weights is the most"


def test_ram_grows_with_ranks_that_resume_and_with_a_ram_disk() -> None:
    preset, facts = read_preset("santacoder-a100-40gb").value, model("gpt_bigcode-santacoder")
    one, eight = (predict_host(preset, facts, Layout(1, ranks, ranks, 8, 100, 1)) for ranks in (1, 8))
    assert eight.peak > 4 * one.peak
    assert predict_host(preset, facts, Layout(1, 1, 1, 8, 100, 1), ram_disk_gib=7).peak == pytest.approx(one.peak + 7)
    sharded = predict_host(changed(preset, parallelism="zero3"), facts, Layout(1, 8, 8, 8, 100, 1))
    assert sharded.peak < eight.peak


def of_case(**changes: Any) -> tuple[Preset, ModelFacts]:
    case = Case("starcoder2-3b", micro_batch=2)
    return changed(preset_of(replace(case)), **changes), facts_of(case)


SMALLER_FIRST = {
    "micro batch": ({}, {"training": {"micro_batch": 4}}),
    "sequence length": ({}, {"training": {"sequence_length": 2048}}),
    "gradients that earlier micro steps left": ({"training": {"effective_batch": 2}}, {"training": {"sequence_length": 1024}}),
    "checkpointing": ({"training": {"activation_checkpointing": "full"}}, {}),
    "eager attention": ({}, {"attention": "eager"}),
    "flash and sdpa without a mask": ({"attention": "flash2"}, {"data": {"packing": "none"}}),
    "adafactor": ({"training": {"optimizer": "adafactor"}}, {"training": {"optimizer": "adamw_8bit"}}),
    "8-bit adamw": ({"training": {"optimizer": "adamw_8bit"}}, {}),
    "LoRA": ({"adapter": {"kind": "lora"}}, {}),
    "LoRA's rank": ({"adapter": {"kind": "lora", "rank": 8}}, {"adapter": {"kind": "lora", "rank": 256}}),
    "QLoRA": ({"adapter": {"kind": "qlora"}}, {"adapter": {"kind": "lora"}}),
    "DoRA": ({"adapter": {"kind": "lora"}}, {"adapter": {"kind": "dora"}}),
    "pure bf16": ({"training": {"dtype": "bf16_pure"}}, {}),
    "chunked cross-entropy": ({"training": {"cross_entropy": "chunked", "micro_batch": 8}}, {"training": {"micro_batch": 8}}),
    "DDP's buckets": ({}, {"parallelism": "ddp", "gpus": 2}),
    "ZeRO 1 against DDP": ({"parallelism": "zero1", "gpus": 8}, {"parallelism": "ddp", "gpus": 8}),
    "ZeRO 2 against 1": ({"parallelism": "zero2", "gpus": 8}, {"parallelism": "zero1", "gpus": 8}),
    "ZeRO 3 against 2": ({"parallelism": "zero3", "gpus": 8}, {"parallelism": "zero2", "gpus": 8}),
    "FSDP against DDP": ({"parallelism": "fsdp", "gpus": 8}, {"parallelism": "ddp", "gpus": 8}),
    "more shards": ({"parallelism": "fsdp", "gpus": 8}, {"parallelism": "fsdp", "gpus": 2}),
    "optimizer offloaded": ({"parallelism": "zero3", "gpus": 8, "offload": "optimizer"}, {"parallelism": "zero3", "gpus": 8}),
    "all offloaded": (
        {"parallelism": "zero3", "gpus": 8, "offload": "all"},
        {"parallelism": "zero3", "gpus": 8, "offload": "optimizer"},
    ),
    "a model split over GPUs": ({"parallelism": "device_map", "gpus": 4}, {"parallelism": "device_map", "gpus": 2}),
    "evaluation of many samples": ({}, {"evaluation": {"every": "epoch", "micro_batch": 128}}),
}


@pytest.mark.parametrize(("less", "more"), SMALLER_FIRST.values(), ids=SMALLER_FIRST)
def test_less_is_less(less: dict[str, Any], more: dict[str, Any]) -> None:
    memories = []
    for changes in (less, more):
        steps = {"training": {"effective_batch": 64, **changes.get("training", {})}}
        preset, facts = of_case(**{**changes, **steps})
        memories.append(predict(preset, facts))
    assert memories[0].per_gpu_gib < memories[1].per_gpu_gib


@pytest.mark.parametrize("name", [path.stem for path in sorted((REPOSITORY / "presets").glob("*.yaml"))])
def test_parts_are_the_whole(name: str) -> None:
    preset = read_preset(name).value
    facts = facts_of_config(preset.model.config) if preset.model.config else None
    if facts is None:
        assert preset.model.name is not None
        facts = model(preset.model.name.rpartition("/")[2].lower())
    memory = predict(preset, facts)
    assert set(memory.parts) == {"weights", "gradients", "optimizer", "activations", "logits", "other"}
    assert min(memory.parts.values()) >= 0
    assert sum(memory.parts.values()) == pytest.approx(memory.per_gpu_gib, abs=0.005)
    assert memory.fits is (memory.per_gpu_gib <= memory.available_gib)
    assert memory.fits, "what ships fits"


def test_packed_rows_are_as_long_as_their_samples_together() -> None:
    """flatten: one row; eager's mask over it keeps documents apart and grows with the square, sdpa goes over them one by one."""

    def grows(packing: str, attention: str) -> float:
        sizes = [{"micro_batch": micro, "effective_batch": 64} for micro in (4, 8)]
        of_size = [predict(*of_case(data={"packing": packing}, training=size, attention=attention)) for size in sizes]
        return of_size[1].parts["activations"] - of_size[0].parts["activations"]

    assert grows("flatten", "eager") > 1.5 * grows("none", "eager")
    assert grows("flatten", "sdpa") <= grows("none", "sdpa")


def test_largest_micro_batch() -> None:
    preset, facts = read_preset("santacoder-a100-40gb-1024-default").value, model("gpt_bigcode-santacoder")
    hardware, layout = read_hardware("a100-40gb").value, Layout(1, 8, 8, 64, 400, 1)
    found = {kind: largest_micro_batch(preset, facts, hardware, layout, (32,) * 8, kind) for kind in ("eager", "xformers")}
    assert found["eager"] == 2
    assert found["xformers"] is not None and found["xformers"] >= 4
    fifteen = read_preset("starcoder2-15b").value
    alone = changed(fifteen, parallelism="ddp", gpus=8, training={"optimizer": "adamw"})
    assert largest_micro_batch(alone, model("starcoder2-15b"), hardware, layout, (4,) * 8, "sdpa") is None


def test_largest_micro_batch_is_the_border() -> None:
    preset, facts = of_case(training={"effective_batch": 1000})
    hardware, layout = read_hardware("h200").value, Layout(1, 1, 1, 8, 100, 1)
    found = largest_micro_batch(preset, facts, hardware, layout, (1000,), "sdpa")
    assert found is not None
    fits = [
        predict_memory(preset, facts, hardware, layout, Batch(1000, (1000,), micro, -(-1000 // micro)), "sdpa").fits
        for micro in (found, found + 1)
    ]
    assert fits == [True, False]


def test_on_cpu_the_same_parts_lie_in_ram() -> None:
    preset = read_preset("tiny").value
    facts = facts_of_config(preset.model.config or {})
    assert facts is not None
    one, four = (predict(changed(preset, ranks_per_node=ranks), facts, memory_gib=16) for ranks in (1, 4))
    assert four.available_gib < one.available_gib / 3
    assert four.host_per_node_gib > one.host_per_node_gib
    assert not predict(changed(preset, training={"micro_batch": 4096, "effective_batch": 4096}), facts, memory_gib=8).fits


@pytest.mark.parametrize(
    ("name", "gpus", "layers", "head"),
    [
        ("starcoder2-3b", 2, [14, 16], 0),
        ("starcoder2-7b", 4, [7, 9, 9, 7], 0),
        ("starcoder2-15b", 6, [6, 8, 8, 8, 8, 2], 5),
        ("starcoder2-15b", 8, [4, 6, 6, 6, 6, 6, 6, 0], 7),
        ("codellama-7b-hf", 8, [3, 5, 5, 5, 5, 5, 4, 0], 6),
        ("gpt_bigcode-santacoder", 8, [1, 4, 4, 4, 4, 4, 3, 0], 0),
    ],
    ids=str,
)
def test_split_as_accelerate_splits(name: str, gpus: int, layers: list[int], head: int) -> None:
    """As accelerate 1.15 dealt them out; tests/train compares again."""
    facts = model(name)
    parts = split(facts, gpus, 35 * GIB)
    assert parts is not None
    assert [part.layers for part in parts] == layers
    assert [part.head for part in parts].index(True) == head
    assert [part.embedding for part in parts].index(True) == 0
    assert split(facts, gpus, 1 * GIB if facts.parameters > 3e9 else 0.4 * GIB) is None
