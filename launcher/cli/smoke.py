"""``submit --smoke``: a few steps of a preset on this site's nodes, one save, one stop, one resume; what it took, and whether it held."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from launcher import metrics
from launcher.cli.launch import GOING, launch, resume_run, seen_now, state_now
from launcher.cli.line import Line, Wish, planned, read, refuse
from launcher.cli.show import say
from launcher.errors import RunFailed
from launcher.plan import Plan
from launcher.preset.fields import duration_min, duration_text
from launcher.run import Run
from launcher.slurm.tools import call
from launcher.submit import cancel, last_job_id

STEPS = 12
"""Of an epoch."""
LASTS_S = 15.0
"""So long its steps are to take, by as many epochs as that needs: a stop has to come between them, seen through a shared file system."""
STOP_AFTER = 3
"""Steps of the first life before it is asked to stop."""
SHORT_DOCUMENT_TOKENS = 256
"""Most documents are longer: so many of them fill the rows of packed samples at least."""
TIME_MIN = 20
"""Walltime of one life, less where the partition allows less."""
LOOK_S = 1.0
ASK_SLURM_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One line of the verdict."""

    what: str
    measured: str
    ok: bool


@dataclass
class Seen:
    """When things were first seen, by this machine's clock; None where they were not."""

    submitted: float
    started: list[float]
    """Each life's ``started`` event."""
    stepped: list[float]
    """Each life's first step."""
    stop: float | None = None
    ended: float | None = None
    """The first life's last word."""


def smoke_line(line: Line) -> Line:
    """The preset as it is for a smoke run: its model, layout, micro batch and kernels; few samples, no evaluation, the test partition."""
    plan, findings = planned(line)
    refuse(findings)
    wish, options = line.wish, dict(line.wish.options or {})
    site = line.site.value
    if not options.get("partition") and "slurm.partition" not in line.preset.provenance:
        options["partition"] = next((name for name, partition in site.partitions.items() if partition.test), None) or options.get(
            "partition"
        )
    name = options.get("partition") or (line.slurm["partition"].value if "partition" in line.slurm else "")
    partition = site.partitions.get(str(name))
    if site.scheduler == "slurm" and not options.get("time"):
        allowed = int(duration_min(partition.max_time)) if partition is not None and partition.max_time is not None else TIME_MIN
        options["time"] = duration_text(min(TIME_MIN, allowed))
    return read(replace(wish, settings=(*wish.settings, *smoke_settings(plan)), options=options))


