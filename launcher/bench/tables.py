"""Rows → Markdown, CSV and JSON: the source's tables and what they lack. Pure. What was not measured is a word, never a guess."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.bench.cell import Row, to_json
from launcher.bench.lengths import CodeLengths
from launcher.bench.sweep import Contest, Effort
from launcher.plan import Plan
from launcher.preset.model import ModelFacts

FORMULA = "(6·N + 12·L·d·S) × tokens/s ÷ dense peak, S the computed tokens of a sample"

ATTENTION = {"eager": "Default (eager)", "xformers": "Xformer Attention", "flash2": "Flash Attention 2", "flash3": "Flash Attention 3"}
"""The source's names for them."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a page have in common."""

    title: str
    command: str
    """That made it, as one types it."""
    plan: Plan
    """Of the preset, for what the cells do not vary."""
    facts: ModelFacts | None
    effort: Effort
    lengths: CodeLengths
    machine: str
    """CPUs and RAM of the machine, and what else there is to know about it."""
    made: str
    """Day, UTC."""


def markdown(setting: Setting, rows: Sequence[Row], contests: Sequence[Contest] = ()) -> str:
    """One page: what was measured on what, then a table for each question that the source asks."""
    parts = [f"# {setting.title}", *_head(setting, rows, contests)]
    if rows:
        parts += _configurations(rows) + _attention(rows) + _adapters(rows) + _everything(rows)
    if contests:
        parts += _contests(contests)
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a cell, with every field of it and of its row."""
    out = io.StringIO()
    flat = [_flat(to_json(row)) for row in rows]
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def as_json(setting: Setting, rows: Sequence[Row], contests: Sequence[Contest] = ()) -> dict[str, Any]:
    plan = setting.plan
    return {
        "preset": plan.name,
        "command": setting.command,
        "made": setting.made,
        "machine": setting.machine,
        "hardware": plan.hardware["name"],
        "gpu": (plan.hardware.get("gpu") or {}).get("kind"),
        "gpus": plan.layout.gpus_per_node,
        "stack": plan.stack.get("name"),
        "dtype": plan.preset["training"]["dtype"],
        "optimizer": plan.preset["training"]["optimizer"],
        "packing": plan.preset["data"]["packing"],
        "parallelism": plan.preset["parallelism"],
        "effective_batch": plan.batch.effective_batch,
        "warm_up_steps": setting.effort.warm_up,
        "steps": setting.effort.steps,
        "mfu_formula": FORMULA,
        "peak_tflops": None if plan.time is None else plan.time.peak_tflops,
        "lengths": {"what": setting.lengths.what, "how": setting.lengths.how},
        "rows": [to_json(row) for row in rows],
        "against": [asdict(contest) for contest in contests],
    }


def fastest(rows: Iterable[Row]) -> Row | None:
    """Most useful tokens per second among rows that train the same."""
    measured = [row for row in rows if row.useful_tokens_per_s is not None]
    return max(measured, key=lambda row: row.useful_tokens_per_s or 0.0, default=None)


def _head(setting: Setting, rows: Sequence[Row], contests: Sequence[Contest]) -> list[str]:
    plan, training = setting.plan, setting.plan.preset["training"]
    seen: Row | Contest | None = next((row for row in rows if row.device), None) or next((one for one in contests if one.device), None)
    model = plan.preset["model"]["name"] or plan.preset["model"]["path"] or "the preset's config"
    size = "" if setting.facts is None else f", {setting.facts.parameters / 1e6:,.0f} M parameters"
    weights = "its own weights" if plan.preset["model"]["path"] else "random weights (the speed does not depend on them)"
    gpus = plan.layout.gpus_per_node
    lines = [
        f"- Made by `{setting.command}` on {setting.made}.",
        f"- Hardware: {f'{gpus} × ' if gpus else ''}{seen.device if seen else 'not seen: nothing was measured'}; {setting.machine}.",
        f"- Software: {_versions(seen.versions if seen else None)}.",
        f"- Model: {model}{size}, {weights}.",
        f"- Training: {training['dtype']}{', tf32' if training['tf32'] else ''}, {training['optimizer']}, cross-entropy "
        f"{training['cross_entropy']}, {plan.preset['parallelism']}, packing {plan.preset['data']['packing']}, "
        f"{plan.batch.effective_batch} samples a step.",
        f"- Lengths of the samples: {setting.lengths.what} ({setting.lengths.how}), cut at the sequence length, dealt out evenly over the "
        "steps; the tokens are random.",
        f"- Time: median of {setting.effort.steps} optimizer steps (lowest to highest), {setting.effort.warm_up} before them not counted; "
        "each configuration in a process of its own. Useful tokens are targets; raw ones are all that is computed, pads included.",
        f"- MFU: {FORMULA}" + (f" ({plan.time.peak_tflops:g} TFLOP/s)." if plan.time and plan.time.peak_tflops else "; none on CPU."),
        "- Memory: the most that torch had reserved on a GPU, beside what `check` predicts."
        if gpus
        else "- Memory: the peak resident memory of the process, beside what `check` predicts for a node.",
    ]
    return ["\n".join(lines)]


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {number}" for name, number in (versions or {}).items()) or "not seen"


def _configurations(rows: Sequence[Row]) -> list[str]:
    """The source's first tables: checkpointing, accumulation × micro batch."""
    parts = ["## Effect of the training configuration"]
    for group in _groups(rows, lambda row: (row.cell.sequence_length, row.cell.attention, row.cell.adapter)).values():
        cell = group[0].cell
        parts.append(f"### {_attention_name(cell.attention)}, {cell.sequence_length} tokens, adapter {cell.adapter}")
        parts.append(_table(group, [*_CONFIGURATION, *_FIGURES]))
    return parts


