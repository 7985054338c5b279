"""What ``check`` shows of a plan: what, where, whether it fits, how long it takes, what is wrong with it. Text and bars, drawn once.

A plan in, lines out, and one function that prints them.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.text import Text

from launcher.cli.bars import bar
from launcher.cli.show import STYLES, drawable, is_unicode
from launcher.errors import Finding
from launcher.plan import Memory, Plan, Time
from launcher.planner import summary
from launcher.preset.fields import duration_text
from launcher.slurm.forecast import SLURM_REFUSES, Forecast

MAX_WIDTH = 100
"""Longer lines are no easier to read."""

_SECTION_WIDTH, _LABEL_WIDTH, _LEVEL_WIDTH = 6, 12, 9
_VALUE_AT = _SECTION_WIDTH + _LABEL_WIDTH
_NUMBER_WIDTH = 16
"""Of what stands behind a bar: ``  107.9 GiB 135 %``."""


@dataclass(frozen=True)
class Row:
    """One fact. ``value`` is wrapped, unless it is a bar."""

    label: str
    value: str
    style: str = ""
    is_bar: bool = False


def show_check(plan: Plan, findings: Sequence[Finding], console: Console, *, forecast: Forecast | None, now: datetime) -> None:
    """The table, then every finding, errors first, then what a submission would do. ``now``: for how long a start is away."""
    for line in _lines(plan, findings, forecast, now, min(console.width, MAX_WIDTH), blocks=is_unicode(console)):
        console.print(Text.assemble(*((drawable(text, console), style) for text, style in line)), soft_wrap=True)


Line = list[tuple[str, str]]
"""Pieces of text with their styles."""


def _lines(
    plan: Plan, findings: Sequence[Finding], forecast: Forecast | None, now: datetime, width: int, *, blocks: bool
) -> Iterator[Line]:
    heading = f"── {plan.name} "
    yield [(heading + "─" * (width - len(heading)), "bold")]
    for text in _wrapped(plan.preset["description"], width):
        yield [(text, "")]
    sections = {
        "what": _what(plan),
        "where": _where(plan),
        "fits": _fits(plan, findings, width - _VALUE_AT - _NUMBER_WIDTH, blocks),
        "time": _time(plan, findings, forecast, now),
        "disk": _disk(plan, findings),
    }
    for name, rows in sections.items():
        title = name
        for row in rows:
            for line in [row.value] if row.is_bar else _wrapped(row.value, width - _VALUE_AT):
                yield [(title.ljust(_SECTION_WIDTH), "bold"), (row.label.ljust(_LABEL_WIDTH), "dim"), (line, row.style)]
                title, row = "", Row("", "", row.style)
    yield []
    yield from _said(findings, width)


def _what(plan: Plan) -> Iterator[Row]:
    preset, training, shown = plan.preset, plan.preset["training"], summary(plan)
    adapter = preset["adapter"]
    trained = "all weights"
    if adapter != "none":
        trained = f"{adapter['kind']} of rank {adapter['rank']}, alpha {adapter['alpha']:g}"
        trained += f", on {', '.join(adapter['targets'])}" if adapter["targets"] else ""
        trained += f", and {', '.join(adapter['modules_to_save'])} whole" if adapter["modules_to_save"] else ""
    yield Row("model", str(shown["model"]))
    yield Row("trained", f"{trained}; {training['optimizer']}, {training['epochs']:g} epoch{'s' if training['epochs'] != 1 else ''}")
    checkpointing = training["activation_checkpointing"]
    offload = "" if preset["offload"] == "none" else f", {preset['offload']} offloaded to RAM"
    recomputed = "" if checkpointing == "none" else f", activation checkpointing {checkpointing}"
    faster = "" if training["cross_entropy"] == "plain" else f", cross-entropy {training['cross_entropy']}"
    faster += "" if training["compile"] == "none" else ", layers compiled"
    yield Row("dtype", f"{training['dtype']}{' with TF32' if training['tf32'] else ''}{recomputed}{faster}{offload}")
    yield Row("attention", plan.attention + (" (auto)" if preset["attention"] == "auto" else ""))
    if words := _data(preset["data"]):
        yield Row("data", words)
    yield Row("sequence", f"{training['sequence_length']} tokens, packing {preset['data']['packing']}")
    yield Row("batch", _batch(plan))
    yield Row("per rank", _per_rank(plan.batch.samples_per_rank))


def _data(data: Mapping[str, Any]) -> str:
    """What the rows are and where they come from; nothing to say of one source of text."""
    sources = data["sources"] or [data]
    formats = ", ".join(sorted({source["format"] or data["format"] for source in sources}))
    return f"{formats} of {len(sources)} sources, mixed by weight" if len(sources) > 1 else "" if formats == "text" else formats


def _batch(plan: Plan) -> str:
    """``64 = 8 ranks × micro batch 4 × accumulation 2``, or how it is shared out where that does not come out even."""
    batch = plan.batch
    product = plan.world_size * batch.micro_batch * batch.micro_steps
    ranks = _number(plan.world_size, "rank")
    auto = " (auto)" if plan.preset["training"]["micro_batch"] == "auto" else ""
    if product == batch.effective_batch:
        return f"{batch.effective_batch} = {ranks} × micro batch {batch.micro_batch}{auto} × accumulation {batch.micro_steps}"
    return f"{batch.effective_batch} on {ranks}: micro batch up to {batch.micro_batch}{auto}, accumulation {batch.micro_steps}"


def _per_rank(shares: Sequence[int]) -> str:
    counts = sorted(Counter(shares).items(), reverse=True)
    if len(counts) == 1:
        return f"{_number(shares[0], 'sample')} a step"
    (share, ranks), *others = counts
    rest = "".join(f", {share} on {number}" for share, number in others)
    return f"{_number(share, 'sample')} a step on {_number(ranks, 'rank')}{rest}"


def _where(plan: Plan) -> Iterator[Row]:
    layout, stack, gpu = plan.layout, plan.stack, plan.hardware["gpu"]
    options = [f"{name} {plan.slurm[name]}" for name in ("partition", "account", "qos", "constraint", "reservation") if name in plan.slurm]
    on_slurm = plan.site["scheduler"] == "slurm"
    yield Row("site", ", ".join([plan.site["name"], *options]) if on_slurm else f"{plan.site['name']}: this machine, no scheduler")
    nodes = _number(layout.nodes, "node")
    driver = f", driver {plan.hardware['driver']}" if plan.hardware["driver"] and layout.gpus_per_node else ""
    gpus = f" × {layout.gpus_per_node} × {gpu['kind'] if gpu else 'GPU'}" if layout.gpus_per_node else ", no GPU"
    yield Row("hardware", f"{nodes}{gpus} ({plan.hardware['name']}){driver}")
    yield Row("node", f"{_number(layout.cpus_per_node, 'CPU')} and {layout.memory_per_node_gib} GiB of RAM asked for")
    threads = _number(layout.threads_per_rank, "thread")
    yield Row("processes", f"{_number(plan.world_size, 'rank')}, {plan.preset['parallelism']}; {threads} each")
    if stack:
        versions = [f"{name} {stack['packages'][name]}" for name in ("torch", "transformers") if name in stack["packages"]]
        cuda = [f"CUDA {stack['cuda']}"] if stack["cuda"] else []
        yield Row("stack", f"{stack['name']}: {', '.join([*versions[:1], *cuda, *versions[1:]])}")
    if plan.container.use == "none":
        yield Row("image", "none: this machine's Python")
    else:
        yield Row("image", str(plan.container.image))
    if plan.allowed:
        yield Row("overridden", f"{', '.join(plan.allowed)} (--allow)", STYLES["warning"])


def _fits(plan: Plan, findings: Sequence[Finding], width: int, blocks: bool) -> Iterator[Row]:
    memory, asked = plan.memory, float(plan.layout.memory_per_node_gib)
    if memory is None:
        yield Row("memory", _why(findings, "memory-not-predicted", "model-facts-unknown"))
        return
    on_gpu = plan.layout.gpus_per_node > 0
    yield from _parts(memory, "GPU" if on_gpu else "a rank", "on the fullest GPU" if on_gpu else "of RAM", width, blocks)
    yield _bar("host RAM", memory.host_per_node_gib, asked, max(asked, memory.host_per_node_gib), width, blocks)


def _parts(memory: Memory, label: str, where: str, width: int, blocks: bool) -> Iterator[Row]:
    free = memory.available_gib - memory.per_gpu_gib
    amount = f"{memory.per_gpu_gib:.1f} of {memory.available_gib:.1f} GiB {where}"
    verdict = f"{free:.1f} GiB free" if free >= 0 else f"{-free:.1f} GiB TOO MUCH"
    yield Row(label, f"{'yes' if memory.fits else 'NO'}: {amount}, {verdict}", "green" if memory.fits else STYLES["error"])
    full = max(memory.available_gib, memory.per_gpu_gib, *memory.parts.values(), 0.1)
    for name, gib in memory.parts.items():
        yield _bar(name, gib, memory.available_gib, full, width, blocks)
    yield _bar("total", memory.per_gpu_gib, memory.available_gib, full, width, blocks)


def _bar(label: str, gib: float, limit_gib: float, full_gib: float, width: int, blocks: bool) -> Row:
    drawn = bar(max(gib, 0.0), limit_gib, full_gib, max(width, 10), blocks=blocks)
    share = f"{gib / limit_gib:>5.0%}" if limit_gib > 0 else ""
    digits = 2 if limit_gib < 10 else 1
    return Row(label, f"{drawn} {gib:6.{digits}f} GiB{share}", STYLES["error"] if gib > limit_gib else "green", is_bar=True)


def _time(plan: Plan, findings: Sequence[Finding], forecast: Forecast | None, now: datetime) -> Iterator[Row]:
    if plan.time is None:
        yield Row("total", _why(findings, "time-not-predicted", "model-facts-unknown"))
    else:
        yield from _predicted(plan, plan.time, findings)
    if plan.time_limit_min is not None:
        limits = plan.preset["limits"]
        at_most = _number(limits["max_lives"], "life", "lives")
        at_most += f" and {limits['max_gpu_hours']:g} GPU-hours" if limits["max_gpu_hours"] else ""
        yield Row("limit", f"{duration_text(plan.time_limit_min)} a life, notice {plan.signal_lead_s} s before its end; at most {at_most}")
    if forecast is not None:
        yield from _start(forecast, plan.time, now, plan.slurm.get("partition"))


def _predicted(plan: Plan, time: Time, findings: Sequence[Finding]) -> Iterator[Row]:
    yield Row("step", _seconds(time.step_s) + ("" if time.steps is None else f" × {_number(time.steps, 'step')}"))
    parts = _shares(time.step_parts, time.step_s)
    if parts:
        yield Row("made of", parts)
    gpus = plan.layout.nodes * plan.layout.gpus_per_node
    if time.tokens_per_gpu_s:
        peak = f" of {time.peak_tflops:g} TFLOP/s" if time.peak_tflops else ""
        mfu = f", MFU {time.mfu:.0%}{peak}" if time.mfu is not None else ""
        yield Row("speed", f"{time.tokens_per_gpu_s:,.0f} tokens/s per {'GPU' if gpus else 'node'}{mfu}")
    useful = [] if time.useful_share is None else [f"{time.useful_share:.0%} of what is computed is data"]
    cut = [] if not time.cut_share else [f"{time.cut_share:.1%} of the data is cut off"]
    if useful or cut:
        yield Row("tokens", "; ".join([*useful, *cut]))
    if time.total_h is None:
        yield Row("total", _why(findings, "samples-unknown", "time-not-predicted"))
        return
    gpu_hours = f", {time.gpu_hours:,.1f} GPU-hours on {_number(gpus, 'GPU')}" if gpus and time.gpu_hours is not None else ""
    yield Row("total", f"{_hours(time.total_h)}{gpu_hours}")
    others = {"evaluation": time.evaluation_h, "checkpoints": time.checkpoint_h, "start-up": time.startup_h}
    spent = ", ".join(f"{name} {_hours(hours)}" for name, hours in others.items() if hours and hours * 3600 >= 0.5)
    if spent:
        yield Row("of which", spent)
    yield Row("lives", _lives(time, plan))


def _shares(parts: Mapping[str, float], whole: float) -> str:
    """``matmul 71%, weights 12%``: largest first, without what rounds to nothing."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {part / whole:.0%}" for name, part in ordered if part >= 0.005 * whole > 0)


