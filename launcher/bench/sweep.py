"""Measuring the cells of a grid one after the other, and contenders against each other. Starts processes; decides nothing about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from launcher.bench.cell import Cell, Row, append_row, read_rows, spread
from launcher.bench.grid import Candidate
from launcher.bench.work import Workshop, planned_for, wait
from launcher.files import digest
from launcher.hardware.flops import flops_per_token
from launcher.plan import Plan
from launcher.preset.model import ModelFacts

RIVALS = ("trainer", "memtune")
"""As ``rival`` knows them."""


@dataclass(frozen=True)
class Effort:
    warm_up: int
    """Optimizer steps that are not counted: allocations, kernels, caches."""
    steps: int
    """Optimizer steps that are."""


def measure_all(
    candidates: Iterable[Candidate], shop: Workshop, facts: ModelFacts | None, effort: Effort, setting: str, say: Callable[[str], None]
) -> list[Row]:
    """A row for each. What ``rows.jsonl`` holds of the same ``setting`` is not measured again, so a bench that was stopped goes on."""
    file = shop.folder / "rows.jsonl"
    known = {row.cell: row for row in read_rows(file) if row.setting == setting and row.outcome in ("measured", "out of memory")}
    rows = []
    for candidate in candidates:
        row = known.get(candidate.cell)
        if row is None:
            row = replace(measure_one(candidate, shop, facts, effort), setting=setting)
            append_row(file, row)
        seen = f"{row.step_s:.3g} s a step" if row.step_s is not None else row.reason
        say(f"{candidate.cell.name}: {row.outcome}, {seen}")
        rows.append(row)
    return rows


def measure_one(candidate: Candidate, shop: Workshop, facts: ModelFacts | None, effort: Effort) -> Row:
    cell, plan = candidate.cell, candidate.plan
    if candidate.refusal or plan is None:
        return _with_plan(Row(cell, "skipped", candidate.refusal), plan)
    request = planned_for(
        plan,
        {"warm_up": effort.warm_up, "steps": effort.steps, "backend": cell.kernel[1], "turns": False},
        shop.folder / "cells" / cell.name,
    )
    result = shop.run("measure", cell.name, request, ranks=plan.world_size, gpus=plan.layout.gpus_per_node)
    return row_of(cell, plan, facts, result)


def row_of(cell: Cell, plan: Plan, facts: ModelFacts | None, result: Mapping[str, Any]) -> Row:
    """Rates are of the median step; tokens, samples and the share those of all measured steps."""
    row = _with_plan(Row(cell, result["outcome"], result["reason"]), plan)
    if row.outcome != "measured":
        return row
    seconds, number = spread(result["step_s"]), len(result["step_s"])
    devices = plan.layout.gpus_per_node * plan.layout.nodes or 1
    rate = 1 / (number * seconds.median)
    tokens_s = result["tokens"] * rate / devices
    peak = None if plan.time is None else plan.time.peak_tflops
    mfu = None
    if facts is not None and peak is not None:
        mfu = flops_per_token(facts, round(result["tokens"] / result["samples"])) * tokens_s / (peak * 1e12)
    return replace(
        row,
        steps=number,
        step_s=seconds.median,
        step_s_lowest=seconds.lowest,
        step_s_highest=seconds.highest,
        samples_per_s=result["samples"] * rate,
        tokens_per_s=tokens_s,
        useful_tokens_per_s=result["useful_tokens"] * rate / devices,
        useful_share=result["useful_tokens"] / result["tokens"],
        mfu=mfu,
        memory_gib=result["memory_gib"],
        allocated_gib=result["allocated_gib"],
        trained_parameters=result["trained_parameters"],
        parameters=result["parameters"],
        device=result["device"],
        versions=result["versions"],
    )


@dataclass(frozen=True)
class Contest:
    """Ours and a rival on the same samples, step by step."""

    rival: str
    cell: Cell
    outcome: str
    reason: str = ""
    ours_step_s: float | None = None
    """Median."""
    rival_step_s: float | None = None
    ratio: float | None = None
    """Useful tokens per second, ours over the rival's: the median of the steps' ratios, which take the same samples."""
    ratio_lowest: float | None = None
    ratio_highest: float | None = None
    cpu_ratio: float | None = None
    """The same by the CPU time of the processes instead of the clock on the wall; None on GPUs. A shared machine does not blur it."""
    bound: float | None = None
    """1 / useful share of padded batches: what leaving out pads can give at most where nothing else differs."""
    steps: int = 0
    micro_batch: int = 0
    """The rival's."""
    interleaved: bool = False
    device: str = ""
    versions: Mapping[str, str] | None = None


