"""What this training refuses, said before torch is loaded. Every refusal here is a feature that has its room but was not built."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UsageError
from launcher.plan import Plan, Staged
from launcher.supported import ADAPTER_NOT_WITH, EXECUTED, choices, sharding_refusal


def require_supported(plan: Plan) -> Staged:
    """The staged folders of a plan that can be trained. Errors: UsageError with the key and what works."""
    values = choices(plan.preset, plan.attention)
    for key, value in values.items():
        if value not in EXECUTED[key]:
            raise UsageError(f"{value} is not here yet", code="not-here-yet", key=key, hint=f"one of {', '.join(EXECUTED[key])}")
    if values["training.dtype"] == "fp16" and plan.layout.gpus_per_node == 0:
        raise UsageError("fp16 needs a GPU", code="fp16-cpu", key="training.dtype", hint="fp32 or bf16 on CPU")
    if values["training.cross_entropy"] == "fused" and plan.layout.gpus_per_node == 0:
        raise UsageError("fused needs a GPU", code="fused-cpu", key="training.cross_entropy", hint="cross_entropy: chunked")
    refusal = sharding_refusal(plan.preset)
    if refusal is not None:
        raise UsageError(refusal.message, code=refusal.code, key=refusal.key, hint=refusal.hint)
    if plan.attention not in ("eager", "sdpa") and plan.layout.gpus_per_node == 0:
        raise UsageError(f"{plan.attention} needs a GPU", code="attention-cpu", key="attention", hint="eager or sdpa on CPU")
    if plan.world_size > 1 and plan.preset["parallelism"] in ("single", "device_map"):
        raise UsageError(
            f"{plan.preset['parallelism']} is one process, the plan has {plan.world_size}", code="world-size", key="parallelism"
        )
    why = ADAPTER_NOT_WITH.get(values["adapter"], {}).get(values["parallelism"])
    if why is not None:
        raise UsageError(f"{values['adapter']} with {values['parallelism']}: {why}", code="adapter-not-sharded", key="parallelism")
    return _require_staged(plan)


def _require_staged(plan: Plan) -> Staged:
    staged = plan.staged
    if staged is None:
        raise UsageError("model and data were not staged", code="not-staged", hint="ftlaunch stage")
    evaluated = plan.preset["evaluation"]["every"] != "never"
    for folder in (Path(staged.model), Path(staged.data) / "train", *([Path(staged.data) / "eval"] if evaluated else [])):
        if not folder.is_dir():
            raise UsageError(f"{folder} is missing on this node", code="not-staged", hint="stage again, or bind the folder")
    return staged
