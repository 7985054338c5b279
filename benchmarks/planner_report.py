"""Write docs/planner.md: what the planner predicts against what was measured and published, every row, worst first.

python -m benchmarks.planner_report [--print]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.fit_efficiency import CONSTANTS, in_use
from benchmarks.memory_cases import case_of, facts_of, preset_of, stack_of, surroundings
from benchmarks.published import FitFact, Row, fit_facts, rows
from launcher.hardware import step
from launcher.hardware.flops import flops_per_token
from launcher.hardware.memory import GIB, fullest_moment
from launcher.hardware.step import peak_dtype
from launcher.plan import Batch, Container, Memory
from launcher.planner import make_plan
from launcher.preset.reading import model_facts, read_hardware, read_model_facts, read_preset, read_site, read_stack
from launcher.remedies import changed

REPOSITORY = Path(__file__).parent.parent
OUT = REPOSITORY / "docs" / "planner.md"
RESULTS = Path(__file__).parent / "results"
SOURCES = ("fastcode", "memtune")


def text() -> str:
    return "\n".join([*_head(), *_memory(), *_fits(), *_time(), *_constants(), *_variants(), *_h200(), *_formulas(), ""])


def _head() -> Iterator[str]:
    yield "# What the planner predicts, and what is known"
    yield ""
    yield "Made by `python -m benchmarks.planner_report`; do not edit. Deviations are predicted ÷ known − 1, the worst row comes first."


def _memory() -> Iterator[str]:
    """``results/memory-*.json`` as ``memory_fake`` writes them: versions, machine, and rows with a case and the peak of torch's tensors."""
    yield from ("", "## Memory", "")
    files = sorted(RESULTS.glob("memory-*.json"))
    if not files:
        yield "Not measured."
    for file in files:
        content = json.loads(file.read_text())
        found = [(str(row["name"]), row["peak_bytes"] / GIB, _predicted_gib(row["case"])) for row in content["rows"]]
        found.sort(key=lambda row: -abs(row[2] / row[1] - 1))
        over, under = max(row[2] / row[1] - 1 for row in found), min(row[2] / row[1] - 1 for row in found)
        yield f"`{file.name}`: {len(found)} peaks of torch's tensors on one GPU; predicted between {_d(under)} and {_d(over)}."
        yield ", ".join(f"{name} {value}" for part in ("versions", "machine") for name, value in content[part].items()) + "."
        yield ""
        head = ("configuration", "measured GiB", "predicted GiB", "deviation")
        yield from _table(head, ((name, _n(measured), _n(predicted), _d(predicted / measured - 1)) for name, measured, predicted in found))
        yield ""


def _fits() -> Iterator[str]:
    yield from (
        "",
        "## What fits",
        "",
        "Largest share of the GPU's usable memory first; a plan fits when it takes no more than all of it.",
        "",
    )
    found = sorted(((fact, _memory_of(fact)) for fact in fit_facts()), key=lambda item: -item[1].per_gpu_gib / item[1].available_gib)
    yield from _table(
        ("GPU, length: what was tried", "published", "predicted", "predicted GiB", "usable GiB", "share"),
        (
            (fact.name, _ran(fact.fits), _ran(memory.fits), _n(memory.per_gpu_gib), _n(memory.available_gib),
             f"{memory.per_gpu_gib / memory.available_gib:.0%}")
            for fact, memory in found
        ),
    )  # fmt: skip
    right = sum(fact.fits is memory.fits for fact, memory in found)
    yield from ("", f"{right} of {len(found)} as published.")


def _memory_of(fact: FitFact) -> Memory:
    preset = changed(read_preset(fact.preset).value, {f"training.{key}": value for key, value in fact.training.items()})
    assert preset is not None and isinstance(preset.stack, str)
    site, hardware = read_site("slurm").value, read_hardware(preset.hardware).value
    plan, _ = make_plan(
        preset, hardware, site, read_stack(preset.stack).value, container=Container("none"), model_facts=model_facts(preset)
    )
    assert plan.memory is not None
    return plan.memory