def _attention(rows: Sequence[Row]) -> list[str]:
    """The source's second ones: each kind of attention with the configuration that is fastest for it."""
    parts = ["## Effect of attention implementations", "Each with the configuration that is fastest for it."]
    for (length, adapter), group in _groups(rows, lambda row: (row.cell.sequence_length, row.cell.adapter)).items():
        best = [_best_or_why(kind) for kind in _groups(group, lambda row: row.cell.attention).values()]
        parts.append(f"### Sequence length {length}, adapter {adapter}")
        parts.append(
            _table(best, [("Attention Implementation", lambda row: _attention_name(row.cell.attention)), *_CONFIGURATION, *_FIGURES])
        )
    return parts


def _adapters(rows: Sequence[Row]) -> list[str]:
    """The source's third: all weights or an adapter."""
    if len({row.cell.adapter for row in rows}) < 2:
        return []
    parts = ["## Effect of PEFT approaches", "Each with the attention and the configuration that are fastest for it."]
    for length, group in _groups(rows, lambda row: row.cell.sequence_length).items():
        best = [_best_or_why(kind) for kind in _groups(group, lambda row: row.cell.adapter).values()]
        columns = [("Peft", _peft), ("Attention", lambda row: _attention_name(row.cell.attention)), *_CONFIGURATION, *_FIGURES]
        parts += [f"### {length} tokens", _table(best, columns)]
    return parts


def _everything(rows: Sequence[Row]) -> list[str]:
    columns = [
        ("Tokens", lambda row: str(row.cell.sequence_length)),
        ("Attention", lambda row: row.cell.attention),
        ("Adapter", lambda row: row.cell.adapter),
        *_CONFIGURATION,
        ("Time per Iteration", _seconds_and_spread),
        ("predicted", lambda row: _number(row.predicted_step_s, "s")),
        ("samples/s", lambda row: _number(row.samples_per_s)),
        ("raw tokens/s", lambda row: _count(row.tokens_per_s)),
        ("useful tokens/s", lambda row: _count(row.useful_tokens_per_s)),
        ("useful share", lambda row: _share(row.useful_share)),
        ("MFU", lambda row: _share(row.mfu)),
        ("memory, GiB", lambda row: _number(row.memory_gib)),
        ("of it tensors", lambda row: _number(row.allocated_gib)),
        ("predicted", lambda row: _number(row.predicted_memory_gib)),
        ("trained", lambda row: _share(row.trainable_share, 3)),
    ]
    return ["## Every configuration", "Rates are per GPU (on CPU: per machine), samples those of all GPUs.", _table(rows, columns)]


