"""Small presets, hardware, sites and stacks, and the plans made of them."""

from __future__ import annotations

from typing import Any

from launcher.errors import Finding
from launcher.plan import Container, Plan, Staged
from launcher.planner import make_plan
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack

FACTS = ModelFacts(
    architecture="llama", parameters=1000, layers=2, hidden=32, heads=2, kv_heads=2, intermediate=16, vocab=32, context=4096, tied=False,
    linear_layers=["q_proj", "v_proj"],
)  # fmt: skip


STAGED = Staged(model="/m", data="/d", train_samples=100, eval_samples=0, train_targets=1, data_sha="abc")


GPU = {
    "kind": "a100", "memory_gib": 80, "compute_capability": "8.0", "bandwidth_gb_s": 2000,
    "peak_tflops": {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312},
}  # fmt: skip


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
        "packages": {"torch": "2.10.0", "transformers": "5.23.0", "deepspeed": "0.19.8", "peft": "0.21.2"},
        "attention": ["eager", "sdpa", "xformers"],
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
