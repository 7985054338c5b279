"""Commands before a run exists: check, render, build, stage. Each stops at its own station of the line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launcher.cli import options
from launcher.cli.show import out, say, show_files, show_findings, show_json, show_plan, show_text
from launcher.errors import Finding, FtlaunchError

if TYPE_CHECKING:
    from launcher.cli.line import Wish
    from launcher.slurm.forecast import Forecast


def check(
    presets: Annotated[list[str], typer.Argument(metavar="PRESET…", help="Files, or names of shipped presets.")],
    site: options.Sites = None,
    settings: options.Settings = None,
    allow: options.Allow = None,
    explain: Annotated[
        list[str] | None, typer.Option("--explain", metavar="KEY", help="Say instead what a key means and where it comes from.")
    ] = None,
    as_json: options.Json = False,
    account: options.Account = None,
    partition: options.Partition = None,
    qos: options.Qos = None,
    time: options.Time = None,
    constraint: options.Constraint = None,
    reservation: options.Reservation = None,
    nodes: options.Nodes = None,
    gpus: options.Gpus = None,
) -> None:
    """Read, resolve and plan; say what is wrong. Writes nothing."""
    from datetime import datetime

    from launcher.cli.facts import explained
    from launcher.cli.forecast import forecast
    from launcher.cli.line import Wish, planned, read, refuse
    from launcher.cli.plan_table import show_check
    from launcher.cli.replan import advice
    from launcher.planner import summary

    asked = options.sbatch(account, partition, qos, time, constraint, reservation, nodes, gpus)
    if site is not None and "," in site:
        _compare(presets, site, Wish("", None, tuple(settings or ()), asked, tuple(allow or ())), as_json=as_json)
        return
    documents: list[dict[str, Any]] = []
    refused: list[FtlaunchError] = []
    forecasts: list[Forecast] = []
    for preset in presets:
        findings: list[Finding] = []
        document: dict[str, Any] = {"ok": False, "preset": preset, "findings": findings, "plan": None, "forecast": None}
        try:
            line = read(Wish(preset, site, tuple(settings or ()), asked, tuple(allow or ())))
            plan, findings = planned(line)
            if explain:
                facts = explained(line, plan, explain, as_json=as_json)
                documents.append({"ok": True, "preset": preset, "explained": facts})
                continue
            if not any(finding.level == "error" for finding in findings):
                findings += advice(line, plan)
            start = forecast(line, plan, findings, before=forecasts)
            if start is not None:
                forecasts.append(start)
                findings += start.findings
                document["forecast"] = start.to_json()
            document.update(plan=summary(plan), findings=[finding.to_json() for finding in findings])
            if not as_json:
                if any(other.get("plan") for other in documents):
                    out().print()
                show_check(plan, findings, out(), forecast=start, now=datetime.now())
            refuse(findings)
            document["ok"] = True
        except FtlaunchError as error:
            refused.append(error)
            if document["plan"] is None:
                document["findings"] = [finding.to_json() for finding in error.findings]
                if not as_json:
                    show_findings(error.findings)
        documents.append(document)
    if as_json:
        show_json(documents[0] if len(documents) == 1 else {"ok": not refused, "presets": documents})
    if refused:
        raise typer.Exit(min(error.exit_code for error in refused))


def _compare(presets: list[str], sites: str, wish: Wish, *, as_json: bool) -> None:
    from launcher.cli.compare import compare, show_compared
    from launcher.cli.line import refuse

    rows = compare(presets, [name for name in sites.split(",") if name], wish)
    if as_json:
        show_json({"ok": all(row.ok for row in rows), "compared": [row.to_json() for row in rows]})
    else:
        show_compared(rows, out())
    try:
        refuse([row.refusal for row in rows if row.refusal is not None])
    except FtlaunchError as error:
        raise typer.Exit(error.exit_code) from None


def render(
    preset: options.Preset,
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write the files here instead of the screen.")] = None,
    site: options.Site = None,
    settings: options.Settings = None,
    allow: options.Allow = None,
    as_json: options.Json = False,
    account: options.Account = None,
    partition: options.Partition = None,
    qos: options.Qos = None,
    time: options.Time = None,
    constraint: options.Constraint = None,
    reservation: options.Reservation = None,
    nodes: options.Nodes = None,
    gpus: options.Gpus = None,
) -> None:
    """The definition, the batch script, the DeepSpeed config and the plan, as a submission would write them."""
    from launcher.cli.line import Wish, beside_definition, planned, read, refuse, rendered
    from launcher.hardware.fits import UNOBSERVED
    from launcher.run import Run

    asked = options.sbatch(account, partition, qos, time, constraint, reservation, nodes, gpus)
    line = read(Wish(preset, site, tuple(settings or ()), asked, tuple(allow or ())))
    plan, findings = planned(line, observed=UNOBSERVED)  # what is rendered now may be submitted from elsewhere
    refuse(findings)
    show_findings([finding for finding in findings if finding.level == "warning"])
    files = rendered(line, plan, Run((folder or Path.cwd()).absolute()))
    if folder is not None:
        files |= beside_definition(line)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        say(f"{len(files)} files in {folder}")
    if as_json or folder is None:
        show_files(files, as_json)


def build(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_STACK", help="A preset or a stack: a file or a shipped name.")],
    site: options.Site = None,
    on: options.On = None,
    force: Annotated[bool, typer.Option("--force", help="Build again even when the image exists.")] = False,
    print_only: Annotated[bool, typer.Option("--print-only", help="Print the definition, to build it elsewhere.")] = False,
    as_json: options.Json = False,
) -> None:
    """The image from the rendered definition: without root, cached by what goes into it, tested before it gets its name."""
    from launcher.cli.chain import place_of_work, submit_alone
    from launcher.cli.line import definition_of, image_of, stack_and_site

    stack, chosen = stack_and_site(target, site)
    if print_only:
        show_text(definition_of(stack))
        return
    if place_of_work("build", chosen.value, on) == "slurm":
        again = ["--force"] if force else []
        _show_job(submit_alone("build", ("build", str(stack.file.absolute()), *again), chosen), as_json=as_json)
        return
    container = image_of(stack, chosen.value, force=force)
    if as_json:
        show_json({"ok": True, "image": container.image, "identity": container.identity})
    else:
        out().print(container.image, markup=False)


def stage(
    preset: options.Preset,
    site: options.Site = None,
    on: options.On = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Model, tokenizer and tokenised data at pinned revisions. Done once; a second call returns at once."""
    import dataclasses

    from launcher.cli.chain import place_of_work, submit_alone
    from launcher.cli.line import Wish, container_of, planned, read, refuse, staged

    line = read(Wish(preset, site, tuple(settings or ()), {}, ()))
    refuse(planned(line)[1])
    if place_of_work("stage", line.site.value, on) == "slurm":
        changes = [word for setting in settings or () for word in ("--set", setting)]
        name = preset if line.preset.file != Path(preset) else str(line.preset.file.absolute())
        _show_job(submit_alone("stage", ("stage", name, *changes), line.site, line), as_json=as_json)
        return
    facts = dataclasses.asdict(staged(line, container_of(line)))
    if as_json:
        show_json({"ok": True, **facts})
    else:
        show_plan(facts)


def prepare(
    run: Annotated[Path, typer.Argument()],
    step: Annotated[Literal["build", "stage"], typer.Argument(metavar="build|stage")],
    site: Annotated[Path, typer.Option("--site")],
) -> None:
    """One step of a run's chain, in its own job. Jobs call it; people have no use for it."""
    from launcher.cli import chain
    from launcher.run import Run

    chain.prepare(Run(run), step, site)


def _show_job(job: tuple[str, Path], *, as_json: bool) -> None:
    job_id, log = job
    if as_json:
        show_json({"ok": True, "job_id": job_id, "log": str(log)})
    else:
        out().print(f"job {job_id}, log {log}", markup=False)
