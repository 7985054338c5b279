"""What would make a run faster or cheaper: found by planning with each change and keeping what the time model says is best. Pure.

The changes train the same thing: same model, samples, effective batch and steps. Compute in half precision keeps fp32 master weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.errors import Finding
from launcher.plan import Plan
from launcher.remedies import Change, Replan, change_text, value_of
from launcher.supported import EXECUTED, choices

WORTH = 0.9
"""Advice is given when it leaves less than this share of the GPU-hours."""
ROUNDS = 6

IN_ANOTHER_STACK = {"parallelism-not-in-stack", "attention-not-in-stack", "attention-needs-half"}
"""Errors that a change of the stack may take away."""

SAME_TRAINING = (
    "model.name", "model.path", "data.name", "data.path", "data.subset", "data.sources", "data.format", "data.num_samples",
    "training.sequence_length", "training.epochs", "training.effective_batch", "training.learning_rate", "training.optimizer", "adapter",
)  # fmt: skip
"""Keys that two presets share when one is a faster way to the training of the other."""


def advise(plan: Plan, replan: Replan, stacks: Sequence[str] = (), variants: Mapping[str, Plan] | None = None) -> list[Finding]:
    """At most three findings: GPUs that wait, the best changes with their predicted GPU-hours, the shipped variant that has them.

    ``stacks``: names that ``stack`` may be changed to. ``variants``: plans of other presets, on the same site.
    Nothing where the time is not predicted.
    """
    found: list[Finding] = []
    gpus = plan.layout.gpus_per_node
    if plan.preset["parallelism"] == "device_map" and gpus > 1:
        message = f"device_map lets the layers' GPUs work one after the other: at any time {gpus - 1} of {gpus} GPUs wait"
        found.append(Finding("advice", "waiting-gpus", message, key="parallelism", hint="a parallelism that shares out the samples"))
    if plan.time is None or gpus == 0:
        return found
    change, best = _best(plan, replan, stacks)
    if change and best.time is not None and _cost(best) < WORTH * _cost(plan):
        message = f"{_hours(plan)} predicted; {_hours(best)} with {change_text(change, plan, best)}"
        hint = f"{_cost(plan) / _cost(best):.1f} times cheaper, same training"
        waiting = ", ".join(f"{key} {value}" for key, value in choices(best.preset, best.attention).items() if value not in EXECUTED[key])
        found.append(Finding("advice", "cheaper", message, hint=f"{hint}; not executed yet: {waiting}" if waiting else hint))
    name, variant = _best_variant(plan, variants or {})
    if variant is not None and _cost(variant) < WORTH * _cost(plan):
        message = f"preset {name} does this training in {_hours(variant)} instead of {_hours(plan)}"
        found.append(Finding("advice", "cheaper-variant", message, hint=f"ftlaunch check {name}"))
    return found


def _best(plan: Plan, replan: Replan, stacks: Sequence[str]) -> tuple[Change, Plan]:
    """Greedy: the change of least GPU-hours is kept and the search goes on from there."""
    so_far: dict[str, object] = {}
    best = plan
    for _ in range(ROUNDS):
        tried = [result for move in _moves(best) if (result := _passing({**so_far, **move}, replan, stacks)) is not None]
        if not tried:
            break
        change, cheapest = min(tried, key=lambda result: _cost(result[1]))
        if _cost(cheapest) > 0.97 * _cost(best):
            break
        so_far, best = dict(change), cheapest
    return so_far, best


def _passing(change: Change, replan: Replan, stacks: Sequence[str]) -> tuple[Change, Plan] | None:
    """The change with its plan; with another stack where that is what it lacks."""
    result = replan(change)
    if result is None:
        return None
    plan, findings = result
    lacking = {finding.code for finding in findings if finding.level == "error"}
    if plan.attention not in plan.stack.get("attention", [plan.attention]):  # planned for a stack of one's own that has the kernel
        lacking.add("attention-not-in-stack")
    if not lacking:
        return (change, plan) if plan.time is not None else None
    if lacking <= IN_ANOTHER_STACK and "stack" not in change:
        others = (_passing({**change, "stack": stack}, replan, ()) for stack in stacks if stack != plan.preset["stack"])
        return next((other for other in others if other is not None), None)
    return None


def _moves(plan: Plan) -> list[Change]:
    """Single changes, and those that only make sense together: another way to share the work wants another micro batch."""
    preset, training = plan.preset, plan.preset["training"]
    auto: Change = {"training.micro_batch": "auto"}
    half: Change = {"training.dtype": "bf16", "training.tf32": True}
    moves: list[Change] = [auto]
    if training["dtype"] == "fp32":
        moves += [half, {**half, **auto}, {"training.dtype": "fp16", **auto}, {"training.tf32": True}]
    if preset["data"]["packing"] == "none":
        moves.append({"data.packing": "flatten"})
    if training["activation_checkpointing"] != "none":
        moves.append({"training.activation_checkpointing": "none", **auto})
    if training["activation_checkpointing"] == "full":
        moves.append({"training.activation_checkpointing": "selective", **auto})
    moves += [{"attention": name, **auto} for name in ("sdpa", "flash2", "xformers") if name != plan.attention]
    if plan.layout.gpus_per_node > 1:
        for name in ("ddp", "zero2", "zero3", "fsdp"):
            if name == preset["parallelism"]:
                continue
            shared: Change = {"parallelism": name, "ranks_per_node": None, **auto}
            moves += [shared, {**shared, "training.activation_checkpointing": "full"}]
            if training["dtype"] == "fp32":
                moves.append({**shared, **half})
    return moves


def same_training(plan: Plan, other: Plan) -> bool:
    """Whether one trains what the other does, perhaps in another precision or on other GPUs."""
    return all(value_of(other, key) == value_of(plan, key) for key in SAME_TRAINING)


def _best_variant(plan: Plan, variants: Mapping[str, Plan]) -> tuple[str, Plan | None]:
    same = {name: variant for name, variant in variants.items() if variant.time is not None and same_training(plan, variant)}
    name = min(same, key=lambda name: _cost(same[name]), default="")
    return name, same.get(name)


def _cost(plan: Plan) -> float:
    """GPU-hours of the run, or GPU-seconds of a step where the number of steps is not known."""
    assert plan.time is not None
    return plan.time.gpu_hours if plan.time.gpu_hours is not None else plan.time.step_s * plan.layout.nodes * plan.layout.gpus_per_node


def _hours(plan: Plan) -> str:
    assert plan.time is not None
    if plan.time.gpu_hours is None:
        return f"{plan.time.step_s:.3g} s a step"
    return f"{plan.time.gpu_hours:.3g} GPU-hours"
