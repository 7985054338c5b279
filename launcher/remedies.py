"""The smallest change that makes a refused plan pass, found by planning again with each candidate. Pure.

Candidates are ordered: first what leaves the weights as they would be, then what costs time or money, then what trains something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from launcher.errors import Finding
from launcher.plan import Plan
from launcher.preset.fields import duration_text
from launcher.preset.schema import Preset
from launcher.supported import SHARDED

Change = Mapping[str, Any]
"""Dotted key of the preset → new value."""

Replan = Callable[[Change], "tuple[Plan, list[Finding]] | None"]
"""The plan with a change laid over the preset; None where the preset would make no sense."""


HOST_MEMORY = ("host-memory", "memory_per_node_gib")

STEPS = 8
"""Changes that are made one after the other until nothing is refused."""

ANOTHER_TRAINING = {"adapter", "training.optimizer"}
"""Keys whose change trains something else."""


def changed(preset: Preset, change: Change) -> Preset | None:
    """The preset with other values; None where they make no sense together."""
    values = preset.model_dump()
    for key, value in change.items():
        *path, last = key.split(".")
        place = values
        for name in path:
            if not isinstance(place[name], dict):
                return None
            place = place[name]
        place[last] = value
    try:
        return Preset.model_validate(values)
    except ValidationError:
        return None


def change_text(change: Change, before: Plan, after: Plan) -> str:
    """What differs, as a user would write it: ``training.dtype: bf16, training.micro_batch: auto (4)``."""
    texts = []
    for key, value in change.items():
        if key.startswith("slurm.") or value_of(before, key) != value:
            found = f" ({after.batch.micro_batch})" if (key, value) == ("training.micro_batch", "auto") else ""
            texts.append(f"{key}: {written(value)}{found}")
    return ", ".join(texts)


def value_of(plan: Plan, key: str) -> object:
    """The value of a dotted key in a plan's preset; None where there is none."""
    value: object = plan.preset
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) and name in value else None
    return value


def with_remedies(plan: Plan, findings: Sequence[Finding], replan: Replan, stacks: Sequence[str] = ()) -> list[Finding]:
    """Each error with the smallest change that was tried and passes; where none does, the finding stays as it is.

    ``stacks``: names that ``stack`` may be changed to.
    """
    found = []
    for finding in findings:
        if finding.level == "error" and finding.code in _CANDIDATES:
            found.append(_remedied(finding, plan, findings, replan, stacks))
        else:
            found.append(finding)
    return found


def passing(plan: Plan, findings: Sequence[Finding], replan: Replan, stacks: Sequence[str] = ()) -> tuple[Change, Plan] | None:
    """A change after which nothing of the plan is refused, found refusal by refusal, and its plan; None where none was found. It trains
    the same thing, and on GPUs what was to run on GPUs. What is no matter of the plan (``refusals``) stays.
    """
    so_far: dict[str, Any] = {}

    def from_here(change: Change) -> tuple[Plan, list[Finding]] | None:
        return None if ANOTHER_TRAINING & change.keys() or change.get("gpus") == 0 else replan({**so_far, **change})

    for _ in range(STEPS):
        refused = refusals(findings)
        if not refused:
            return so_far, plan
        for finding in (one for one in refused if one.code in _CANDIDATES):
            found = _smallest(finding, plan, findings, from_here, stacks)
            if found is not None:
                change, plan, findings = found
                so_far.update(change)
                break
        else:
            return None
    return None


def refusals(findings: Sequence[Finding]) -> list[Finding]:
    """The errors that another plan could be without: not the site's own (they have no key), nor an account that was not named."""
    return [finding for finding in findings if finding.level == "error" and finding.key is not None and finding.code != "account-missing"]


def _remedied(finding: Finding, plan: Plan, findings: Sequence[Finding], replan: Replan, stacks: Sequence[str]) -> Finding:
    found = _smallest(finding, plan, findings, replan, stacks)
    return finding if found is None else _with_hint(finding, found[0], plan, found[1])


