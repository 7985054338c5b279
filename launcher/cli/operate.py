"""Commands about a run: submit, status, logs, cancel, resume, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import options
from launcher.cli.show import out, say, show_files, show_json, show_plan, show_rows
from launcher.errors import RunFailed, UsageError
from launcher.run import Run

if TYPE_CHECKING:
    from launcher.cli.line import Line

WATCH_S = 60
"""Between two looks of ``status --watch``: Slurm's controller serves everybody."""


def submit(
    preset: options.Preset,
    site: options.Site = None,
    settings: options.Settings = None,
    use_flash_attn: options.UseFlashAttn = False,
    use_xformer_attn: options.UseXformerAttn = False,
    new: Annotated[bool, typer.Option("--new", help="Start another run even when this one exists.")] = False,
    follow: options.Follow = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; print what would be submitted.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps, one save, one stop, one resume instead of the run.")] = False,
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
    """Check, build or reuse the image, stage, create the run folder, submit."""
    from launcher.cli.launch import launch, preview
    from launcher.cli.line import Wish, read

    _one_document(as_json, follow, "--follow")
    asked = options.sbatch(account, partition, qos, time, constraint, reservation, nodes, gpus)
    changes = options.with_attention(settings, use_flash_attn=use_flash_attn, use_xformer_attn=use_xformer_attn)
    line = read(Wish(preset, site, tuple(changes), asked, tuple(allow or ())))
    if dry_run:
        show_files(preview(line), as_json)
        return
    if smoke:
        _smoke(line, as_json=as_json)
        return
    try:
        launched = launch(line, new=new)
    except KeyboardInterrupt:
        say("interrupted before the run was submitted; the same command goes on with what is built and staged already")
        raise typer.Exit(130) from None
    _show_launched(launched, as_json)
    if follow and launched.state != "finished":
        _follow(launched.run)


def _smoke(line: Line, *, as_json: bool) -> None:
    from launcher.cli.smoke import failed, smoke, smoke_line

    run, findings = smoke(smoke_line(line))
    if as_json:
        show_json({"ok": not failed(findings), "id": run.id, "folder": str(run.root), "verdict": [asdict(found) for found in findings]})
    else:
        show_rows(("", "", "took"), [("ok" if found.ok else "NOT OK", found.what, found.measured) for found in findings])
        verdict = "does not hold" if failed(findings) else "a run can be stopped and goes on here"
        out().print(f"{run.id}: {verdict}", markup=False)
    if failed(findings):
        raise typer.Exit(RunFailed.exit_code)


def resume(
    run: options.RunName,
    from_checkpoint: Annotated[
        str | None, typer.Option("--from", metavar="CHECKPOINT", help="epoch-2 or step-100; newer ones are set aside, not removed.")
    ] = None,
    code: Annotated[str, typer.Option("--code", metavar="recorded|current", help="The code to run.")] = "recorded",
    settings: options.Settings = None,
    follow: options.Follow = False,
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
    """Continue a stopped, failed or lost run. What determines the weights cannot be changed; where and how it runs can."""
    from launcher.cli.launch import resume_run
    from launcher.cli.line import Wish

    _one_document(as_json, follow, "--follow")
    if code not in ("recorded", "current"):
        raise UsageError(f"--code takes recorded or current, not {code!r}", key="--code")
    asked = options.sbatch(account, partition, qos, time, constraint, reservation, nodes, gpus)
    wish = Wish("", None, tuple(settings or ()), {key: value for key, value in asked.items() if value is not None}, tuple(allow or ()))
    launched = resume_run(find(run), wish, from_checkpoint=from_checkpoint, code_current=code == "current")
    _show_launched(launched, as_json)
    if follow:
        _follow(launched.run)


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="An id, the beginning of one, 'last', or a folder.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every minute until it ends.")] = False,
    as_json: options.Json = False,
) -> None:
    """What a run is doing; without RUN, all of them."""
    import time

    from launcher.cli.follow import facts_of
    from launcher.cli.forecast import start_of
    from launcher.cli.launch import GOING
    from launcher.cli.walltime import with_minutes
    from launcher.runs import all_runs
    from launcher.slurm.waiting import MINUTES

    _one_document(as_json, watch, "--watch")
    while True:
        found = all_runs(_runs_folder()) if run is None else [find(run)]
        rows = facts_of(found)
        if run is not None and rows[0]["state"] == "queued":
            rows[0]["expected_start"] = start_of(found[0], rows[0]["job"])
        if run is not None and MINUTES in (rows[0]["next"] or ""):
            rows[0]["next"] = with_minutes(rows[0]["next"], found[0].plan(rows[0]["life"]))
        if run is not None:
            show_json({"ok": True, **rows[0]}) if as_json else show_plan(
                {key: value for key, value in rows[0].items() if value is not None and key != "stuck"}
            )
        elif as_json:
            show_json({"ok": True, "runs": rows})
        else:
            header = ("id", "state", "step", "steps", "loss", "life", "job")
            show_rows(header, [[row[key] for key in header] for row in rows])
            for row in rows:
                if row["stuck"]:
                    out().print(f"{row['id']}: {row['waits']}: {row['next']}", markup=False)
        if not (watch and any(row["state"] in GOING for row in rows)):
            return
        time.sleep(WATCH_S)