def smoke_settings(plan: Plan) -> list[str]:
    """One micro step of every rank is an optimizer step, ``STEPS`` of them an epoch (more where documents of unknown length are packed),
    as many epochs as the prediction wants.
    """
    data, effective = plan.preset["data"], plan.world_size * plan.batch.micro_batch
    rows = 1 if data["packing"] in ("none", "flatten") else max(1, plan.preset["training"]["sequence_length"] // SHORT_DOCUMENT_TOKENS)
    samples = round(effective * STEPS * rows / (1 - data["eval_share"])) + 1
    if data["num_samples"] is not None:
        samples = min(samples, data["num_samples"])
    step_s = None if plan.time is None else plan.time.step_s * effective / plan.batch.effective_batch
    return [
        f"name={plan.name[:57]}-smoke",
        f"training.effective_batch={effective}",
        f"data.num_samples={samples}",
        f"training.epochs={1 if step_s is None else epochs_for(step_s)}",
        "evaluation.every=never",
        "checkpoint.every=never",
        "checkpoint.minutes=null",
        "limits.max_lives=4",
    ]


def epochs_for(step_s: float) -> int:
    """Epochs of ``STEPS`` steps that last ``LASTS_S``."""
    return max(1, math.ceil(LASTS_S / (step_s * STEPS)))


def smoke(line: Line) -> tuple[Run, list[Finding]]:
    """Run it to the end; the verdict, line by line. Errors: those of a submission; RunFailed when the run ends where it should not.

    Steps so quick that the run was over before the stop arrived: once more, with as many as their measured time wants. A Ctrl-C cancels
    the run.
    """
    run, seen = _interrupted(line)
    if not _stopped(run):
        step_s = _median([float(row["step_s"]) for row in metrics.read(run.metrics_file, "train")])
        assert step_s is not None, "it has finished"
        epochs = epochs_for(step_s / 2)
        say(f"{run.id} was over before the stop arrived, at {_s(step_s)} a step: once more, {epochs} times as many samples")
        run, seen = _interrupted(read(replace(line.wish, settings=(*line.wish.settings, f"training.epochs={epochs}"))))
    return run, verdict(run, seen)


def _interrupted(line: Line) -> tuple[Run, Seen]:
    """The run, stopped on the way and gone on with."""
    run = launch(line, new=True).run
    say(f"{run.id}: a stop after {STOP_AFTER} steps")
    try:
        seen = Seen(time.time(), [], [])
        _wait(run, seen, lambda: _steps(run, 0) >= STOP_AFTER, "the first steps")
        say(f"step {_steps(run, 0)}: asking it to stop")
        seen.stop = time.time()
        if not run.events("finished"):
            ask_to_stop(run)
        _wait(run, seen, lambda: seen.ended is not None, "the stop", may_end=True)
        if state_now(run) not in GOING and not run.events("finished"):
            say("this site does not go on by itself: resuming")
            resume_run(run, Wish(str(run.root)), from_checkpoint=None, code_current=False)
        _wait(run, seen, lambda: bool(run.events("finished")), "the end", may_end=True)
    except KeyboardInterrupt:
        say(f"cancelling {run.id}")
        cancel(run, now=True)
        raise
    return run, seen


def _stopped(run: Run) -> bool:
    return any(event.get("reason") == "stop" for event in run.events("checkpoint"))


def ask_to_stop(run: Run) -> None:
    """As the scheduler does before the time limit; on this machine, as a Ctrl-C does."""
    job_id = last_job_id(run)
    if job_id is None:
        cancel(run, now=False)
        return
    plan = run.plan(max(0, run.lives_started() - 1))
    to_batch = ["--batch"] if plan.site["signal"] == "batch" else []
    answer = call([run.record()["tools"]["scancel"], *to_batch, "--signal=USR2", job_id])
    if answer.code != 0:  # it may be over already
        say(f"scancel: {answer.reason}")


def verdict(run: Run, seen: Seen) -> list[Finding]:
    """What it took, and what had to be so."""
    rows, saves = metrics.read(run.metrics_file, "train"), metrics.read(run.metrics_file, "checkpoint")
    stops = [event for event in run.events("checkpoint") if event.get("reason") == "stop"]
    saved = int(stops[0]["step"]) if stops else None
    second = [int(row["step"]) for row in rows if row["life"] > 0]
    save_s = next((float(row["blocked_s"]) for row in saves if row["step"] == saved), None)
    lead_s = run.plan().signal_lead_s
    stop_s = None if seen.stop is None or seen.ended is None else seen.ended - seen.stop
    lives = run.lives_started()
    found = [
        Finding("queue", _s(_between(seen.submitted, seen.started, 0)), bool(seen.started)),
        Finding("start-up", _s(_since_start(seen, 0)), bool(seen.stepped)),
        Finding("step", _s(_median([float(row["step_s"]) for row in rows])), bool(rows)),
        Finding("save", "none" if save_s is None else f"{_s(save_s)}, step {saved}", save_s is not None),
        Finding("stop", f"{_s(stop_s)} from notice to end, of {lead_s} s asked for", stop_s is not None and stop_s <= lead_s),
        Finding("next life", _s(None if seen.ended is None else _between(seen.ended, seen.started, 1)), lives > 1),
        Finding("start-up again", _s(_since_start(seen, 1)), len(seen.stepped) > 1),
        Finding(
            "resumed",
            f"at step {second[0]}" if second else "no step after the stop",
            saved is not None and second[:1] == [saved + 1],
        ),
        Finding("end", f"{len(rows)} steps in {lives} lives", bool(run.events("finished"))),
    ]
    missing = [row for row in range(1, len(rows) + 1) if row not in {int(one["step"]) for one in rows}]
    return [*found, Finding("steps", "all there" if not missing else f"missing: {missing}", not missing and bool(rows))]


def _wait(run: Run, seen: Seen, until: Callable[[], bool], what: str, *, may_end: bool = False) -> None:
    """Look at the folder each second, and ask Slurm gently whether there is still something to wait for."""
    asked, told = time.monotonic(), ""
    while True:
        _look(run, seen)
        if until():
            return
        failed = run.events("failed")
        ended = failed[-1].get("cause", "failed") if failed else None
        if time.monotonic() - asked >= ASK_SLURM_S or (may_end and run.events("stopped")):
            look, asked = seen_now([run])[0], time.monotonic()
            state, now = look.state, f"{look.state}, waiting for {what}" + ("" if look.waits is None else f"; {look.waits}")
            if now != told:
                say(f"{run.id}: {now}")
                told = now
            if state not in GOING and not (may_end and state in ("stopped", "cancelled", "finished")):
                ended = ended or f"it is {state}"
        if ended is not None:
            raise RunFailed(f"{run.id}: {what} did not come: {ended}", code="smoke", hint=f"ftlaunch logs {run.root}")
        time.sleep(LOOK_S)


def _look(run: Run, seen: Seen) -> None:
    started = run.events("started")
    seen.started = [_time(str(event["time"])) for event in started]
    while len(seen.stepped) < len(started) and _steps(run, len(seen.stepped)):
        seen.stepped.append(time.time())
    if seen.stop is not None and seen.ended is None:
        ends = [event for event in run.events("requeued", "continued", "stopped", "finished") if event.get("life") == 0]
        seen.ended = _time(str(ends[0]["time"])) if ends else None


def _steps(run: Run, life: int) -> int:
    return sum(row["life"] == life for row in metrics.read(run.metrics_file, "train"))


def _between(start: float, ends: list[float], number: int) -> float | None:
    return ends[number] - start if number < len(ends) else None


def _since_start(seen: Seen, life: int) -> float | None:
    return _between(seen.started[life], seen.stepped, life) if life < len(seen.started) else None


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _time(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp()


def _s(seconds: float | None) -> str:
    return "not seen" if seconds is None else f"{max(0.0, seconds):.3g} s"


def failed(findings: list[Finding]) -> bool:
    return not all(finding.ok for finding in findings)