def _contests(contests: Sequence[Contest]) -> list[str]:
    turns = "; the contenders take turns, a step each, so that other load hits all alike" if contests[0].interleaved else ""
    parts = [
        "## Against what people run instead",
        f"Useful tokens per second, ours over theirs, in the same session, on the same model, samples and machine{turns}. `trainer`: "
        "transformers' Trainer, padded, the same dtype, optimizer and micro batch. `memtune`: memtune's recipe, padded, fp32, Adafactor, "
        "micro batches of at most 8. The bound is 1 ÷ the share of a padded batch that is no pad: what leaving out pads can give where the "
        "time goes with the tokens; less attention over shorter rows can give more. Where the machine is shared, the CPU time of the "
        "processes, one thread each, says more than the clock.",
    ]
    names = ["Tokens", "against", "ratio by CPU time", "ratio by the clock (lowest to highest)", "bound", "ratio ÷ bound", "goal"]
    names += ["ours, s a step", "theirs, s a step", "their micro batch"]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for one in contests:
        cells = [str(one.cell.sequence_length), one.rival]
        if one.ratio is None or one.bound is None:
            cells += [f"{one.outcome}: {one.reason}".replace("|", "/"), *["–"] * (len(names) - 3)]
        else:
            ratio = one.cpu_ratio or one.ratio
            goals = {"≥ 0.9 of the bound": ratio >= 0.9 * one.bound}
            if one.bound >= 1 / 0.6:
                goals["≥ 1.5×"] = ratio >= 1.5
            cells += [
                "–" if one.cpu_ratio is None else f"**{one.cpu_ratio:.2f}×**",
                f"{one.ratio:.2f}× ({one.ratio_lowest:.2f} to {one.ratio_highest:.2f})",
                f"{one.bound:.2f}×",
                f"{ratio / one.bound:.2f}",
                ", ".join(f"{goal}: {'reached' if met else 'missed'}" for goal, met in goals.items()),
                f"{one.ours_step_s:.3g}",
                f"{one.rival_step_s:.3g}",
                str(one.micro_batch),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*parts, "\n".join(lines)]


Column = tuple[str, Callable[[Row], str]]


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [" | ".join(name for name, _ in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(text(row).replace("|", "/") for _, text in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _best_or_why(rows: Sequence[Row]) -> Row:
    return fastest(rows) or rows[0]


def _seconds(row: Row) -> str:
    if row.step_s is not None:
        return f"{row.step_s:.3g}s"
    if row.outcome == "skipped":
        return row.reason if row.reason.startswith("does not fit") else f"not measured: {row.reason}"
    return row.outcome if row.outcome == "out of memory" else f"failed: {row.reason}"


def _seconds_and_spread(row: Row) -> str:
    if row.step_s is None:
        return _seconds(row)
    return f"{row.step_s:.3g}s ({row.step_s_lowest:.3g} to {row.step_s_highest:.3g})"


def _peft(row: Row) -> str:
    if row.cell.adapter == "none":
        return "None"
    share = "" if row.trainable_share is None else f" ({100 * row.trainable_share:.2g}% trainable parameters)"
    return f"{ {'lora': 'LoRA', 'rslora': 'rsLoRA', 'dora': 'DoRA', 'qlora': 'QLoRA'}.get(row.cell.adapter, row.cell.adapter) }{share}"


def _attention_name(attention: str) -> str:
    return ATTENTION.get(attention, attention)


def _number(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.3g}{unit}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}".replace(",", " ")


def _share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    cell, rest = value["cell"], {name: entry for name, entry in value.items() if name not in ("cell", "versions")}
    return {**cell, **rest, **{f"version_{name}": number for name, number in value["versions"].items()}}


_CONFIGURATION: list[Column] = [
    ("Gradient Checkpointing", lambda row: {"none": "False", "full": "True"}.get(row.cell.checkpointing, row.cell.checkpointing)),
    ("Gradient Accumulation Steps", lambda row: str(row.gradient_accumulation or "–")),
    ("Per Device Train Batch Size", lambda row: str(row.cell.micro_batch)),
]
_FIGURES: list[Column] = [
    ("Time per Iteration", _seconds),
    ("useful tokens/s", lambda row: _count(row.useful_tokens_per_s)),
    ("MFU", lambda row: _share(row.mfu)),
    ("memory, GiB", lambda row: _number(row.memory_gib)),
    ("predicted", lambda row: _number(row.predicted_memory_gib)),
]
