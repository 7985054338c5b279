"""From a run folder to a job: submit, resume, cancel. The supervisor does the rest on its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.checkpoint import Manifest, committed
from launcher.errors import ActionError, FtlaunchError, UsageError
from launcher.files import write_text
from launcher.plan import Plan, write_plan
from launcher.run import Run, boot_id, is_process_alive, process_start, read_lease
from launcher.runs import code_sha, copy_code
from launcher.slurm.queue import look_up
from launcher.slurm.tools import call, clean_environment


def submit(run: Run) -> str:
    """Hand the run to Slurm, or to a supervisor of its own session on this machine; returns the job id or the supervisor's pid.

    Errors: ActionError (5) with the scheduler's own reason, after which a run that never lived is gone again.
    """
    with _alone(run):
        fresh = not run.events()
        try:
            return _start(run, "submitted")
        except FtlaunchError:
            if fresh:
                shutil.rmtree(run.root)
            raise


def resume(
    run: Run,
    *,
    from_checkpoint: str | None = None,
    code_current: bool = False,
    plan: Plan | None = None,
    job_script: str | None = None,
) -> str:
    """Begin another life of a run; returns the job id or the supervisor's pid. That it does not live already is the caller's to see.

    ``from_checkpoint``: ``epoch-2`` or ``step-100``; newer checkpoints are set aside. ``plan`` and ``job_script``: what is changed from
    this life on. Errors: UsageError when there is no such checkpoint or the plan is another run's, ActionError.
    """
    if plan is not None and plan.identity != run.plan(run.lives_started()).identity:
        raise UsageError("this would change what determines the weights", code="identity", hint="submit it as a run of its own")
    with _alone(run):
        life = run.lives_started()
        chosen = None if from_checkpoint is None else find_checkpoint(run, from_checkpoint)
        folder = run.life(life)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if chosen is not None:
            _set_aside(run, chosen, life)
        if plan is not None:
            write_plan(plan, folder / "plan.json")
        if job_script is not None:
            write_text(folder / "job.sbatch", job_script)
        if code_current:
            (run.code / "launcher").rename(folder / "code-before")
            copy_code(run)
        details = {"from_step": chosen.step if chosen else None, "code": code_sha(run) if code_current else None}
        return _start(run, "resumed", **details)


def cancel(run: Run, *, now: bool) -> None:
    """End a run for good: with a checkpoint, or at once. A job that still waits just leaves the queue. Errors: ActionError."""
    life = present_life(run)
    run.append_event("cancel_requested", life=life, now=now)
    job_id = last_job_id(run)
    if job_id is None:
        _cancel_here(run, now=now)
        return
    scancel = run.record()["tools"]["scancel"]
    if not now:
        waiting = call([scancel, "--state=PENDING", job_id])
        asked = call([scancel, "--batch", "--signal=INT", job_id])
        if waiting.code != 0 and asked.code != 0:
            raise ActionError(f"scancel: {asked.reason}", code="scancel")
        return
    answer = call([scancel, job_id])
    if answer.code != 0 and look_up([job_id], run.record()["tools"])[job_id].state in ("pending", "running", "ending", "unknown"):
        raise ActionError(f"scancel: {answer.reason}", code="scancel")
    run.append_event("cancelled", life=life, job_id=job_id)


def find_checkpoint(run: Run, text: str) -> Manifest:
    """``epoch-2`` or ``step-100`` among the committed ones. Errors: UsageError that lists them."""
    named = re.fullmatch(r"(epoch|step)-(\d+)", text)
    manifests = committed(run)
    for manifest in manifests:
        if named and int(named[2]) == (manifest.epoch if named[1] == "epoch" else manifest.step):
            return manifest
    there = ", ".join(f"epoch-{manifest.epoch}" if manifest.epoch else f"step-{manifest.step}" for manifest in manifests)
    raise UsageError(f"{run.id} has no checkpoint {text!r}", code="no-checkpoint", hint=f"there are: {there or 'none'}")


def last_job_id(run: Run) -> str | None:
    """The Slurm job that the run's next or present life belongs to; None on this machine."""
    for event in reversed(run.events("submitted", "resumed", "started", "continued")):
        job_id = event.get("next_job_id") or event.get("job_id")
        if job_id:
            return str(job_id)
    return None


def present_life(run: Run) -> int:
    """The life that goes on now, or the one that waits to begin."""
    started = [int(event["life"]) for event in run.events("started")]
    ended = {event.get("life") for event in run.events("requeued", "continued", "stopped", "finished", "failed")}
    return max(started, default=-1) + (not started or max(started) in ended)


def _start(run: Run, event: str, **details: Any) -> str:
    life = run.lives_started()
    if run.record()["scheduler"] == "slurm":
        from launcher.slurm.plugin import submit_run  # submitit is not needed on this machine alone

        job_id = submit_run(run, life)
        run.append_event(event, life=life, job_id=job_id, **details)
        return job_id
    run.append_event(event, life=life, host=socket.gethostname(), **details)
    return str(start_supervisor(run))


def start_supervisor(run: Run) -> int:
    """A supervisor on this machine, in a session of its own so that it outlives the terminal; returns its pid."""
    environment = {**clean_environment(os.environ), "PYTHONPATH": str(run.code), "PYTHONDONTWRITEBYTECODE": "1"}
    run.submitit.mkdir(mode=0o700, exist_ok=True)
    # Signals stay blocked in the child until it has its handlers: what comes earlier waits instead of killing it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT))
    try:
        with open(run.submitit / "supervisor.log", "ab") as log:
            process = subprocess.Popen(
                [run.record()["python"], "-m", "launcher.supervise", str(run.root)],
                env=environment,
                cwd=run.code,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        raise ActionError(f"{run.record()['python']}: {error.strerror}", code="supervisor") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.returncode = 0  # it outlives us; nobody here waits for it
    return process.pid


def _cancel_here(run: Run, *, now: bool) -> None:
    lease = read_lease(run)
    if lease is not None and is_process_alive(lease):
        with suppress(ProcessLookupError):
            os.kill(lease.pid, signal.SIGQUIT if now else signal.SIGINT)


def _set_aside(run: Run, chosen: Manifest, life: int) -> None:
    aside = run.checkpoints / f"superseded-{life}"
    newer = [run.checkpoint(manifest.step) for manifest in committed(run) if manifest.step > chosen.step]
    for folder in [*newer, *([run.model] if run.model.exists() else [])]:
        aside.mkdir(mode=0o700, exist_ok=True)
        folder.rename(aside / folder.name)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Keeps a second submission of the same run out. A folder, since flock is not cluster-wide everywhere.

    Errors: ActionError when somebody else is at it.
    """
    lock = run.root / ".submitting"
    owner = lock / "owner"
    try:
        lock.mkdir(mode=0o700)
    except FileExistsError:
        if not _is_dead(owner):
            raise ActionError(
                f"{run.id} is being submitted by somebody else", code="submitting", hint=f"if that is not so, remove {lock}"
            ) from None
    write_text(owner, f"{socket.gethostname()} {boot_id()} {os.getpid()} {process_start(os.getpid())}\n")
    try:
        yield
    finally:
        shutil.rmtree(lock, ignore_errors=True)


def _is_dead(owner: Path) -> bool:
    """Whether the process that wrote ``owner`` is known to be gone."""
    try:
        host, boot, pid, start = owner.read_text().split()
    except (OSError, ValueError):
        return False
    return host == socket.gethostname() and (boot != boot_id() or str(process_start(int(pid))) != start)
