"""The bench command: a sweep, or a contest against a plain Trainer, here or in a job; tables on disk, the fastest on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launcher.cli import options
from launcher.cli.show import out, say, show_json, show_rows
from launcher.errors import ActionError, UsageError

if TYPE_CHECKING:
    from launcher.bench.cell import Cell, Row
    from launcher.bench.grid import Axes
    from launcher.bench.sweep import Contest, Effort
    from launcher.bench.tables import Setting
    from launcher.cli.line import Line

JOB_TIME = "2h"
"""Walltime of the job where ``--time`` says none: the preset's own is that of a whole run. What is left over the next one measures."""


def bench(
    preset: options.Preset,
    site: options.Site = None,
    settings: options.Settings = None,
    use_flash_attn: options.UseFlashAttn = False,
    use_xformer_attn: options.UseXformerAttn = False,
    attention: Annotated[
        str | None, typer.Option(help="Kinds with commas between; sdpa:flash, sdpa:efficient, sdpa:math name a backend.")
    ] = None,
    checkpointing: Annotated[str | None, typer.Option(help="none, full, …")] = None,
    adapter: Annotated[str | None, typer.Option(help="none, lora, qlora, …")] = None,
    micro_batch: Annotated[
        str | None, typer.Option(help="Numbers. Default: the largest that fits, half of it, and the first that does not.")
    ] = None,
    sequence_length: Annotated[str | None, typer.Option(help="Numbers. Default: 1024,2048,4096 on a GPU, the preset's on CPU.")] = None,
    against: Annotated[str | None, typer.Option(metavar="trainer", help="Instead: race a plain Trainer and memtune's recipe.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that are measured.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Optimizer steps before them.")] = 2,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Results; those that lie there are kept. Default: bench/NAME.")
    ] = None,
    on: options.On = None,
    allow: options.Allow = None,
    as_json: options.Json = False,
    account: options.Account = None,
    partition: options.Partition = None,
    qos: options.Qos = None,
    time: options.Time = None,
    constraint: options.Constraint = None,
    reservation: options.Reservation = None,
    gpus: options.Gpus = None,
) -> None:
    """Measure attention × checkpointing × micro batch × adapter × sequence length; tables, and the fastest as a line for submit."""
    from launcher.bench.sweep import Effort
    from launcher.cli.line import Wish, read

    asked = options.sbatch(account, partition, qos, time, constraint, reservation, None, gpus)
    changes = options.with_attention(settings, use_flash_attn=use_flash_attn, use_xformer_attn=use_xformer_attn)
    line = read(Wish(preset, site, tuple(changes), asked, tuple(allow or ())))
    if attention is None and (use_flash_attn or use_xformer_attn):
        attention = line.preset.value.attention  # that kind alone
    if against not in (None, "trainer"):
        raise UsageError(f"--against takes trainer, not {against!r}", key="--against")
    axes = _axes(line, attention, checkpointing, adapter, micro_batch, sequence_length, alone=against is not None)
    target = (folder or Path("bench") / line.preset.value.name).absolute()
    effort = Effort(warm_up, steps)
    if _place(line, on) == "slurm":
        _submit(line, axes, target, against, effort, typed_time=time, as_json=as_json)
        return
    setting, rows, contests = measured(line, axes, target, against, effort)
    _show(line, setting, rows, contests, _page(target, against), as_json=as_json)
    results: list[Row | Contest] = [*rows, *contests]
    if not any(result.outcome == "measured" for result in results):
        raise ActionError(f"nothing could be measured: {results[0].reason}", code="nothing-measured", file=str(_page(target, against)))


