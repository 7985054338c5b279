"""What this training refuses, said before torch is loaded. Every refusal here is a feature that has its room but was not built."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import UsageError
from launcher.plan import Plan, Staged
from launcher.supported import EXECUTED, choices


def require_supported(plan: Plan) -> Staged:
    """The staged folders of a plan that can be trained. Errors: UsageError with the key and what works."""
    values = choices(plan.preset, plan.attention)
    for key, value in values.items():
        if value not in EXECUTED[key]:
            raise UsageError(f"{value} is not here yet", code="not-here-yet", key=key, hint=f"one of {', '.join(EXECUTED[key])}")
    if values["training.dtype"] == "fp16" and plan.layout.gpus_per_node == 0:
        raise UsageError("fp16 needs a GPU", code="fp16-cpu", key="training.dtype", hint="fp32 or bf16 on CPU")
    if plan.world_size > 1 and plan.preset["parallelism"] != "ddp":
        raise UsageError(
            f"{plan.preset['parallelism']} is one process, the plan has {plan.world_size}", code="world-size", key="parallelism"
        )
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