def contend_all(candidates: Iterable[Candidate], shop: Workshop, effort: Effort, say: Callable[[str], None]) -> list[Contest]:
    """Contests of each candidate; one that is refused is a contest that says why."""
    contests = []
    for candidate in candidates:
        cell, plan = candidate.cell, candidate.plan
        if candidate.refusal or plan is None:
            contests += [Contest(rival, cell, "skipped", candidate.refusal) for rival in RIVALS]
        else:
            contests += contend(cell, plan, RIVALS, shop, effort, say)
    return contests


def contend(cell: Cell, plan: Plan, rivals: Iterable[str], shop: Workshop, effort: Effort, say: Callable[[str], None]) -> list[Contest]:
    """All contenders at once, one step each in turn, so that what else the machine does hits all alike; on GPUs one after the other."""
    names, gpus = ["ours", *rivals], plan.layout.gpus_per_node
    together = gpus == 0
    requests = {}
    for name in names:
        place = shop.folder / "cells" / f"{cell.name}-{name}"
        kind = {"backend": cell.kernel[1]} if name == "ours" else {"kind": name}
        requests[name] = planned_for(plan, {"warm_up": effort.warm_up, "steps": effort.steps, "turns": together, **kind}, place)
    if together:
        results = _in_turns(cell, requests, shop, effort, say)
    else:
        results = {}
        for name in names:
            module = "measure" if name == "ours" else "rival"
            ranks = plan.world_size if name == "ours" else 1
            results[name] = shop.run(module, f"{cell.name}-{name}", requests[name], ranks=ranks, gpus=gpus)  # type: ignore[arg-type]
            say(f"{cell.name}: {name} {results[name]['outcome']} {results[name]['reason']}")
    return [_contest(cell, rival, results["ours"], results[rival], together) for rival in names[1:]]


def _in_turns(
    cell: Cell, requests: Mapping[str, Mapping[str, Any]], shop: Workshop, effort: Effort, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    workers, alive = {}, []
    try:
        for name, request in requests.items():  # one after the other, so that they do not load their libraries against each other
            workers[name] = shop.start("measure" if name == "ours" else "rival", f"{cell.name}-{name}", request)
            alive += [name] if workers[name].ready() else []
        for step in range(effort.warm_up + effort.steps):
            for name in list(alive):
                workers[name].go()
                if not workers[name].ready() and step < effort.warm_up + effort.steps - 1:
                    alive.remove(name)
            say(f"{cell.name}: step {step + 1} of {effort.warm_up + effort.steps} of {', '.join(alive)}")
        return {name: wait([worker], limit_s=60) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.end()


def _contest(cell: Cell, rival: str, ours: Mapping[str, Any], other: Mapping[str, Any], together: bool) -> Contest:
    for name, result in (("ours", ours), (rival, other)):
        if result["outcome"] != "measured":
            return Contest(rival, cell, result["outcome"], f"{name}: {result['reason']}")
    assert ours["useful_tokens"] == other["useful_tokens"], "they train on the same targets"
    ratios = spread([slow / fast for slow, fast in zip(other["step_s"], ours["step_s"])])
    return Contest(
        rival,
        cell,
        "measured",
        ours_step_s=median(ours["step_s"]),
        rival_step_s=median(other["step_s"]),
        ratio=ratios.median,
        ratio_lowest=ratios.lowest,
        ratio_highest=ratios.highest,
        cpu_ratio=median([slow / fast for slow, fast in zip(other["cpu_s"], ours["cpu_s"])]) if together else None,
        bound=other["tokens"] / (ours["useful_tokens"] + ours["samples"]),
        steps=len(ours["step_s"]),
        micro_batch=other["micro_batch"],
        interleaved=together,
        device=ours["device"],
        versions=ours["versions"],
    )


def _with_plan(row: Row, plan: Plan | None) -> Row:
    if plan is None:
        return row
    memory = None
    if plan.memory is not None:
        memory = plan.memory.per_gpu_gib if plan.layout.gpus_per_node else plan.memory.host_per_node_gib
    return replace(
        row,
        gradient_accumulation=plan.batch.micro_steps,
        world_size=plan.world_size,
        predicted_memory_gib=memory,
        predicted_step_s=None if plan.time is None else plan.time.step_s,
    )


def material_folder(folder: Path, wish: Mapping[str, Any]) -> Path:
    """Of the samples that ``material`` makes of the wish."""
    return folder / "data" / f"{wish['packing']}-{wish['sequence_length']}-{digest(wish)[:12]}"