def measured(line: Line, axes: Axes, folder: Path, against: str | None, effort: Effort) -> tuple[Setting, list[Row], list[Contest]]:
    """Plan, make model and data, measure, and write ``bench.md``, ``bench.csv``, ``bench.json`` and ``rows.jsonl`` into ``folder``.

    The page names this process's command. Errors: as the parts raise.
    """
    import os
    import shlex
    import sys
    from dataclasses import asdict
    from datetime import datetime, timezone

    from launcher.bench import grid, tables
    from launcher.bench.lengths import code_lengths, cut_counts
    from launcher.bench.model import config_for, folder_name
    from launcher.bench.sweep import contend_all, material_folder, measure_all
    from launcher.bench.work import Workshop, require_material
    from launcher.cli.line import container_of
    from launcher.cli.replan import replanner
    from launcher.files import digest, write_json, write_text
    from launcher.hardware.fits import UNOBSERVED
    from launcher.plan import Staged

    preset, facts = line.preset.value, line.facts
    if facts is None:
        hint = "a file of its shapes in ~/.config/ftlaunch/models, or model.path with its config.json"
        raise UsageError("no facts of this model: a random one cannot be made", code="model-facts-unknown", key="model", hint=hint)
    container, packing, lengths = container_of(line), preset.data.packing, code_lengths()
    config = None if preset.model.path is not None else config_for(preset, facts)
    model = Path(preset.model.path) if config is None else line.folders.data.absolute() / "bench" / folder_name(config)  # type: ignore[arg-type]

    steps, per_step = effort.warm_up + effort.steps, preset.training.effective_batch
    wish = {"steps": steps, "samples_per_step": per_step, "packing": packing, "seed": preset.training.seed, "vocabulary": facts.vocab}

    def wish_of(length: int) -> dict[str, Any]:
        return {**wish, "sequence_length": length}

    def replan(cell: Cell) -> grid.Replan:
        counts = cut_counts(lengths, cell.sequence_length) if packing != "concatenate" else []
        data = str(material_folder(folder, wish_of(cell.sequence_length)))
        staged = Staged(str(model), data, steps * per_step, 0, 0, "", length_bin_tokens=lengths.bin_tokens, length_counts=counts)
        return replanner(line, container, staged, UNOBSERVED)

    cells = grid.candidates(axes, preset, replan)
    candidates = list(cells if against is None else grid.contenders(cells))
    usable = [candidate for candidate in candidates if not candidate.refusal]
    base = next((candidate.plan for candidate in [*usable, *candidates] if candidate.plan is not None), None)
    if base is None:
        raise UsageError(f"no cell makes sense: {candidates[0].refusal}", code="no-cell")
    folder.mkdir(parents=True, exist_ok=True)
    shop = Workshop(folder, container, sys.executable, os.environ, (model if config is None else model.parent,))
    started = datetime.now(timezone.utc)
    machine = _machine()
    rows: list[Row] = []
    contests: list[Contest] = []
    if usable:
        model.parent.mkdir(parents=True, exist_ok=True)
        say(f"{len(candidates)} configurations, {len(usable)} to measure, into {folder}")
        wishes = [wish_of(length) for length in dict.fromkeys(candidate.cell.sequence_length for candidate in usable)]
        request = {"config": config, "model": str(model), "data": {str(material_folder(folder, one)): one for one in wishes}}
        require_material(shop.run("material", "material", request, gpus=preset.gpus), folder / "cells" / "material" / "rank-0.log")
    if against is None:
        common = {"preset": preset.model_dump(mode="json"), "hardware": base.hardware, "stack": base.stack, "effort": asdict(effort)}
        rows = measure_all(candidates, shop, facts, effort, digest(common)[:12], say)
    else:
        contests = contend_all(candidates, shop, effort, say)
    setting = tables.Setting(
        title=f"{preset.name}: {'against a plain Trainer' if against else 'measured'}",
        command=shlex.join(["ftlaunch", *_without_place(sys.argv[1:])]),
        plan=base,
        facts=facts,
        effort=effort,
        lengths=lengths,
        machine=machine,
        made=started.strftime("%Y-%m-%d"),
    )
    page = _page(folder, against)
    write_text(page, tables.markdown(setting, rows, contests), mode=0o644)
    write_json(page.with_suffix(".json"), tables.as_json(setting, rows, contests), mode=0o644)
    if rows:
        write_text(page.with_suffix(".csv"), tables.as_csv(rows), mode=0o644)
    return setting, rows, contests