def logs(
    run: options.RunName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing what is added.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="One rank's log; default: rank 0's and the supervisor's.")] = None,
    life: Annotated[int | None, typer.Option("--life", help="Default: the newest.")] = None,
) -> None:
    """Print a life's logs: what its supervisor did and what its ranks said."""
    from launcher.cli.follow import print_logs

    found = find(run)
    number = max(0, found.lives_started() - 1) if life is None else life
    if not found.life(number).is_dir():
        raise UsageError(f"{found.id} had no life {number}", code="no-life", hint=f"lives so far: {found.lives_started()}")
    files = [found.supervisor_log(number), found.rank_log(number, 0)] if rank is None else [found.rank_log(number, rank)]
    if rank is not None and not files[0].exists():
        raise UsageError(f"{files[0]} does not exist", code="no-rank", hint=f"this run has {found.plan(number).world_size} ranks")
    if not any(file.exists() for file in files):
        files = sorted(found.submitit.glob("*log*"))
    print_logs(files, follow=follow)


def cancel(
    run: options.RunName,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
    as_json: options.Json = False,
) -> None:
    """End a run: it saves a checkpoint first and can be resumed. A run that still waits leaves the queue."""
    from launcher.cli.launch import state_now
    from launcher.submit import cancel as cancel_run

    found = find(run)
    state = state_now(found)
    if state in ("finished", "failed", "stopped", "cancelled", "lost", "created"):
        raise UsageError(f"{found.id} is {state}: there is nothing to cancel", code="not-alive")
    cancel_run(found, now=now)
    if as_json:
        show_json({"ok": True, "id": found.id})
    else:
        out().print(f"{found.id} was asked to end{'' if now else ' after a checkpoint'}; ftlaunch status {run}", markup=False)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Ids, beginnings of them, 'last', or folders.")],
    as_json: options.Json = False,
) -> None:
    """A table, and the training loss, evaluation loss and learning rate as PNG in the run's report folder."""
    from launcher.report import plots, table

    documents: list[dict[str, Any]] = []
    for run in map(find, runs):
        rows, files = table(run), plots(run)
        documents.append({"id": run.id, "table": dict(rows), "plots": [str(file) for file in files]})
        if not as_json:
            out().rule(run.id)
            show_plan(dict(rows))
            for file in files:
                out().print(str(file), markup=False)
    if as_json:
        show_json({"ok": True, "runs": documents})


def _show_launched(launched: Any, as_json: bool) -> None:
    from launcher.cli.follow import name_of

    run: Run = launched.run
    name = name_of(run)
    commands = [f"ftlaunch status {name}", f"ftlaunch logs {name} -f", f"ftlaunch cancel {name}"]
    if launched.state == "finished":
        commands = [f"ftlaunch report {name}", "ftlaunch submit … --new"]
    if as_json:
        facts = {"id": run.id, "outcome": launched.outcome, "state": launched.state, "job": launched.job, "folder": str(run.root)}
        show_json({"ok": True, **facts, "next": commands})
        return
    what = {"submitted": "submitted", "resumed": "resumed", "shown": f"is {launched.state} already"}[launched.outcome]
    job = f" as {'job' if run.record()['scheduler'] == 'slurm' else 'process'} {launched.job}" if launched.job else ""
    out().print(f"{run.id} {what}{job}: {run.root}", markup=False)
    for command in commands:
        out().print(f"  {command}", markup=False)


def _one_document(as_json: bool, asked: bool, option: str) -> None:
    if as_json and asked:
        raise UsageError(f"--json prints one document, {option} goes on printing", code="usage", key=option, hint="use one of them")


def _follow(run: Run) -> None:
    from launcher.cli.follow import follow_run

    raise typer.Exit(follow_run(run))


def find(text: str) -> Run:
    """The run that a person means. Errors: UsageError."""
    from launcher.runs import find_run

    path = Path(text)
    return find_run(path.parent if "/" in text or (path / "run.json").is_file() else _runs_folder(), text)


def _runs_folder() -> Path:
    from launcher.cli.follow import runs_folder

    return runs_folder()