def _lives(time: Time, plan: Plan) -> str:
    if plan.time_limit_min is None:
        return "one: nothing limits it on this machine"
    if time.continuations is None:
        return "no number of them is enough: none would get further than the one before"
    return f"{time.continuations + 1}: continued {_number(time.continuations, 'time')}" if time.continuations else "one"


def _start(forecast: Forecast, time: Time | None, now: datetime, named: str | None) -> Iterator[Row]:
    """``named``: the partition that was asked for, which needs no repeating."""
    if forecast.refusal is not None:
        yield Row("start", "Slurm would refuse the job, see below", STYLES["warning"])
    elif forecast.start is None:
        yield Row("start", f"no forecast: {forecast.reason}")
    else:
        away_h = (forecast.start - now).total_seconds() / 3600
        when = f"about {_clock(forecast.start)}, in {_hours(away_h)}" if away_h > 1 / 60 else "at once"
        partition = f" in partition {forecast.partition}" if forecast.partition not in (None, named) else ""
        yield Row("start", f"{when}{f', on {forecast.nodes}' if forecast.nodes else ''}{partition} (says Slurm)")
        if time is not None and time.total_h is not None and time.continuations is not None:
            end = _clock(max(forecast.start, now) + timedelta(hours=time.total_h))
            yield Row("end", f"about {end}" if time.continuations == 0 else f"not before {end}: each life queues again")