def _page(folder: Path, against: str | None) -> Path:
    """The tables that a person reads; those for programs have its name too."""
    return folder / ("bench.md" if against is None else "against.md")


def _axes(
    line: Line,
    attention: str | None,
    checkpointing: str | None,
    adapter: str | None,
    micro_batch: str | None,
    sequence_length: str | None,
    *,
    alone: bool,
) -> Axes:
    """What is swept; ``alone``: the preset as it is, where nothing else was typed."""
    from dataclasses import replace
    from typing import get_args

    from launcher.bench.cell import BACKENDS
    from launcher.bench.grid import Axes, default_axes
    from launcher.preset.schema import Attention, Lora, Training

    preset = line.preset.value
    kinds = None if line.stack is None else line.stack.value.attention
    axes = default_axes(preset, None if line.facts is None else line.facts.context, kinds)
    if alone:
        wanted, length = preset.training.micro_batch, preset.training.sequence_length
        size = (1,) if wanted == "auto" else (wanted,)
        axes = Axes((length,), axes.attention[:1], (preset.training.activation_checkpointing,), axes.adapter[:1], size)
    words = {"attention": attention, "checkpointing": checkpointing, "adapter": adapter}
    numbers = {"micro_batch": micro_batch, "sequence_length": sequence_length}
    typed: dict[str, Any] = {name: _words(text, f"--{name}") for name, text in words.items() if text is not None}
    typed |= {name: _numbers(text, "--" + name.replace("_", "-")) for name, text in numbers.items() if text is not None}
    kinds_of = {
        "attention": [kind for kind in get_args(Attention) if kind != "auto"] + [f"sdpa:{name}" for name in BACKENDS],
        "checkpointing": get_args(Training.model_fields["activation_checkpointing"].annotation),
        "adapter": ["none", *get_args(Lora.model_fields["kind"].annotation)],
    }
    for name, known in kinds_of.items():
        for word in typed.get(name, ()):
            if word not in known:
                raise UsageError(f"{word!r} is not one of {', '.join(known)}", key=f"--{name}")
    return replace(axes, **typed)


def _words(text: str, option: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(word for word in text.split(",") if word))
    if not found:
        raise UsageError("names nothing", key=option)
    return found


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(word) for word in _words(text, option)))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise UsageError(f"{text!r}: whole numbers above zero, with commas between", key=option)
    return found


def _place(line: Line, on: str | None) -> Literal["here", "slurm"]:
    if on not in (None, "here", "slurm"):
        raise UsageError(f"{on!r} is no place", code="unknown-place", key="--on", hint="here or slurm")
    if on == "slurm" and line.site.value.scheduler == "none":
        raise UsageError(f"site {line.site.value.name} has no scheduler", code="no-scheduler", key="--on", hint="--on here, or --site")
    wanted = on or ("slurm" if line.site.value.scheduler == "slurm" else "here")
    return "slurm" if wanted == "slurm" else "here"


def _submit(line: Line, axes: Axes, folder: Path, against: str | None, effort: Effort, *, typed_time: str | None, as_json: bool) -> None:
    """One job that runs this command there."""
    import os
    import sys
    from dataclasses import replace

    from launcher.bench.job import bench_script
    from launcher.cli.line import planned, read, refuse
    from launcher.slurm.command import Command, submit_command
    from launcher.slurm.tools import find_tools

    tools = find_tools()
    wish = line.wish
    if typed_time is None:
        line = read(replace(wish, options={**(wish.options or {}), "time": JOB_TIME}))
    plan, findings = planned(line)
    refuse([finding for finding in findings if finding.code in ("account-missing", "partition-missing", "unknown-partition")])
    words = ["bench", str(line.preset.file.absolute()), "--site", str(line.site.file.absolute()), "--on", "here", "--out", str(folder)]
    words += [word for setting in wish.settings for word in ("--set", setting)]
    words += [word for gate in wish.allowed for word in ("--allow", gate)]
    words += ["--attention", ",".join(axes.attention), "--checkpointing", ",".join(axes.checkpointing), "--adapter", ",".join(axes.adapter)]
    words += ["--sequence-length", ",".join(map(str, axes.sequence_length))]
    words += [] if axes.micro_batch is None else ["--micro-batch", ",".join(map(str, axes.micro_batch))]
    words += ["--steps", str(effort.steps), "--warm-up", str(effort.warm_up)]
    words += [] if against is None else ["--against", against]
    words += [
        word for name, value in (wish.options or {}).items() if value is not None and name != "time" for word in (f"--{name}", str(value))
    ]
    command = Command("ftlaunch-bench", tuple(words), folder)
    kept = {name: os.environ[name] for name in ("FTLAUNCH_RUNS", "FTLAUNCH_IMAGES", "FTLAUNCH_DATA") if os.environ.get(name)}
    job = submit_command(command, bench_script(command, plan, python=sys.executable, kept=kept), tools["sbatch"])
    if as_json:
        show_json({"ok": True, "job_id": job, "log": str(command.log), "folder": str(folder)})
    else:
        out().print(f"job {job}, log {command.log}; the tables will be in {folder}", markup=False)


