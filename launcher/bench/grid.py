"""Which cells there are and what the planner says of each. Pure: plans are made by the ``Replan`` that it is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.bench.cell import Cell
from launcher.errors import Finding
from launcher.hardware.compatibility import GPU_ONLY_ATTENTION
from launcher.plan import Plan
from launcher.preset.schema import Preset
from launcher.remedies import Change
from launcher.supported import EXECUTED

LENGTHS = (1024, 2048, 4096)
"""The sequence lengths of the source's tables; the last is the row that they leave open."""

NOT_OF_A_STEP: Collection[str] = ("account-missing", "partition-missing", "disk-too-small", "gated-model", "no-checkpoint-in-time")
"""Refusals of the planner that are about a whole run, not about a step of it."""

NOT_EXECUTED: Collection[str] = ("not-executed-yet", "not-built-yet")

Replan = Callable[[Change], "tuple[Plan, list[Finding]] | None"]


@dataclass(frozen=True)
class Axes:
    """What is varied; ``None`` for the micro batch: per combination the largest that fits, half of it, and the first that does not."""

    sequence_length: tuple[int, ...]
    attention: tuple[str, ...]
    checkpointing: tuple[str, ...]
    adapter: tuple[str, ...]
    micro_batch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Candidate:
    cell: Cell
    plan: Plan | None
    """As planned, also where it is refused; None where the preset makes no sense."""
    refusal: str
    """Why it is not measured; empty where it is."""


def default_axes(preset: Preset, context: int | None, kinds: Sequence[str] | None) -> Axes:
    """The preset's own values and the ones beside it that training runs. ``context``: the model's; ``kinds``: attention of the stack."""
    lengths = tuple(length for length in LENGTHS if context is None or length <= context)
    own = preset.attention if preset.attention != "auto" else "sdpa"
    there = [kind for kind in kinds or EXECUTED["attention"] if kind in EXECUTED["attention"]]
    if not preset.gpus:
        there = [kind for kind in there if kind not in GPU_ONLY_ATTENTION]
    adapter = preset.adapter if isinstance(preset.adapter, str) else preset.adapter.kind
    return Axes(
        sequence_length=tuple(sorted({preset.training.sequence_length, *(lengths if preset.gpus else ())})),
        attention=tuple(dict.fromkeys([own, *there])),
        checkpointing=("none", "full"),
        adapter=tuple(dict.fromkeys([adapter, "none", "lora"])),
    )


def candidates(axes: Axes, preset: Preset, replan: Callable[[Cell], Replan]) -> Iterator[Candidate]:
    """Every cell in the order of the tables, each with its plan or why there is none. ``replan``: plans for a cell's sequence length."""
    for length in axes.sequence_length:
        for adapter in axes.adapter:
            for attention in axes.attention:
                for checkpointing in axes.checkpointing:
                    one = Cell(length, attention, checkpointing, adapter, 1)
                    yield from _sizes(one, axes.micro_batch, preset, replan(one))


def contenders(found: Iterable[Candidate]) -> Iterator[Candidate]:
    """For a contest: refused too where the rivals, one process that trains all weights, cannot do the same."""
    for candidate in found:
        yield candidate if candidate.refusal or candidate.plan is None else replace(candidate, refusal=_beyond_rivals(candidate.plan))


def _beyond_rivals(plan: Plan) -> str:
    preset, training = plan.preset, plan.preset["training"]
    if plan.world_size > 1:
        return f"the rivals are one process, the plan has {plan.world_size} (--gpus 1, or --set ranks_per_node=1)"
    if preset["adapter"] != "none":
        return "the rivals train all weights (--adapter none)"
    if training["dtype"] == "bf16_pure":
        return "the rivals do not train in bf16_pure (--set training.dtype=bf16)"
    if training["activation_checkpointing"] == "selective":
        return "the rivals have no selective checkpointing (--checkpointing none, or full)"
    return ""


def change_for(cell: Cell, preset: Preset) -> Change:
    """What a cell is, laid over the preset; as ``submit --set`` takes it."""
    adapter: Any = cell.adapter
    if cell.adapter != "none":
        own = preset.adapter if not isinstance(preset.adapter, str) else None
        adapter = {**({} if own is None else own.model_dump(exclude_none=True)), "kind": cell.adapter}
    return {
        "training.sequence_length": cell.sequence_length,
        "attention": cell.kernel[0],
        "training.activation_checkpointing": cell.checkpointing,
        "adapter": adapter,
        "training.micro_batch": cell.micro_batch,
    }


MEASURED: Change = {
    "training.epochs": 1,
    "data.num_samples": None,
    "evaluation": {"every": "never"},
    "checkpoint": {"every": "never"},
    "limits": {},
    "nodes": 1,
}
"""Laid over every cell: steps only, on one node."""


def _sizes(one: Cell, wanted: tuple[int, ...] | None, preset: Preset, replan: Replan) -> Iterator[Candidate]:
    def planned(micro_batch: int) -> Candidate:
        return _candidate(Cell(one.sequence_length, one.attention, one.checkpointing, one.adapter, micro_batch), preset, replan)

    if wanted is not None:
        yield from map(planned, wanted)
        return
    first = planned(1)
    if first.refusal or first.plan is None or first.plan.memory is None:
        yield first
        return
    tried, share = [first], max(first.plan.batch.samples_per_rank)
    for micro_batch in (number for number in range(2, share + 1) if share % number == 0):
        tried.append(planned(micro_batch))
        if tried[-1].refusal:
            break
    yield from tried[-3 if tried[-1].refusal else -2 :]


def _candidate(cell: Cell, preset: Preset, replan: Replan) -> Candidate:
    found = replan({**change_for(cell, preset), **MEASURED})
    if found is None:
        return Candidate(cell, None, "the preset makes no sense with it")
    plan, findings = found
    if plan.batch.micro_batch != cell.micro_batch:
        share = max(plan.batch.samples_per_rank)
        return Candidate(cell, plan, f"a rank's {share} samples are no whole number of micro batches of {cell.micro_batch}")
    return Candidate(cell, plan, _refusal(plan, findings))


def _refusal(plan: Plan, findings: Sequence[Finding]) -> str:
    for finding in findings:
        if finding.level == "error" and finding.code == "gpu-memory" and plan.memory is not None:
            return f"does not fit: {plan.memory.per_gpu_gib:.1f} of {plan.memory.available_gib:.1f} GiB predicted"
        if finding.code in NOT_EXECUTED or (finding.level == "error" and finding.code not in NOT_OF_A_STEP):
            return finding.message
    return ""
