"""The second half of the line: from what was read to a submitted run, and from a run to its next life."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.cli.chain import Ready, make_ready, start_chain, withdraw
from launcher.cli.line import Line, Wish, batch_script, planned, read, refuse, rendered
from launcher.cli.show import say, show_findings
from launcher.cli.walltime import fit, fits_as_it_is, full_time_min
from launcher.errors import Finding, FtlaunchError, GateError, MissingError, UsageError
from launcher.plan import Container, Plan, to_json
from launcher.preset.choose import SLURM_KEYS, Chosen
from launcher.preset.fields import duration_text
from launcher.preset.hardware import Hardware
from launcher.preset.reading import COMMAND_LINE, SET, Loaded
from launcher.preset.site import Site
from launcher.preset.stack import Stack
from launcher.run import Run, State
from launcher.slurm.tools import Unanswered
from launcher.slurm.waiting import Waiting
from launcher.state import Known

GOING: Collection[State] = ("queued", "running", "stopping", "continuing", "staging")
"""States that end by themselves."""


@dataclass(frozen=True)
class Launched:
    run: Run
    outcome: Literal["submitted", "resumed", "shown"]
    """shown: a run of this identity is there already and needs nothing."""
    state: State
    job: str | None = None
    """Slurm job id, or the supervisor's pid on this machine."""


def launch(line: Line, *, new: bool) -> Launched:
    """Check, image, stage, create, submit; or what there is of this identity. Errors: every class of ``launcher.errors``."""
    from launcher.runs import RunExists, create_run, find_existing
    from launcher.submit import AlreadyGoing, submit

    plan, findings = planned(line)
    refuse(findings)
    _refuse_what_cannot_run(findings)
    show_findings([finding for finding in findings if finding.level == "warning"])
    runs = line.folders.runs
    _require(line)
    ready = make_ready(line)
    plan, findings = planned(line, ready.container, ready.staged)
    refuse(findings)
    existing = None if new else find_existing(plan, runs)
    if existing is None:
        fitted = fit(line, plan, lambda line: planned(line, ready.container, ready.staged))
        try:
            run = create_run(fitted.plan, lambda run: rendered(fitted.line, fitted.plan, run), line.preset.text, runs, new=new)
            job = _with_chain(run, fitted.line, ready, lambda after: submit(run, after=after, details=fitted.details))
            return Launched(run, "submitted", "staging" if ready.pending else "queued", job)
        except (RunExists, AlreadyGoing) as error:  # two submissions at once: the other one was first
            existing = error.run
    try:
        return _again(line, plan, existing, ready)
    except AlreadyGoing:
        return Launched(existing, "shown", state_now(existing))


@dataclass(frozen=True)
class Seen:
    """What a run is doing, and why its job waits where it does."""

    state: State
    waits: Waiting | None = None


def seen_now(runs: Sequence[Run]) -> list[Seen]:
    """Slurm is asked once, and only about jobs whose end their folders do not tell."""
    from launcher.slurm.queue import look_up
    from launcher.state import state_of
    from launcher.submit import last_job_id

    jobs: dict[int, list[str]] = {}
    tools: dict[str, str] = {}
    states = [state_of(run, Known()) for run in runs]
    for index, run in enumerate(runs):
        job_id = last_job_id(run) if states[index] in GOING else None
        if job_id is not None:
            chain = [job for event in run.events("staging")[-1:] for job in event["jobs"].values()]
            jobs[index], tools = [job_id, *(chain if not run.events("started") else [])], run.record()["tools"]
    known = look_up([job for several in jobs.values() for job in several], tools) if jobs else {}
    return [
        Seen(state_of(run, known.get(jobs[index][0], Known())), _waits(run, jobs[index], known)) if index in jobs else Seen(states[index])
        for index, run in enumerate(runs)
    ]


def _waits(run: Run, jobs: Sequence[str], known: Mapping[str, Known]) -> Waiting | None:
    """``jobs``: the training's, then those that it waits for, of which one that is stuck is what counts."""
    from launcher.cli.follow import name_of
    from launcher.slurm.waiting import explain

    why = [explain(known[job].reason, job=job, run=name_of(run)) for job in jobs if job in known and known[job].state == "pending"]
    if not why or known[jobs[0]].state != "pending":
        return None
    return next((one for one in why if one.stuck), why[0])


def state_now(run: Run) -> State:
    return seen_now([run])[0].state


def resume_run(run: Run, wish: Wish, *, from_checkpoint: str | None, code_current: bool) -> Launched:
    """Begin another life; ``wish`` holds what is to change. Errors: UsageError when it belongs to the identity or the run lives."""
    from launcher.planner import identity_keys_changed
    from launcher.submit import resume, turns

    seen, state = turns(run), state_now(run)
    if state == "finished" and from_checkpoint is None:
        raise UsageError(f"{run.id} is finished: {run.model}", code="finished", hint="to train on from an earlier point: --from epoch-1")
    if state in GOING:
        raise UsageError(f"{run.id} is {state}", code="alive", hint=f"ftlaunch status {run.id}")
    if run.plan(run.lives_started()).staged is None:
        raise UsageError(f"{run.id} was never staged", code="not-staged", hint="submit its preset again: it goes on from there")
    if not (wish.settings or wish.options or wish.allowed) and fits_as_it_is(run, run.plan(run.lives_started())):
        return Launched(run, "resumed", "queued", resume(run, seen=seen, from_checkpoint=from_checkpoint, code_current=code_current))
    before = run.plan(run.lives_started())
    line = line_of(run, before, wish)
    container = _as_chosen(line, before.container)
    plan, findings = planned(line, container, before.staged)
    refuse(findings)
    changed = identity_keys_changed(before, plan)
    if changed:
        message = f"{', '.join(changed)} would make it another run: a resumed run keeps what determines its weights"
        goes_on = "ddp, single and fsdp go on as one another, a zero stage as itself, each on any number of ranks"
        raise UsageError(message, code="identity", hint=goes_on if changed == ["parallelism"] else "submit a preset with that change")
    full_min = None if (wish.options or {}).get("time") else full_time_min(run, before)
    fitted = fit(line, plan, lambda line: planned(line, container, before.staged), wanted_min=full_min)
    plan = replace(fitted.plan, identity=before.identity)
    script = batch_script(fitted.line, plan, run)
    job = resume(
        run,
        seen=seen,
        from_checkpoint=from_checkpoint,
        code_current=code_current,
        plan=plan,
        job_script=script,
        details=fitted.details,
    )
    return Launched(run, "resumed", "queued", job)