def _smallest(
    finding: Finding, plan: Plan, findings: Sequence[Finding], replan: Replan, stacks: Sequence[str]
) -> tuple[Change, Plan, list[Finding]] | None:
    """The first candidate without this error and without a new one, with its plan."""
    before = {_mark(other) for other in findings if other.level == "error"}
    not_run_before = sum(other.code == "not-executed-yet" for other in findings)
    later: tuple[Change, Plan, list[Finding]] | None = None
    for change in _CANDIDATES[finding.code](plan, stacks):
        result = replan(change)
        if result is None:
            continue
        new_plan, new_findings = result
        errors = {_mark(other) for other in new_findings if other.level == "error"}
        if errors - before == {HOST_MEMORY} and new_plan.memory is not None:  # more GPUs want more RAM beside them
            change = {**change, HOST_MEMORY[1]: int(new_plan.memory.host_per_node_gib) + 1}
            new_plan, new_findings = replan(change) or result
            errors = {_mark(other) for other in new_findings if other.level == "error"}
        if finding.code in {code for code, _ in errors} or not errors <= before:
            continue
        if sum(other.code == "not-executed-yet" for other in new_findings) <= not_run_before:
            return change, new_plan, new_findings
        later = later or (change, new_plan, new_findings)  # passes, but the training does not run it yet: something else may
    return later


def _mark(finding: Finding) -> tuple[str, str | None]:
    return finding.code, finding.key


def _with_hint(finding: Finding, change: Change, before: Plan, after: Plan) -> Finding:
    hint, memory = change_text(change, before, after), after.memory
    if finding.code == "gpu-memory" and memory is not None:
        hint += f" passes with {memory.per_gpu_gib:.1f} of {memory.available_gib:.1f} GiB"
    return replace(finding, hint=hint)