def _disk(plan: Plan, findings: Sequence[Finding]) -> Iterator[Row]:
    rule = plan.preset["checkpoint"]
    regular = {"epoch": "every epoch", "never": "at the end"}.get(rule["every"])
    if regular is None:
        regular = (
            f"every {rule['every'].replace('%', ' %')} of the steps" if rule["every"].endswith("%") else f"every {rule['every']} steps"
        )
    timed = f" and every {rule['minutes']:g} min" if rule["minutes"] else ""
    stops = f"; each holds training up for {_seconds(plan.time.checkpoint_stop_s)}" if plan.time and plan.time.checkpoint_stop_s else ""
    yield Row("checkpoints", f"{regular}{timed}, and when stopped{stops}")
    if plan.time is not None and plan.time.best_checkpoint_min is not None:
        yield Row("best", _best_interval(plan.time, plan.time.best_checkpoint_min))
    disk = plan.disk
    if disk is None:
        yield Row("size", _why(findings, "model-facts-unknown"))
    else:
        yield Row("size", f"{_gib(disk.checkpoint_gib)} each, {_gib(disk.total_gib)} and {disk.files:,} files for the whole run")


def _best_interval(time: Time, best_min: float) -> str:
    interval = f"every {best_min:.0f} min" if best_min >= 1.5 else f"every {best_min * 60:.0f} s"
    if time.best_loss_share is None:
        return interval
    now = "" if time.expected_loss_share is None else f" instead of {time.expected_loss_share:.1%}"
    return f"{interval}: {time.best_loss_share:.1%} of the time is lost{now}"