def line_of(run: Run, plan: Plan, wish: Wish) -> Line:
    """What a run was made from, with ``wish`` laid over it."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix=f"{run.id}-") as file:
        file.write(json.dumps(_without_nulls(plan.preset)))
        file.flush()
        line = read(replace(wish, preset=file.name, site="local"))
    typed = {key: where for key, where in line.preset.provenance.items() if where.file in (SET, COMMAND_LINE)}
    preset = replace(line.preset, file=run.plan_file(), provenance=typed)
    slurm = {key: Chosen(value, str(run.root)) for key, value in plan.slurm.items()}
    if plan.time_limit_min is not None:
        slurm["time"] = Chosen(duration_text(plan.time_limit_min), str(run.root))
    for key in SLURM_KEYS:
        value = getattr(preset.value.slurm, key)
        if f"slurm.{key}" in typed and value is not None:
            slurm[key] = Chosen(value, COMMAND_LINE)
    site, hardware = Site.model_validate(plan.site), Hardware.model_validate(plan.hardware)
    stack = _loaded(Stack.model_validate(plan.stack), run) if plan.stack else None
    return replace(line, preset=preset, hardware=_loaded(hardware, run), site=_loaded(site, run), stack=stack, slurm=slurm)


def _with_chain(run: Run, line: Line, ready: Ready, start: Callable[[Sequence[str]], str]) -> str:
    """Start the run after the jobs that make it ready; they are withdrawn when it cannot be started."""
    tools = run.record()["tools"]
    try:
        after = start_chain(run, line, ready.pending) if ready.pending else []
    except FtlaunchError:
        if not run.events("submitted", "resumed"):
            shutil.rmtree(run.root)
        raise
    jobs = dict(run.events("staging")[-1]["jobs"]) if after else {}
    try:
        return start(after)
    except Unanswered:
        raise
    except FtlaunchError:
        withdraw(tools["scancel"], jobs)
        raise


def _again(line: Line, plan: Plan, run: Run, ready: Ready) -> Launched:
    """A run of this identity is there: shown when it lives or is finished, else resumed as this submission would have it."""
    from launcher.submit import resume, turns

    seen, state = turns(run), state_now(run)
    if state in GOING or state == "finished":
        return Launched(run, "shown", state)
    before = run.plan(run.lives_started())
    fitted = fit(line, plan, lambda line: planned(line, ready.container, ready.staged))
    line, plan, details = fitted.line, fitted.plan, fitted.details
    if to_json(before) == to_json(plan) and not ready.pending:
        return Launched(run, "resumed", "queued", resume(run, seen=seen, details=details))
    say(f"{run.id} goes on with what changed")
    script = batch_script(line, plan, run)
    job = _with_chain(run, line, ready, lambda after: resume(run, seen=seen, plan=plan, job_script=script, after=after, details=details))
    return Launched(run, "resumed", "staging" if ready.pending else "queued", job)


def preview(line: Line) -> dict[str, str]:
    """The files that a submission would write, name → text, after the same gates. Errors: as ``launch``, but for what acts."""
    plan, findings = planned(line)
    refuse(findings)
    _refuse_what_cannot_run(findings)
    fitted = fit(line, plan, planned)
    return rendered(fitted.line, fitted.plan, Run(line.folders.runs / f"{plan.name}-{plan.identity[:8]}"))


def _refuse_what_cannot_run(findings: Sequence[Finding]) -> None:
    from launcher.hardware.gates import NOT_EXECUTED_YET

    found = [replace(finding, level="error") for finding in findings if finding.code == NOT_EXECUTED_YET]
    if found:
        raise GateError(findings=found)


def _require(line: Line) -> None:
    """What a submission needs of this machine, before anything is built or fetched. Errors: MissingError with all that is missing."""
    from launcher.image.apptainer import find_apptainer
    from launcher.image.host import check_host
    from launcher.slurm.tools import find_tools

    site = line.site.value
    missing: list[Finding] = []
    needs: list[Callable[[], object]] = [find_tools] if site.scheduler == "slurm" else []
    if site.container.use == "apptainer" and (site.build.on == "here" or site.stage.on == "here"):
        needs.append(lambda: find_apptainer(site.container))
    elif site.container.use == "none" and line.stack is not None:
        stack = line.stack.value
        needs.append(lambda: show_findings(check_host(stack)))
    for need in needs:
        try:
            need()
        except MissingError as error:
            missing += error.findings
    if missing:
        raise MissingError(findings=missing)


def _as_chosen(line: Line, container: Container) -> Container:
    site = line.site.value.container
    return replace(container, binds=tuple(site.binds), env=dict(site.env))


def _loaded(value: Any, run: Run) -> Loaded[Any]:
    return Loaded(value, "", Path(run.plan_file()), {})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return value