def _gpu_memory(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    preset, training = plan.preset, plan.preset["training"]
    auto: Change = {"training.micro_batch": "auto"}
    smaller = [{"training.micro_batch": size} for size in _halves(plan.batch.micro_batch)]
    yield from smaller
    exact: list[Change] = []
    if plan.attention == "eager":
        exact += [{"attention": name} for name in ("sdpa", "xformers", "flash2")]
    if training["cross_entropy"] == "plain":
        exact.append({"training.cross_entropy": "chunked"})
    if training["activation_checkpointing"] == "none":
        exact.append({"training.activation_checkpointing": "selective"})
    if training["activation_checkpointing"] != "full":
        exact.append({"training.activation_checkpointing": "full"})
    for change in exact:
        yield change
    for change in exact:
        yield {**change, **auto}
    shard: list[Change] = []
    if plan.layout.gpus_per_node * plan.layout.nodes > 1:
        kinds = ("fsdp",) if training["optimizer"] == "adafactor" else ("zero1", "zero2", "fsdp", "zero3")
        sharded = [name for name in kinds if name != preset["parallelism"]]
        scaled: Change = {"training.dtype": "fp32"} if training["dtype"] == "fp16" else {}  # shards have no loss scaling
        shard = [{"parallelism": name, "ranks_per_node": None, **scaled} for name in sharded]
    full: Change = {"training.activation_checkpointing": "full"}
    for change in shard:
        yield change
        yield {**change, **auto}
        yield {**change, **full, **auto}
    if preset["parallelism"] in ("zero3", "fsdp") or shard:
        kind = preset["parallelism"] if preset["parallelism"] in ("zero3", "fsdp") else _whole_shards(preset)
        if kind == "zero3":
            yield {"parallelism": kind, "offload": "optimizer", **full, **auto}
        yield {"parallelism": kind, "offload": "all", **full, **auto}
    for gpus in range(plan.layout.gpus_per_node + 1, int(plan.hardware["gpus"]) + 1):
        yield {"gpus": gpus, **auto}
        for change in shard or [{"parallelism": _whole_shards(preset)}]:
            yield {"gpus": gpus, **change, **full, **auto}
    if preset["parallelism"] in ("zero1", "zero2", "zero3", "fsdp"):
        partition = plan.site["partitions"].get(plan.slurm.get("partition", ""), {})
        yield from ({"nodes": nodes, **full, **auto} for nodes in range(plan.layout.nodes + 1, (partition.get("max_nodes") or 0) + 1))
    for optimizer in ("adafactor", "adamw_8bit"):
        if training["optimizer"] == "adamw":
            yield {"training.optimizer": optimizer, **full, **auto}
    if preset["adapter"] == "none":
        yield {"adapter": {"kind": "lora"}, **auto}
        yield {"adapter": {"kind": "lora"}, **full, **auto}
        yield {"adapter": {"kind": "qlora"}, **full, **auto}


def _host_memory(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    assert plan.memory is not None
    yield {"memory_per_node_gib": int(plan.memory.host_per_node_gib) + 1}
    if plan.preset["offload"] == "all":
        yield {"offload": "optimizer"}
    if plan.preset["offload"] != "none":
        yield {"offload": "none"}
    if plan.preset["hardware"] and plan.layout.ranks_per_node > 1:
        for ranks in _halves(plan.layout.ranks_per_node):
            yield {"gpus": ranks, "nodes": plan.layout.nodes * plan.layout.ranks_per_node // ranks}


def _disk(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    rule = plan.preset["checkpoint"]
    if rule["every"] == "epoch":
        epochs = int(-(-plan.preset["training"]["epochs"] // 1))
        yield from ({"checkpoint.keep_epochs": number} for number in range(epochs - 1, 0, -1))
    yield from ({"checkpoint.keep": number} for number in range(rule["keep"] - 1, 0, -1))
    yield {"checkpoint.keep": 1, "checkpoint.keep_epochs": 1}


def _attention(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield from ({"attention": name} for name in ("flash2", "xformers", "sdpa", "eager") if name != plan.attention)
    yield {"training.dtype": "bf16"}
    yield from _stack(plan, stacks)


def _dtype(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    names = ("bf16", "fp32") if plan.preset["parallelism"] in SHARDED else ("bf16", "fp16", "fp32")  # shards have no loss scaling
    wanted: list[Change] = [{"training.dtype": name} for name in names if name != plan.preset["training"]["dtype"]]
    yield from wanted
    roomy: Change = {"training.activation_checkpointing": "full", "training.micro_batch": "auto"}
    yield from ({**change, **roomy} for change in wanted)
    gpus, total = int(plan.hardware["gpus"]), plan.layout.nodes * plan.layout.gpus_per_node
    if plan.preset["parallelism"] in SHARDED and gpus > plan.layout.gpus_per_node:  # all of a node's
        yield from ({**change, **roomy, "gpus": gpus, "nodes": -(-total // gpus)} for change in wanted)


def _stack(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield from ({"stack": name} for name in stacks if name != plan.preset["stack"])


def _cross_entropy(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield from ({"training.cross_entropy": name} for name in ("chunked", "plain"))


def _compile(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"training.compile": "none"}


def _checkpointing(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"training.activation_checkpointing": "full"}
    yield from _stack(plan, stacks)


def _optimizer(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"training.optimizer": "adamw"}


def _whole_shards(preset: Mapping[str, Any]) -> str:
    """What shards weights, gradients and optimizer state with this preset's optimizer."""
    return "fsdp" if preset["training"]["optimizer"] == "adafactor" else "zero3"


def _parallelism(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    nearest = {"fsdp": ("zero3", "zero2"), "zero1": ("zero2", "fsdp"), "zero2": ("zero1", "fsdp"), "zero3": ("fsdp",)}
    yield from ({"parallelism": name} for name in (*nearest.get(plan.preset["parallelism"], ()), "ddp", "single"))
    yield from _stack(plan, stacks)


def _gpus(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    total = plan.layout.nodes * plan.layout.gpus_per_node
    for gpus in range(plan.layout.gpus_per_node - 1, 0, -1):  # as many GPUs in all, on more nodes
        if total % gpus == 0 and plan.preset["parallelism"] != "device_map":
            yield {"gpus": gpus, "nodes": total // gpus}
    yield from ({"gpus": gpus} for gpus in range(plan.layout.gpus_per_node - 1, -1, -1))
    if plan.preset["parallelism"] == "device_map":  # one process cannot span nodes: the shards of many can
        for gpus in range(plan.layout.gpus_per_node - 1, 0, -1):
            sharded: Change = {"parallelism": _whole_shards(plan.preset), "ranks_per_node": None, "training.micro_batch": "auto"}
            yield {"gpus": gpus, "nodes": -(-total // gpus), **sharded}


def _nodes(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield from ({"nodes": nodes} for nodes in range(plan.layout.nodes - 1, 0, -1))


def _time(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    assert plan.time_limit_min is not None
    limit = plan.site["partitions"].get(plan.slurm.get("partition", ""), {}).get("max_time")
    if limit is not None:
        yield {"slurm.time": limit}
    yield from ({"slurm.time": duration_text(plan.time_limit_min * factor)} for factor in (2, 4, 8, 16, 32, 64))


def _ranks(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"ranks_per_node": plan.layout.gpus_per_node}


def _cpus(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"cpus_per_node": plan.hardware["cpus"]}


def _node_memory(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"memory_per_node_gib": plan.hardware["memory_gib"]}


def _sharding(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield {"parallelism": "fsdp"}
    yield {"training.optimizer": "adamw"}


def _offload(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    yield from ({"offload": name} for name in ("all", "optimizer", "none") if name != plan.preset["offload"])


def _memory_of_cpus(plan: Plan, stacks: Sequence[str]) -> Iterator[Change]:
    most = plan.site["partitions"][plan.slurm["partition"]]["max_memory_per_cpu_mib"]
    yield {"cpus_per_node": -(-1024 * plan.layout.memory_per_node_gib // most)}
    yield {"memory_per_node_gib": most * plan.layout.cpus_per_node // 1024}


_CANDIDATES: Mapping[str, Callable[[Plan, Sequence[str]], Iterator[Change]]] = {
    "gpu-memory": _gpu_memory,
    "host-memory": _host_memory,
    "disk-too-small": _disk,
    "attention-not-on-gpu": _attention,
    "attention-needs-half": _attention,
    "attention-not-in-stack": _attention,
    "attention-head": _attention,
    "attention-not-in-model": _attention,
    "attention-not-split": _attention,
    "attention-without-borders": _attention,
    "dtype-not-on-gpu": _dtype,
    "dtype-not-sharded": _dtype,
    "cross-entropy-not-on-gpu": _cross_entropy,
    "compile-not-in-stack": _compile,
    "compile-not-with": _compile,
    "checkpointing-not-in-stack": _checkpointing,
    "optimizer-not-in-stack": _optimizer,
    "optimizer-not-sharded": _sharding,
    "offload-not-sharded": _offload,
    "stack-without-cuda": _stack,
    "gpu-older-than-stack": _stack,
    "driver-too-old": _stack,
    "parallelism-not-in-stack": _parallelism,
    "gpus-above-node": _gpus,
    "gpus-above-partition": _gpus,
    "nodes-above-partition": _nodes,
    "nodes-without-scheduler": _nodes,
    "time-above-partition": _time,
    "no-checkpoint-in-time": _time,
    "ranks-above-gpus": _ranks,
    "cpus-above-node": _cpus,
    "memory-above-node": _node_memory,
    "memory-above-cpus": _memory_of_cpus,
}


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "default", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(entry)}" for key, entry in value.items()) + "}"
    return str(value)