def _said(findings: Sequence[Finding], width: int) -> Iterator[Line]:
    """The findings, errors first, and the last line: what would come of a submission."""
    order = list(STYLES)
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        style = STYLES[finding.level]
        level = finding.level.upper() if finding.level == "error" else finding.level
        hint = [f"→ {line}" if first else f"  {line}" for first, line in _numbered(_wrapped(finding.hint or "", width - _LEVEL_WIDTH - 2))]
        for line in [*_wrapped(str(replace(finding, hint=None)), width - _LEVEL_WIDTH), *hint]:
            yield [(level.ljust(_LEVEL_WIDTH), style), (line, "bold" if finding.level == "error" else "")]
            level = ""
    if findings:
        yield []
    text, style = _outcome(findings)
    yield from ([(line, style)] for line in _wrapped(text, width))


def _outcome(findings: Sequence[Finding]) -> tuple[str, str]:
    from launcher.hardware.gates import NOT_EXECUTED_YET

    levels = [finding.level for finding in findings]
    names = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "advice": ("piece of advice", "pieces of advice")}
    counted = ", ".join(_number(levels.count(level), *names[level]) for level in STYLES if level in levels)
    if "error" in levels:
        return f"NOT OK: {counted}", STYLES["error"]
    codes = {finding.code for finding in findings}
    if NOT_EXECUTED_YET in codes:
        return f"ok, but submit refuses what is not executed yet: {counted}", STYLES["warning"]
    if SLURM_REFUSES in codes:
        return f"ok, but Slurm would refuse the job as it is now: {counted}", STYLES["warning"]
    return f"ok{f': {counted}' if counted else ''}", "bold green"


def _why(findings: Iterable[Finding], *codes: str) -> str:
    """Why a prediction is missing, in the words of the first finding about it. ``codes``: what such findings are called."""
    for finding in findings:
        if finding.code in codes:
            return f"unknown: {finding.message}"
    return "not predicted for this plan"


def _wrapped(text: str, width: int) -> list[str]:
    """Whole words, so that a path or a key can be copied even where it is longer than the line."""
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def _numbered(lines: Sequence[str]) -> list[tuple[bool, str]]:
    return [(index == 0, line) for index, line in enumerate(lines)]


def _number(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1.5 else f"{hours:,.1f} h"


def _gib(gib: float) -> str:
    return f"{gib * 1024:.1f} MiB" if gib < 0.1 else f"{gib:,.1f} GiB"


def _clock(moment: datetime) -> str:
    return f"{moment:%a} {moment.day} {moment:%b %H:%M}"
