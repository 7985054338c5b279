"""Watching a run: live progress, what it is doing now, its logs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launcher import metrics
from launcher.cli.launch import GOING, Seen, seen_now
from launcher.cli.show import out, progress, show_findings, show_plan
from launcher.errors import FtlaunchError, RunFailed, RunStopped
from launcher.files import read_json_lines
from launcher.run import Run, State
from launcher.state import Known, state_of
from launcher.submit import last_job_id

QUEUE_LOOK_S = 60
"""Between questions to Slurm's controller, which serves everybody."""

FIRST_LOOK_S = 10
"""The first of them comes earlier: a job that can never start is to be heard of soon."""

QUIET_EVENTS = frozenset({"checkpoint"})


def facts_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What ``status`` says of each run. One whose plan this version cannot read has a state and a cause."""
    return [_facts(run, seen) for run, seen in zip(runs, seen_now(runs))]


def _facts(run: Run, seen: Seen) -> dict[str, Any]:
    state, waits = seen.state, seen.waits
    rows = metrics.read(run.metrics_file, "train")
    last = rows[-1] if rows else {}
    ends = run.events("failed", "stopped", "crashed")
    cause = ends[-1].get("cause") if ends and state in ("failed", "stopped", "cancelled") else None
    life = max(0, run.lives_started() - 1)
    try:
        steps = run.plan(life).total_steps
    except ValueError as error:
        steps, cause = None, f"{run.plan_file(life)}: {error}"
    return {
        "id": run.id,
        "state": state,
        "cause": cause,
        "waits": None if waits is None else waits.text,
        "stuck": waits is not None and waits.stuck,
        "next": waits.command if waits is not None else _next(run, state),
        "step": last.get("step", 0),
        "steps": steps,
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "life": life,
        "lives": run.lives_started(),
        "job": last_job_id(run),
        "folder": str(run.root),
    }


def _next(run: Run, state: State) -> str | None:
    """What to type where nothing goes on by itself."""
    return f"ftlaunch resume {name_of(run)}" if state in ("stopped", "cancelled", "failed", "lost") else None


def name_of(run: Run) -> str:
    """What to type for this run: its id where commands look for it, else its folder."""
    try:
        return run.id if runs_folder().resolve() == run.root.parent.resolve() else str(run.root)
    except FtlaunchError:
        return str(run.root)


def runs_folder() -> Path:
    """Where this user's runs are. Errors: UsageError where the site says no folder."""
    from launcher.cli.line import folders_of, site_of

    own = os.environ.get("FTLAUNCH_RUNS")
    return Path(own).absolute() if own else folders_of(site_of(None).value).runs


def follow_run(run: Run) -> int:
    """Show the progress until the run ends; returns the exit code. Ends of a terminal are handled as the interface says:
    on this machine the first INT stops the run and a second kills its ranks, with Slurm INT only detaches.
    """
    show = _Show(run)
    with show:
        if run.record()["scheduler"] == "slurm":
            state = _watch_slurm(run, show.look, show.line)
        else:
            from launcher.follow import follow

            state = follow(run, show.look)
    if state == "detached":
        out().print(f"{run.id} goes on without this terminal: ftlaunch status {name_of(run)}, ftlaunch cancel {name_of(run)}", markup=False)
        return 0
    return _conclude(run, state)


def _conclude(run: Run, state: str) -> int:
    """The end: a table, where everything is, what to type next."""
    facts = facts_of([run])[0]
    if state in ("failed", "lost"):
        error: FtlaunchError = RunFailed(
            f"{run.id} {state}: {facts['cause'] or 'no sign of life'}",
            hint=f"ftlaunch logs {name_of(run)}; then ftlaunch resume {name_of(run)}",
        )
        show_findings(error.findings)
        return RunFailed.exit_code
    if state != "finished":
        out().print(f"{run.id} {state} at step {facts['step']}: ftlaunch resume {name_of(run)} --follow", markup=False)
        return RunStopped.exit_code
    from launcher.report import plots, table

    drawn: dict[str, str] = {}
    try:
        drawn = {"plots": ", ".join(file.name for file in plots(run)) + f" in {run.report}"}
    except FtlaunchError as error:
        show_findings([replace(finding, level="advice") for finding in error.findings])
    show_plan({**dict(table(run)), "model": str(run.model), "checkpoints": str(run.checkpoints), **drawn})
    for command in (f"ftlaunch report {name_of(run)}", f"ftlaunch logs {name_of(run)}"):
        out().print(f"  {command}", markup=False)
    return 0


def _watch_slurm(run: Run, look: Callable[[], None], say: Callable[[str], None]) -> str:
    """Until the run ends, or INT or HUP detach. The folder is looked at each second, Slurm asked each minute; what is new is said."""
    detached: list[int] = []
    before = {number: signal.signal(number, lambda heard, frame: detached.append(heard)) for number in (signal.SIGINT, signal.SIGHUP)}
    asked_at, told = time.monotonic() - QUEUE_LOOK_S + FIRST_LOOK_S, ""
    try:
        while not detached:
            look()
            state = state_of(run, Known())
            if state in GOING and time.monotonic() - asked_at > QUEUE_LOOK_S:
                asked_at, seen = time.monotonic(), seen_now([run])[0]
                state, waits = seen.state, "" if seen.waits is None else str(seen.waits)
                if waits not in ("", told):
                    say(f"job {last_job_id(run)}: {waits}")
                told = waits
            if state not in GOING:
                return state
            time.sleep(1)
        return "detached"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Show:
    """A bar on a terminal; elsewhere a line now and then. Events are lines in both."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._console: Console = progress()
        self._events = len(run.events())
        self._total = run.plan(run.lives_started()).total_steps
        self._said = 0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("starting", total=self._total)

    def __enter__(self) -> _Show:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def look(self) -> None:
        """Show what is new in the run folder."""
        events = self._run.events()
        for event in events[self._events :]:
            if event["event"] not in QUIET_EVENTS:
                cause = f": {event['cause']}" if event.get("cause") else ""
                self._console.print(f"{event['time'][11:19]} life {event.get('life', 0)} {event['event']}{cause}", markup=False)
        self._events = len(events)
        records = read_json_lines(self._run.metrics_file)
        train = [record for record in records if record.get("kind") == "train"]
        if not train:
            return
        last = train[-1]
        text = (
            f"epoch {last['epoch']:.2f}  loss {last['loss']:.4f}  {last['useful_tokens'] / max(last['step_s'], 1e-9):,.0f} useful tokens/s"
        )
        self._bar.update(self._task, completed=last["step"], description=text)
        every = max(1, (self._total or 100) // 20)
        if not self._console.is_terminal and (last["step"] >= self._said + every or last["step"] == self._total != self._said):
            self._said = last["step"]
            self._console.print(f"step {last['step']}/{self._total}  {text}", markup=False)


def print_logs(files: Sequence[Path], *, follow: bool) -> None:
    """Print the files, each below its name; with ``follow`` also what is added to them, until INT."""
    places = dict.fromkeys(files, 0)
    try:
        while True:
            for file in files:
                if not file.exists():
                    continue
                with file.open("rb") as log:
                    log.seek(places[file])
                    text = log.read().decode(errors="replace")
                    places[file] = log.tell()
                if text:
                    sys.stdout.write(f"==> {file} <==\n{text}{'' if text.endswith(chr(10)) else chr(10)}")
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        return
