"""What a plan is refused and warned for."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.hardware.gates import ALLOWED_BY, GATES
from tests.plans import GPU, hardware, plan_of, preset, site, stack, worst

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
            {"memory_per_node_gib": 80, "cpus_per_node": 8},
            {"site": site(partitions={"gpu": {"max_memory_per_cpu_mib": 8000}}), "slurm": {"partition": "gpu"}},
            "memory-above-cpus: memory_per_node_gib: 80 GiB for 8 CPUs, but partition gpu gives a CPU 8000 MiB "
            "(cpus_per_node: 11, or less RAM)",
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
            {"parallelism": "zero3", "training": {"optimizer": "adafactor"}},
            {},
            "optimizer-not-sharded: training.optimizer: DeepSpeed flattens parameters: Adafactor has nothing to factor then, saves no "
            "memory and gives other results (parallelism: fsdp, or optimizer: adamw)",
        ),
        (
            {"parallelism": "fsdp"},
            {"stack": stack(packages={"torch": "2.3.0", "transformers": "4.41.1"}, parallelism=["fsdp"])},
            "parallelism-not-in-stack: parallelism: fsdp needs torch 2.6 or newer, stack s has 2.3.0 (a newer stack, or parallelism: ddp)",
        ),
        (
            {"parallelism": "zero2"},
            {"stack": stack(packages={"torch": "2.10.0", "transformers": "5.0"}, parallelism=["zero2"])},
            "parallelism-not-in-stack: parallelism: zero2 needs deepspeed, which stack s is without "
            "(a stack with it, or parallelism: fsdp)",
        ),
        (
            {"parallelism": "fsdp", "offload": "optimizer"},
            {"stack": stack(parallelism=["fsdp"])},
            "offload-not-sharded: offload: fsdp offloads weights and optimizer state together (offload: all)",
        ),
        (
            {"offload": "optimizer"},
            {},
            "offload-not-sharded: offload: ddp keeps everything on the GPUs (offload: none, or parallelism: zero2, zero3 or fsdp)",
        ),
        (
            {"training": {"optimizer": "adamw_8bit"}},
            {},
            "library-missing: training.optimizer: adamw_8bit needs bitsandbytes, which stack s is without (a stack with it)",
        ),
        (
            {"attention": "xformers"},
            {"stack": stack(packages={"torch": "2.10.0", "transformers": "5.0", "xformers": "0.0.26.post1"}, attention=["xformers"])},
            "library-pair: stack: xformers 0.0.26.post1 was built for torch 2.3.0, stack s has torch 2.10.0 (torch: 2.3.0, or another "
            "xformers)",
        ),
        (
            {},
            {"hardware": hardware(driver=None, cuda="12.5"), "stack": stack(cuda="13.0")},
            "driver-too-old: stack: stack s (CUDA 13.0) needs driver 580, node's announces CUDA 12.5 "
            "(a stack for an older CUDA, or --allow driver)",
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
        ({}, {"site": site(cache="/scratch/cache", submit_limit=5)}, []),
        (
            {},
            {"site": site(closed="2026-08-31", build={"on": "elsewhere"})},
            [
                "warning: site-closed: site cluster is closed since 2026-08-31: nothing runs there any more",
                "warning: build-elsewhere: site cluster builds no images: submit takes the one that it finds in the folder of images "
                "(ftlaunch build on another machine, or --print-only, and copy it)",
            ],
        ),
        (
            {"memory_per_node_gib": 80, "cpus_per_node": 8},
            {
                "site": site(memory="none", partitions={"gpu": {"max_memory_per_cpu_mib": 8000, "gpus_per_node": 2}}),
                "slurm": {"partition": "gpu"},
            },
            [],
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
        ({"parallelism": "zero3"}, {}, []),
    ],
    ids=[
        "nothing",
        "driver-unknown",
        "driver-by-cuda",
        "site-cache",
        "site-closed",
        "memory-not-asked-for",
        "device-map",
        "idle-gpus",
        "tf32-v100",
        "tf32-cpu",
        "zero3",
    ],
)
def test_warned(wish: dict[str, Any], changes: dict[str, Any], expected: list[str]) -> None:
    assert worst(plan_of(preset(**wish), **changes)[1]) == expected


def test_flash_is_planned_though_the_image_is_without_it() -> None:
    findings = plan_of(preset(attention="flash2"))[1]
    assert [(finding.level, finding.code, finding.key) for finding in findings if finding.level != "advice"] == [
        ("warning", "not-executed-yet", "stack"),
    ]


def test_only_what_uses_gpus_is_called_never_run() -> None:
    codes = {gpus: [finding.code for finding in plan_of(preset(gpus=gpus))[1]] for gpus in (0, 1)}
    assert ["not-executed-here" in found for found in codes.values()] == [False, True]


def test_allowed_gates_become_warnings_and_others_do_not() -> None:
    changes: dict[str, Any] = {"stack": stack(cuda="13.0"), "site": site(**PARTITION), "slurm": {"partition": "gpu", "time": "48h"}}
    levels = {finding.code: finding.level for finding in plan_of(**changes, allowed=["driver"])[1]}
    assert (levels["driver-too-old"], levels["time-above-partition"]) == ("warning", "error")
    assert set(ALLOWED_BY) == GATES - {"disk-too-small", "gated-model"}
    assert plan_of(**changes, allowed=["driver"])[0].allowed == ("driver",)


def test_whole_nodes_are_paid_whole() -> None:
    whole = site(whole_nodes=True, partitions={"gpu": {"gpus_per_node": 3}})
    said = [str(finding) for finding in plan_of(site=whole, slurm={"partition": "gpu"})[1] if finding.code == "whole-node"]
    assert said == ["gpus: site cluster gives whole nodes: 1 of 3 GPUs of each wait, and are paid (gpus: 3)"]
    assert "whole-node" not in [finding.code for finding in plan_of(preset(gpus=3), site=whole, slurm={"partition": "gpu"})[1]]