def _ran(fits: bool) -> str:
    return "fits" if fits else "does not"


def _predicted_gib(value: dict[str, Any]) -> float:
    case = case_of(value)
    node, layout, batch = surroundings(case)
    return fullest_moment(preset_of(case), facts_of(case), node, layout, batch, case.attention, stack_of(case)).total / GIB


def _time() -> Iterator[str]:
    found = sorted(rows(), key=lambda row: -abs(row.deviation()))
    own = [row for row in found if row.source in SOURCES]
    fitting = [row for row in found if row.use == "fit"]
    yield from ("", "## Time", "")
    yield (
        f"{len(found)} published rows, {len(own)} of them of the two sources (FastCode, memtune); {len(fitting)} were used for fitting "
        f"{len(CONSTANTS)} constants, {len(found) - len(fitting)} were held out. Worst of the two sources: {_d(own[0].deviation())} "
        f"({own[0].name}), worst held out of all: {_d(next(row for row in found if row.use == 'test').deviation())}."
    )
    yield ""
    yield f"Fitted on: {', '.join(sorted(row.name for row in fitting))}."
    yield ""
    yield from _table(
        (
            "row",
            "GPUs",
            "S",
            "dtype, attention, checkpointing",
            "steps × micro batch",
            "MFU",
            "published s",
            "predicted s",
            "deviation",
            "use",
        ),
        (
            (
                row.name,
                f"{row.layout.gpus_per_node} × {row.preset.hardware}",
                str(row.preset.training.sequence_length),
                f"{row.preset.training.dtype}, {row.attention}, {row.preset.training.activation_checkpointing}",
                f"{row.batch.micro_steps} × {row.batch.micro_batch}",
                f"{_mfu(row, row.published_s):.1%}",
                _n(row.published_s),
                _n(row.parts().total_s),
                _d(row.deviation()),
                row.use,
            )
            for row in found
        ),
    )
    yield ""
    yield "MFU: of the published seconds, (6·N + 12·L·d·S) ÷ the dense peak of the dtype that is trained in."
    notes = [row for row in found if row.notes]
    if notes:
        yield from ("", *(f"- {row.name}: {row.notes}" for row in notes))
    yield from ("", "Where the predicted seconds go:", "")
    names = ("matmul", "attention", "elementwise", "weights", "launch", "communication", "optimizer")
    yield from _table(("row", *names), ((row.name, *(_n(getattr(row.parts(), name)) for name in names)) for row in found))


def _mfu(row: Row, seconds: float) -> float:
    gpu = row.hardware.gpu
    assert gpu is not None
    tokens = row.batch.effective_batch * row.preset.training.sequence_length
    flops = flops_per_token(row.facts, row.preset.training.sequence_length) * tokens
    return flops / seconds / (row.layout.gpus_per_node * gpu.peak_tflops[peak_dtype(row.preset, gpu)] * 1e12)


def _constants() -> Iterator[str]:
    yield from ("", "## Constants", "")
    yield from ("Fitted by `python -m benchmarks.fit_efficiency`, which prints them and fails when others are in use:", "")
    values = in_use()
    yield from _table(("constant", "value", "where"), ((c.name, f"{values[c.name]:g}", c.where) for c in CONSTANTS))
    yield from ("", "Set by hand, not fitted (reasons in `launcher/hardware/step.py`); they were chosen with the rows above in view:", "")
    flash, link, optimizer = step.FLASH_ATTENTION, step.LINK, step.OPTIMIZER_BYTES
    yield from _table(
        ("constant", "value"),
        (
            ("attention of FlashAttention 2 and 3, over matrix products", f"{flash['flash2']:g}, {flash['flash3']:g}"),
            ("memory-efficient attention in fp32, over matrix products", f"{step.FP32_ATTENTION:g}"),
            ("share of the memory bandwidth", f"{step.BANDWIDTH:g}"),
            ("share of the link: NVLink, PCIe", f"{link['nvlink']:g}, {link['pcie']:g}"),
            ("least share of communication that is not hidden", f"{step.EXPOSED:g}"),
            ("bytes a parameter: AdamW, Adafactor", f"{optimizer['adamw']:g}, {optimizer['adafactor']:g}"),
            ("launches with LoRA, over those without", f"{step.LAUNCH_LORA:g}"),
        ),
    )
    yield from ("", "Bytes of elementwise kernels and of eager attention's scores are counted from the models' operations (`flops.py`).")