def _show(line: Line, setting: Setting, rows: list[Row], contests: list[Contest], page: Path, *, as_json: bool) -> None:
    from launcher.bench.tables import as_json as document

    best = _fastest(line, rows)
    if as_json:
        value = document(setting, rows, contests)
        show_json(
            {"ok": True, "folder": str(page.parent), **value, "fastest": [{"cell": row.cell.name, "submit": text} for row, text in best]}
        )
        return
    if contests:
        show_rows(
            ("tokens", "against", "times theirs", "by CPU time", "bound", ""),
            [
                (
                    one.cell.sequence_length,
                    one.rival,
                    *(value and f"{value:.2f}" for value in (one.ratio, one.cpu_ratio, one.bound)),
                    one.reason,
                )
                for one in contests
            ],
        )
    for row, text in best:
        out().print(
            f"\nfastest with {row.cell.sequence_length} tokens and adapter {row.cell.adapter}: {row.step_s:.3g} s a step", markup=False
        )
        out().print(text, markup=False)
    out().print(f"\ntables: {page}", markup=False)


def _fastest(line: Line, rows: list[Row]) -> list[tuple[Row, str]]:
    """Of each training (length and adapter) the fastest way, the preset's own first, with the line that submits it."""
    from launcher.bench.tables import fastest

    preset = line.preset.value
    own = (preset.training.sequence_length, preset.adapter if isinstance(preset.adapter, str) else preset.adapter.kind)
    kinds = dict.fromkeys((row.cell.sequence_length, row.cell.adapter) for row in rows)
    found = []
    for kind in sorted(kinds, key=lambda kind: (kind != own, kind)):
        # a backend of sdpa cannot be submitted: training lets torch choose
        best = fastest(row for row in rows if (row.cell.sequence_length, row.cell.adapter) == kind and not row.cell.kernel[1])
        if best is not None:
            found.append((best, submit_line(line, best.cell)))
    return found


def submit_line(line: Line, cell: Cell) -> str:
    """What submits the preset as the cell is, where and with what was typed for the bench."""
    import shlex

    from launcher.bench.grid import change_for
    from launcher.cli.replan import typed
    from launcher.remedies import written

    values = line.preset.value.model_dump(mode="json")
    words = [*([] if line.wish.site is None else ["--site", line.wish.site]), *typed(line.wish)]
    for key, value in change_for(cell, line.preset.value).items():
        before: object = values
        for name in key.split("."):
            before = before[name] if isinstance(before, dict) else None
        if before != value:
            words += ["--set", f"{key}={written(value)}"]
    return f"ftlaunch submit {shlex.join([line.wish.preset, *words])}"


def _without_place(words: list[str]) -> list[str]:
    """A command without what says where on this machine its results are kept."""
    return [word for before, word in zip(["", *words], words) if before != "--out" and word != "--out" and not word.startswith("--out=")]


def _machine() -> str:
    import os

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{len(os.sched_getaffinity(0))} CPU cores, {pages / 2**30:.0f} GiB RAM, load {os.getloadavg()[0]:.1f} when it began"
