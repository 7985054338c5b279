"""The planner: numbers, identity, gates. Stacks, hardware and sites are written here, so that shipped ones may change."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from launcher.errors import Finding
from launcher.hardware.gates import ALLOWED_BY, GATES
from launcher.plan import Container, Plan, Staged, from_json, to_json
from launcher.planner import identity_keys_changed, make_plan, summary
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack

FACTS = ModelFacts(
    architecture="llama", parameters=1000, layers=2, hidden=8, heads=2, kv_heads=2, intermediate=16, vocab=32, context=4096, tied=False,
    linear_layers=["q_proj", "v_proj"],
)  # fmt: skip
STAGED = Staged(model="/m", data="/d", train_samples=100, eval_samples=0, train_targets=1, data_sha="abc")
GPU = {"kind": "a100", "memory_gib": 80, "compute_capability": "8.0"}


def preset(**changes: Any) -> Preset:
    training = {"sequence_length": 1024, "effective_batch": 24, "micro_batch": 8, "learning_rate": 3e-5, **changes.pop("training", {})}
    value = {
        "name": "x", "model": {"name": "a/b"}, "data": {"name": "a/c"}, "hardware": "node", "gpus": 2, "stack": "s", "training": training,
    }  # fmt: skip
    return Preset.model_validate({**value, **changes})


def hardware(**changes: Any) -> Hardware:
    value = {"name": "node", "source": "a test", "cpus": 64, "memory_gib": 480, "gpus": 8, "gpu": GPU, "driver": "555.42.02"}
    return Hardware.model_validate({**value, **changes})


def site(**changes: Any) -> Site:
    return Site.model_validate({"name": "cluster", "source": "a test", "scheduler": "slurm", **changes})


def stack(**changes: Any) -> Stack:
    value = {
        "name": "s", "base": {"kind": "debootstrap", "suite": "bookworm"}, "python": "3.11", "cuda": "12.8",
        "packages": {"torch": "2.10.0", "transformers": "5.23.0"}, "attention": ["eager", "sdpa", "xformers"],
        "parallelism": ["single", "ddp", "device_map", "zero3"],
    }  # fmt: skip
    return Stack.model_validate({**value, **changes})


def plan_of(wish: Preset | None = None, **changes: Any) -> tuple[Plan, list[Finding]]:
    arguments: dict[str, Any] = {"hardware": hardware(), "site": site(), "stack": stack(), "model_facts": FACTS, **changes}
    container = arguments.pop("container", Container("apptainer"))
    return make_plan(
        wish or preset(), arguments.pop("hardware"), arguments.pop("site"), arguments.pop("stack"), container=container, **arguments
    )


def worst(findings: list[Finding]) -> list[str]:
    return [f"{finding.level}: {finding.code}: {finding}" for finding in findings if finding.level != "advice"]


@pytest.mark.parametrize(
    ("effective", "micro", "gpus", "shares", "held", "steps"),
    [
        (25, 5, 6, (5, 4, 4, 4, 4, 4), 5, 1),
        (25, 2, 4, (7, 6, 6, 6), 2, 4),
        (24, 8, 2, (12, 12), 8, 2),
        (25, 5, 1, (25,), 5, 5),
        (256, 2, 8, (32,) * 8, 2, 16),
        (4, 8, 2, (2, 2), 2, 1),
        (2, 1, 3, (1, 1, 0), 1, 1),
    ],
    ids=["25-on-6", "25-on-4", "24-on-2", "25-on-1", "256-on-8", "capped", "fewer-than-ranks"],
)
def test_batch(effective: int, micro: int, gpus: int, shares: tuple[int, ...], held: int, steps: int) -> None:
    plan, findings = plan_of(preset(gpus=gpus, training={"effective_batch": effective, "micro_batch": micro}))
    assert (plan.batch.samples_per_rank, plan.batch.micro_batch, plan.batch.micro_steps) == (shares, held, steps)
    assert sum(plan.batch.samples_per_rank) == effective
    assert ("idle-ranks" in [finding.code for finding in findings]) == (0 in shares)


@pytest.mark.parametrize(
    ("wish", "at", "layout"),
    [
        ({}, {}, (2, 2, 16, 120, 8)),
        ({"gpus": 0}, {}, (0, 1, 64, 480, 8)),
        ({"gpus": 6, "parallelism": "device_map"}, {}, (6, 1, 48, 360, 8)),
        ({"cpus_per_node": 5, "memory_per_node_gib": 7}, {}, (2, 2, 5, 7, 2)),
        ({"threads_per_rank": 3}, {}, (2, 2, 16, 120, 3)),
        ({"gpus": 0, "ranks_per_node": 2}, {}, (0, 2, 64, 480, 8)),
        ({}, {"cpus_per_gpu": 4, "memory_per_gpu_gib": 32}, (2, 2, 8, 64, 4)),
        ({}, {"whole_nodes": True}, (2, 2, 64, 480, 8)),
    ],
    ids=["share", "cpu", "device-map", "typed", "threads", "two-on-cpu", "site-per-gpu", "whole-nodes"],
)
def test_layout(wish: dict[str, Any], at: dict[str, Any], layout: tuple[int, ...]) -> None:
    found = plan_of(preset(**wish), site=site(**at))[0].layout
    assert (found.gpus_per_node, found.ranks_per_node, found.cpus_per_node, found.memory_per_node_gib, found.threads_per_rank) == layout


def test_two_nodes() -> None:
    plan, _ = plan_of(preset(nodes=2, training={"effective_batch": 25}))
    assert (plan.world_size, plan.batch.samples_per_rank) == (4, (7, 6, 6, 6))


@pytest.mark.parametrize(
    ("at", "options", "minutes", "lead"),
    [
        ({}, {}, 1440, 120),
        ({}, {"time": "90m"}, 90, 120),
        ({}, {"time": "3m"}, 3, 90),
        ({"signal_lead_s": 30}, {"time": "3m"}, 3, 30),
        ({"partitions": {"p": {"max_time": "48h"}}}, {"partition": "p"}, 2880, 120),
        ({"scheduler": "none"}, {}, None, 120),
    ],
    ids=["default", "typed", "half-at-most", "site-lead", "partition", "no-scheduler"],
)
def test_time_limit_and_signal_lead(at: dict[str, Any], options: dict[str, str], minutes: int | None, lead: int) -> None:
    plan, _ = plan_of(site=site(**at), slurm=options)
    assert (plan.time_limit_min, plan.signal_lead_s) == (minutes, lead)
    assert "time" not in plan.slurm


def test_options_of_the_preset_where_none_were_resolved() -> None:
    wish = preset(slurm={"account": "a", "time": "2h"})
    assert (plan_of(wish)[0].slurm, plan_of(wish)[0].time_limit_min) == ({"account": "a"}, 120)
    assert plan_of(wish, slurm={"account": "b"})[0].slurm == {"account": "b"}
    local, findings = plan_of(wish, site=site(scheduler="none"))
    assert local.slurm == {} and "slurm-unused" in [finding.code for finding in findings]


def test_attention_auto() -> None:
    assert plan_of()[0].attention == "sdpa"
    assert plan_of(stack=stack(attention=["eager"]))[0].attention == "eager"
    assert plan_of(preset(attention="xformers"))[0].attention == "xformers"


def test_plan_round_trips_and_keeps_the_preset() -> None:
    wish = preset(adapter={"kind": "lora", "targets": ["q_proj"]})
    plan, _ = plan_of(wish, staged=STAGED, allowed=["time", "memory"])
    assert from_json(to_json(plan)) == plan
    assert Preset.model_validate(plan.preset) == wish
    assert plan.allowed == ("memory", "time")


def test_mirrors_are_not_in_the_plan() -> None:
    """A pip index may hold a password, and people show their plans."""
    at = site(mirrors={"pip_index": "https://ada:secret@mirror.invalid/simple"})
    plan, _ = plan_of(site=at)
    assert "secret" not in str(to_json(plan))
    assert Site.model_validate(plan.site) == site()


def test_summary_has_what_interfaces_promise() -> None:
    found = summary(plan_of(preset(gpus=4, training={"effective_batch": 25, "micro_batch": 2}))[0])
    assert {key: value for key, value in found.items() if key != "disk"} == {
        "name": "x", "model": "a/b", "site": "cluster", "stack": "s", "nodes": 1, "gpus_per_node": 4, "world_size": 4,
        "effective_batch": 25, "micro_batch": 2, "gradient_accumulation": 4, "samples_per_rank": [7, 6, 6, 6],
        "sequence_length": 1024, "attention": "sdpa",
        "adapter": "none", "parallelism": "ddp", "dtype": "bf16", "time_limit_min": 1440, "signal_lead_s": 120,
        "memory": None, "time": None,
    }  # fmt: skip
    assert set(found["disk"]) == {"checkpoint_gib", "total_gib", "files"}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "y"}, {"description": "other"}, {"gpus": 4}, {"nodes": 2}, {"ranks_per_node": 1}, {"cpus_per_node": 3},
        {"memory_per_node_gib": 9}, {"threads_per_rank": 1}, {"training": {"micro_batch": 1}},
        {"evaluation": {"micro_batch": 4}}, {"slurm": {"time": "2h"}},
        {"limits": {"max_lives": 2}}, {"checkpoint": {"every": "10"}}, {"hardware": "other"}, {"site": "other"},
    ],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_identity_stays(changes: dict[str, Any]) -> None:
    old, new = plan_of()[0], plan_of(preset(**changes))[0]
    assert old.identity == new.identity
    assert identity_keys_changed(old, new) == []


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"training": {"learning_rate": 1e-5}}, ["training.learning_rate"]),
        ({"training": {"effective_batch": 25, "seed": 1}}, ["training.effective_batch", "training.seed"]),
        ({"data": {"name": "a/d"}}, ["data.name"]),
        ({"model": {"name": "a/b", "revision": "v2"}}, ["model.revision"]),
        ({"parallelism": "device_map"}, ["parallelism"]),
        ({"adapter": {"kind": "lora"}}, ["adapter", "adapter.alpha", "adapter.dropout", "adapter.kind", "adapter.rank"]),
        ({"stack": "other"}, ["stack"]),
    ],
    ids=["lr", "batch-seed", "data", "revision", "parallelism", "adapter", "stack"],
)
def test_identity_changes(changes: dict[str, Any], keys: list[str]) -> None:
    old, new = plan_of()[0], plan_of(preset(**changes))[0]
    assert old.identity != new.identity
    assert identity_keys_changed(old, new) == keys


def test_identity_follows_the_pins_and_not_the_words_of_a_stack() -> None:
    old = plan_of()[0]
    worded, pinned = (plan_of(stack=stack(**change))[0] for change in ({"notes": ["a"], "description": "b"}, {"python": "3.12"}))
    assert (worded.identity == old.identity, identity_keys_changed(old, worded)) == (True, [])
    assert (pinned.identity == old.identity, identity_keys_changed(old, pinned)) == (False, ["stack"])


def test_identity_follows_the_content_of_local_data_and_not_its_path() -> None:
    here, there = preset(data={"path": "/a/data.jsonl"}), preset(data={"path": "/b/data.jsonl"})
    other = Staged(**{**vars(STAGED), "data_sha": "def"})
    old, moved, changed = plan_of(here, staged=STAGED)[0], plan_of(there, staged=STAGED)[0], plan_of(here, staged=other)[0]
    assert (moved.identity == old.identity, identity_keys_changed(old, moved)) == (True, [])
    assert (changed.identity == old.identity, identity_keys_changed(old, changed)) == (False, ["data"])
    assert plan_of(staged=STAGED)[0].identity == plan_of(staged=other)[0].identity, "data on the hub is known by its revision"


def test_identity_follows_the_content_of_a_local_model_and_not_its_path() -> None:
    here, there = preset(model={"path": "/a/model"}), preset(model={"path": "/b/model"})
    first, second = (Staged(**{**vars(STAGED), "model_sha": sha}) for sha in ("123", "456"))
    old, moved, changed = plan_of(here, staged=first)[0], plan_of(there, staged=first)[0], plan_of(here, staged=second)[0]
    assert (moved.identity == old.identity, identity_keys_changed(old, moved)) == (True, [])
    assert (changed.identity == old.identity, identity_keys_changed(old, changed)) == (False, ["model"])
    assert identity_keys_changed(plan_of(here)[0], plan_of(there)[0]) == ["model.path"], "what is not staged is known by its path"


def test_identity_of_an_own_image() -> None:
    wish = preset(stack={"image": "/x.sif"})
    plan, findings = plan_of(wish, stack=None, container=Container("apptainer", image="/x.sif", identity="1"))
    moved = plan_of(preset(stack={"image": "/y.sif"}), stack=None, container=Container("apptainer", image="/y.sif", identity="1"))[0]
    other = plan_of(wish, stack=None, container=Container("apptainer", image="/x.sif", identity="2"))[0]
    assert plan.identity == moved.identity != other.identity
    assert (identity_keys_changed(plan, moved), identity_keys_changed(plan, other)) == ([], ["stack"])
    unknown = [plan_of(preset(stack={"image": image}), stack=None)[0] for image in ("/x.sif", "/y.sif")]
    assert identity_keys_changed(*unknown) == ["stack.image"]
    assert (plan.stack, "stack-unknown" in [finding.code for finding in findings]) == ({}, True)


def test_identity_is_64_hex_digits_and_does_not_move() -> None:
    """A change here makes every run a new one: wanted, or a mistake."""
    assert plan_of()[0].identity == "d3124cda6d0c9f805c7c1ff7f1a3faa33e03181f8a6c5681ebae5dcab92427e4"


def test_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan_of(staged=STAGED)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the planner looked at the world")

    with monkeypatch.context() as patch:
        for owner, names in ((time, ("time", "monotonic", "perf_counter")), (os, ("getenv", "getcwd", "stat", "listdir"))):
            for name in names:
                patch.setattr(owner, name, refuse)
        patch.setattr(os, "environ", None)
        patch.setattr("builtins.open", refuse)
        patch.setattr("subprocess.Popen", refuse)
        after = plan_of(staged=STAGED)
    assert after == before


V100 = {"gpu": {**GPU, "kind": "v100", "compute_capability": "7.0"}}
PARTITION = {"partitions": {"gpu": {"max_time": "24h", "gpus_per_node": 4, "max_nodes": 2}}}


@pytest.mark.parametrize(
    ("wish", "changes", "expected"),
    [
        ({"gpus": 9}, {}, "gpus-above-node: gpus: 9 GPUs, but a node of node has 8 (gpus: 8 and more nodes)"),
        ({}, {"hardware": hardware(gpus=0, gpu=None)}, "gpus-above-node: gpus: 2 GPUs, but a node of node has none (gpus: 0)"),
        ({"cpus_per_node": 65}, {}, "cpus-above-node: cpus_per_node: 65 CPUs, but a node of node has 64 (cpus_per_node: 64)"),
        (
            {"memory_per_node_gib": 500},
            {},
            "memory-above-node: memory_per_node_gib: 500 GiB of RAM, but a node of node has 480 (memory_per_node_gib: 480)",
        ),
        (
            {"ranks_per_node": 3},
            {},
            "ranks-above-gpus: ranks_per_node: 3 ranks on 2 GPUs of a node: each rank needs its own (ranks_per_node: 2)",
        ),
        (
            {"nodes": 2},
            {"site": site(scheduler="none")},
            "nodes-without-scheduler: nodes: 2 nodes, but site cluster is this machine alone (nodes: 1, or --site)",
        ),
        (
            {},
            {"site": site(account="required")},
            "account-missing: slurm.account: site cluster wants an account (--account, or slurm.account)",
        ),
        (
            {},
            {"site": site(**PARTITION), "slurm": {"partition": "gpus"}},
            "unknown-partition: slurm.partition: site cluster knows no partition gpus (did you mean gpu?)",
        ),
        (
            {"gpus": 5},
            {"site": site(**PARTITION), "slurm": {"partition": "gpu"}},
            "gpus-above-partition: gpus: 5 GPUs a node, but partition gpu has 4 (gpus: 4)",
        ),
        (
            {"nodes": 3},
            {"site": site(**PARTITION), "slurm": {"partition": "gpu"}},
            "nodes-above-partition: nodes: 3 nodes, but partition gpu gives a job 2 (nodes: 2)",
        ),
        (
            {},
            {"site": site(**PARTITION), "slurm": {"partition": "gpu", "time": "48h"}},
            "time-above-partition: slurm.time: 48h, but partition gpu allows 24h (time: 24h; the run continues in a next life)",
        ),
        (
            {"training": {"dtype": "bf16"}},
            {"hardware": hardware(**V100)},
            "dtype-not-on-gpu: training.dtype: bf16 needs compute capability 8.0, v100 has 7.0 (dtype: fp32 or fp16)",
        ),
        ({"gpus": 0, "training": {"dtype": "fp16"}}, {}, "dtype-not-on-gpu: training.dtype: fp16 needs a GPU (dtype: fp32 or bf16)"),
        (
            {"gpus": 0, "attention": "xformers"},
            {},
            "attention-not-on-gpu: attention: xformers has no backward pass on CPU (attention: sdpa)",
        ),
        (
            {"training": {"dtype": "fp16"}, "attention": "flash2"},
            {"hardware": hardware(**V100)},
            "attention-not-on-gpu: attention: flash2 needs compute capability 8.0, v100 has 7.0 (attention: xformers or sdpa)",
        ),
        (
            {"attention": "flash2", "training": {"dtype": "fp32"}},
            {},
            "attention-needs-half: attention: flash2 takes bf16 or fp16 only (dtype: bf16, or attention: sdpa)",
        ),
        ({"attention": "flex"}, {}, "attention-not-in-stack: attention: stack s has no flex (it has eager, sdpa, xformers)"),
        ({"parallelism": "fsdp"}, {}, "parallelism-not-in-stack: parallelism: stack s has no fsdp (it has single, ddp, device_map, zero3)"),
        ({}, {"stack": stack(cuda=None)}, "stack-without-cuda: stack: 2 GPUs, but stack s is for CPU (a stack with CUDA, or gpus: 0)"),
        (
            {"training": {"dtype": "fp32"}},
            {"hardware": hardware(**V100), "stack": stack(packages={"torch": "2.11.0", "transformers": "5.0"})},
            "gpu-older-than-stack: stack: torch of stack s needs compute capability 7.5, v100 has 7.0 (an older stack: torch2.3-cu121)",
        ),
        (
            {},
            {"stack": stack(cuda="13.0")},
            "driver-too-old: stack: stack s (CUDA 13.0) needs driver 580, node has 555.42.02 "
            "(a stack for an older CUDA, or --allow driver)",
        ),
        (
            {},
            {"stack": stack(minimum_driver="560")},
            "driver-too-old: stack: stack s (CUDA 12.8) needs driver 560, node has 555.42.02 "
            "(a stack for an older CUDA, or --allow driver)",
        ),
        (
            {"training": {"sequence_length": 4097}},
            {},
            "sequence-too-long: training.sequence_length: 4097 tokens, but the model's context is 4096 (sequence_length: 4096)",
        ),
        (
            {"adapter": {"kind": "lora", "targets": ["q_proj", "qproj", "zzz"]}},
            {},
            "lora-target: adapter.targets: the model has no linear layer qproj (did you mean q_proj?)\n"
            "lora-target: adapter.targets: the model has no linear layer zzz (it has q_proj, v_proj)",
        ),
        (
            {},
            {"hardware": hardware(driver=None, cuda="12.5"), "stack": stack(cuda="13.0")},
            "driver-too-old: stack: stack s (CUDA 13.0) needs driver 580, node's announces CUDA 12.5 "
            "(a stack for an older CUDA, or --allow driver)",
        ),
        (
            {},
            {"site": site(build={"on": "slurm"})},
            "not-built-yet: site cluster: build.on: slurm is not built yet: ftlaunch build works where it is started "
            "(build.on: here in your site's file, and first run ftlaunch build on a compute node: submit uses what it finds)",
        ),
        (
            {},
            {"site": site(stage={"on": "elsewhere"})},
            "not-built-yet: site cluster: stage.on: elsewhere is not built yet: ftlaunch stage works where it is started "
            "(stage.on: here in your site's file, and first run ftlaunch stage on a compute node: submit uses what it finds)",
        ),
        (
            {"data": {"name": "a/c", "packing": "documents"}},
            {},
            "not-built-yet: data.packing: packing with borders kept is not built yet (packing: flatten)",
        ),
    ],
)
def test_refused(wish: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    findings = plan_of(preset(**wish), **changes)[1]
    assert "\n".join(f"{finding.code}: {finding}" for finding in findings if finding.level == "error") == expected


@pytest.mark.parametrize(
    ("wish", "changes", "expected"),
    [
        ({}, {}, []),
        (
            {},
            {"hardware": hardware(driver=None)},
            [
                "warning: driver-unknown: hardware: the driver of node is not known; stack s needs 525.60.13 or newer "
                "(nvidia-smi on a node says it; write driver: into your hardware file)"
            ],
        ),
        ({}, {"hardware": hardware(driver=None, cuda="12.5")}, []),
        (
            {},
            {"site": site(cache="/scratch/cache", submit_limit=5)},
            [
                "warning: no-effect-yet: site cluster: cache has no effect yet (leave cache out)",
                "warning: no-effect-yet: site cluster: submit_limit has no effect yet (leave submit_limit out)",
            ],
        ),
        (
            {"parallelism": "device_map"},
            {},
            [
                "warning: not-executed-here: parallelism: no model was split over GPUs by ftlaunch yet, nor any run made on a GPU: "
                "only the plan of the split was tested (watch the first steps)"
            ],
        ),
        (
            {"ranks_per_node": 1},
            {},
            ["warning: idle-gpus: ranks_per_node: 1 of 2 GPUs of a node get no rank (leave ranks_per_node out)"],
        ),
        (
            {"training": {"dtype": "fp16", "tf32": True}},
            {"hardware": hardware(**V100)},
            ["warning: tf32-unused: training.tf32: v100 has no TF32 (tf32: false)"],
        ),
        ({"gpus": 0, "training": {"tf32": True}}, {}, ["warning: tf32-unused: training.tf32: there is no TF32 on CPU (tf32: false)"]),
        (
            {"attention": "xformers"},
            {},
            [
                "warning: not-executed-yet: attention: xformers is planned and rendered, but the training does not run it yet: "
                "submit refuses (runs now: eager, sdpa)"
            ],
        ),
        (
            {"parallelism": "zero3"},
            {},
            [
                "warning: not-executed-yet: parallelism: zero3 is planned and rendered, but the training does not run it yet: "
                "submit refuses (runs now: single, ddp, device_map)"
            ],
        ),
    ],
    ids=[
        "nothing",
        "driver-unknown",
        "driver-by-cuda",
        "site-no-effect",
        "device-map",
        "idle-gpus",
        "tf32-v100",
        "tf32-cpu",
        "xformers",
        "zero3",
    ],
)
def test_warned(wish: dict[str, Any], changes: dict[str, Any], expected: list[str]) -> None:
    assert worst(plan_of(preset(**wish), **changes)[1]) == expected


def test_flash_is_planned_though_the_image_is_without_it() -> None:
    findings = plan_of(preset(attention="flash2"))[1]
    assert [(finding.level, finding.code, finding.key) for finding in findings if finding.level != "advice"] == [
        ("warning", "not-executed-yet", "attention"),
        ("warning", "not-executed-yet", "stack"),
    ]


def test_only_what_uses_gpus_is_called_never_run() -> None:
    codes = {gpus: [finding.code for finding in plan_of(preset(gpus=gpus))[1]] for gpus in (0, 1)}
    assert ["not-executed-here" in found for found in codes.values()] == [False, True]


def test_allowed_gates_become_warnings_and_others_do_not() -> None:
    changes: dict[str, Any] = {"stack": stack(cuda="13.0"), "site": site(**PARTITION), "slurm": {"partition": "gpu", "time": "48h"}}
    levels = {finding.code: finding.level for finding in plan_of(**changes, allowed=["driver"])[1]}
    assert (levels["driver-too-old"], levels["time-above-partition"]) == ("warning", "error")
    assert {"driver-too-old", "time-above-partition"} <= GATES == set(ALLOWED_BY)
    assert plan_of(**changes, allowed=["driver"])[0].allowed == ("driver",)


def test_memory_and_time_are_not_guessed() -> None:
    plan, findings = plan_of(model_facts=None)
    assert (plan.memory, plan.time, plan.disk) == (None, None, None)
    assert [(finding.level, finding.code) for finding in findings] == [
        ("advice", "not-executed-here"),
        ("advice", "memory-not-predicted"),
        ("advice", "time-not-predicted"),
        ("advice", "model-facts-unknown"),
    ]


@pytest.mark.parametrize(
    ("wish", "checkpoint_gib"),
    [
        ({"training": {"optimizer": "adamw"}}, 12),
        ({"training": {"optimizer": "adamw_8bit"}}, 6),
        ({"training": {"optimizer": "adamw", "dtype": "bf16_pure"}}, 10),
        ({"training": {"optimizer": "adafactor"}, "parallelism": "zero3"}, 8),
    ],
    ids=["adamw", "adamw-8bit", "bf16-pure", "adafactor-zero"],
)
def test_disk_of_a_checkpoint(wish: dict[str, Any], checkpoint_gib: int) -> None:
    disk = plan_of(preset(**wish), model_facts=FACTS.model_copy(update={"parameters": 2**30}))[0].disk
    assert disk is not None and disk.checkpoint_gib == checkpoint_gib


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        ({"training": {"epochs": 3}}, 3),
        ({"training": {"epochs": 3}, "checkpoint": {"keep_epochs": 2}}, 2),
        ({"training": {"epochs": 3}, "checkpoint": {"minutes": 30, "keep": 4}}, 7),
        ({"training": {"epochs": 3}, "checkpoint": {"every": "100", "keep": 10}}, 10),
        ({"training": {"epochs": 3}, "checkpoint": {"every": "never"}}, 2),
    ],
    ids=["epochs", "some-epochs", "timed", "steps", "never"],
)
def test_disk_of_a_run(wish: dict[str, Any], kept: int) -> None:
    disk = plan_of(preset(**wish), model_facts=FACTS.model_copy(update={"parameters": 2**30}))[0].disk
    assert disk is not None and disk.total_gib == 12 * (kept + 1) + 4


def test_disk_of_adafactor_and_of_lora() -> None:
    """2 layers of width 8, 16 inside, 2 heads, vocabulary 32: 40 rows and columns for the embedding and as many for the head."""
    facts = FACTS.model_copy(update={"parameters": 2**30})
    layer = 4 * (8 + 8) + 3 * (16 + 8)
    plan, _ = plan_of(preset(training={"optimizer": "adafactor"}), model_facts=facts)
    assert plan.disk is not None and plan.disk.checkpoint_gib == round(4 + 4 * (2 * layer + 2 * 40 + 5 * 8) / 2**30, 3)
    from launcher.hardware.disk import num_trained

    assert num_trained(preset(adapter={"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}), facts) == 2 * 4 * 2 * (8 + 8)