def _variants() -> Iterator[str]:
    """What reaches 3.2 s: FastCode's step on 8 A100, one change after the other."""
    yield from ("", "## 8 × A100, santacoder, S = 2048: what reaches 3.2 s a step", "")
    yield "FastCode's best is 3.6 s with flash attention, the first line. Each further line adds to the one before."
    yield ""
    lines = [("A100-40, flash2, accumulation 16 × micro batch 2, DDP under autocast", _named("fastcode-a100-2048-flash"))]
    lines.append(("8 × 4", replace(lines[-1][1], batch=Batch(256, (32,) * 8, 4, 8))))
    lines.append(("fused cross-entropy", _changed(lines[-1][1], training={"cross_entropy": "fused"})))
    lines.append(("ZeRO-2 in the place of DDP: the residual stream in half precision", _changed(lines[-1][1], parallelism="zero2")))
    lines.append(("A100-80", replace(lines[-1][1], hardware=read_hardware("a100-80gb").value)))
    lines.append(("4 × 8", replace(lines[-1][1], batch=Batch(256, (32,) * 8, 8, 4))))
    timed = [(name, row, row.parts().total_s) for name, row in lines]
    yield from _table(
        ("variant", "predicted s", "3.2 s", "MFU"),
        ((name, _n(seconds), "reached" if seconds <= 3.2 else "not reached", f"{_mfu(row, seconds):.1%}") for name, row, seconds in timed),
    )
    yield ""
    yield "Whether a variant fits its GPU is the memory model's to say."


def _h200() -> Iterator[str]:
    """The goals for one H200, before anybody has measured one."""
    yield from ("", "## One H200, S = 2048: predicted, measured by nobody yet", "")
    yield "Full fine-tuning of packed samples, sdpa, 8 × 4, AdamW; 15B: Adafactor, weights in bf16. Goal: MFU 45 %, 15B 40 %."
    yield ""
    lines = []
    for model in ("gpt_bigcode-santacoder", "starcoder2-3b", "starcoder2-7b", "starcoder2-15b"):
        pure = {"dtype": "bf16_pure", "optimizer": "adafactor"} if model.endswith("15b") else {}
        row = _changed(_named("fastcode-a100-2048-flash"), training=pure, parallelism="single", gpus=1, attention="sdpa")
        row = replace(row, facts=read_model_facts(model).value, hardware=read_hardware("h200").value, attention="sdpa")
        row = replace(row, layout=replace(row.layout, gpus_per_node=1, ranks_per_node=1), batch=Batch(32, (32,), 4, 8))
        lines.append((model, row, row.parts().total_s))
    yield from _table(
        ("model", "dtype", "predicted s", "tokens/s", "MFU"),
        ((name, row.preset.training.dtype, _n(s), f"{32 * 2048 / s:,.0f}", f"{_mfu(row, s):.1%}") for name, row, s in lines),
    )


def _named(name: str) -> Row:
    return next(row for row in rows() if row.name == name)


def _changed(row: Row, **changes: Any) -> Row:
    value = row.preset.model_dump()
    for name, change in changes.items():
        value[name] = {**value[name], **change} if isinstance(change, dict) else change
    return replace(row, preset=type(row.preset).model_validate(value))


def _formulas() -> Iterator[str]:
    yield from ("", "## Formulas", "")
    for module in (step,):
        yield "```"
        yield (module.__doc__ or "").strip()
        yield "```"


def _table(head: tuple[str, ...], body: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for line in body:
        yield "| " + " | ".join(line) + " |"


def _n(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _d(value: float) -> str:
    return f"{value:+.1%}"


def main() -> None:
    if "--print" in sys.argv[1:]:
        print(text())
        return
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text(), encoding="utf-8")
    print(f"wrote {OUT.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
