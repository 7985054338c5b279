"""From a run folder to a job: submit, resume, cancel. The supervisor does the rest on its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.checkpoint import Manifest, committed
from launcher.errors import ActionError, UsageError
from launcher.files import write_text
from launcher.plan import Plan, write_plan
from launcher.run import Run, boot_id, is_process_alive, process_start, read_lease
from launcher.runs import code_sha, copy_code
from launcher.slurm.queue import look_up
from launcher.slurm.tools import Unanswered, after_options, call, clean_environment

OTHER_SUBMISSION_S = 30.0
"""How long a submission waits for another one of the same run: an answer of sbatch takes seconds."""


class AlreadyGoing(ActionError):
    """Somebody else submitted or resumed this run, or it went on, between the caller's look and our attempt."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"{run.id} went on in the meantime", code="already-going", hint=f"see ftlaunch status {run.id}")
        self.run = run


def turns(run: Run) -> int:
    """How often the run was sent on its way. Read before looking at its state, it tells whether that state still counts."""
    return len(run.events("submitted", "resumed", "started", "continued"))


def submit(run: Run, *, after: Sequence[str] = (), details: Mapping[str, Any] = {}) -> str:
    """Hand a fresh run to Slurm, or to a supervisor of its own session on this machine; returns the job id or the supervisor's pid.

    ``after``: jobs that must have ended well before it begins. ``details``: more for the event of the submission.

    Errors: ActionError (5) with the scheduler's own reason, after which the run is gone again; Unanswered (5) when a job may have been
    accepted, so that the run stays; AlreadyGoing (5) when it is not fresh any more.
    """
    with _alone(run), ExitStack() as undo:
        _still(run, 0)
        undo.callback(shutil.rmtree, run.root)
        return _start(run, run.lives_started(), "submitted", undo, after, **details)


def resume(
    run: Run,
    *,
    seen: int | None = None,
    from_checkpoint: str | None = None,
    code_current: bool = False,
    plan: Plan | None = None,
    job_script: str | None = None,
    after: Sequence[str] = (),
    details: Mapping[str, Any] = {},
) -> str:
    """Begin another life of a run; returns the job id or the supervisor's pid. That it does not live already is the caller's to see.

    ``seen``: ``turns`` before the caller looked. ``from_checkpoint``: ``epoch-2`` or ``step-100``; newer checkpoints are set aside.
    ``plan`` and ``job_script``: what is changed from this life on. ``after``, ``details``: as for ``submit``.
    Errors: UsageError when there is no such checkpoint or the plan is
    another run's, AlreadyGoing, ActionError; after each the run is as it was, except after Unanswered: a job may have been accepted.
    """
    if plan is not None and plan.identity != run.plan(run.lives_started()).identity:
        raise UsageError("this would change what determines the weights", code="identity", hint="submit it as a run of its own")
    with _alone(run), ExitStack() as undo:
        if seen is not None:
            _still(run, seen)
        life = run.lives_started()
        chosen = None if from_checkpoint is None else find_checkpoint(run, from_checkpoint)
        folder = run.life(life)
        _make_folder(folder, undo)
        if chosen is not None:
            _set_aside(run, chosen, life, undo)
        if plan is not None:
            _put_back_on_error(folder / "plan.json", undo)
            write_plan(plan, folder / "plan.json")
            if plan.preset["parallelism"].startswith("zero"):
                from launcher.render import deepspeed_config  # jinja2 only where it is needed

                _put_back_on_error(folder / "ds_config.json", undo)
                write_text(folder / "ds_config.json", deepspeed_config(plan))
        if job_script is not None:
            _put_back_on_error(folder / "job.sbatch", undo)
            write_text(folder / "job.sbatch", job_script)
        if code_current:
            _swap_code(run, folder, undo)
        own = {"from_step": chosen.step if chosen else None, "code": code_sha(run) if code_current else None}
        return _start(run, life, "resumed", undo, after, **own, **details)


def cancel(run: Run, *, now: bool) -> None:
    """End a run for good: with a checkpoint, or at once. A job that still waits just leaves the queue. Errors: ActionError."""
    life = present_life(run)
    run.append_event("cancel_requested", life=life, now=now)
    job_id = last_job_id(run)
    if job_id is None:
        _cancel_here(run, now=now)
        return
    scancel = run.record()["tools"]["scancel"]
    for event in run.events("staging")[-1:]:  # jobs before the training's: what they made so far is kept
        call([scancel, *event["jobs"].values()])
    if not now:
        waiting = call([scancel, "--state=PENDING", job_id])
        if waiting.code == 0 and look_up([job_id], run.record()["tools"])[job_id].state in ("cancelled", "gone"):
            _note_cancelled(run, job_id)
            return
        asked = call([scancel, "--batch", "--signal=INT", job_id])
        if waiting.code != 0 and asked.code != 0:
            raise ActionError(f"scancel: {asked.reason}", code="scancel")
        return
    answer = call([scancel, job_id])
    if answer.code != 0 and look_up([job_id], run.record()["tools"])[job_id].state in ("pending", "running", "ending", "unknown"):
        raise ActionError(f"scancel: {answer.reason}", code="scancel")
    _note_cancelled(run, job_id)


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
    last = run.lives_started() - 1
    ended = {event.get("life") for event in run.events("requeued", "continued", "stopped", "finished", "failed")}
    asked_for = max((int(event["life"]) for event in run.events("submitted", "resumed")), default=0)
    return max(asked_for, last + (last in ended))


def _start(run: Run, life: int, event: str, undo: ExitStack, after: Sequence[str] = (), **details: Any) -> str:
    """Send the life on its way and write so. From then on, and when it may be, ``undo`` has nothing to undo any more."""
    if run.record()["scheduler"] == "slurm":
        return _start_on_slurm(run, life, event, undo, after, **details)
    with _signals_held():
        run.append_event(event, life=life, host=socket.gethostname(), **details)
        try:
            pid = start_supervisor(run)
        except ActionError as error:
            run.append_event("failed", cause=str(error))
            raise
        undo.pop_all()
    return str(pid)


def _start_on_slurm(run: Run, life: int, event: str, undo: ExitStack, after: Sequence[str], **details: Any) -> str:
    from launcher.slurm.plugin import submit_run  # submitit is not needed on this machine alone

    with _signals_held():
        try:
            job_id = submit_run(run, life, options=after_options(after))
        except Unanswered:
            undo.pop_all()
            raise
        undo.pop_all()
        run.append_event(event, life=life, job_id=job_id, **details)
    return job_id


@contextmanager
def _signals_held() -> Iterator[None]:
    """INT and TERM wait: between sbatch's answer and our note of it they would lose a job.

    By handlers, not by a mask: where a library has started threads, a signal comes in through one that does not block it.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for heard in dict.fromkeys(held):
        signal.raise_signal(heard)


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


def _note_cancelled(run: Run, job_id: str) -> None:
    """Without a life: a job that waited is resumed under the same number, and only what came after that counts then."""
    run.append_event("cancelled", job_id=job_id)


def _still(run: Run, seen: int) -> None:
    if turns(run) != seen:
        raise AlreadyGoing(run)


def _set_aside(run: Run, chosen: Manifest, life: int, undo: ExitStack) -> None:
    aside = run.checkpoints / f"superseded-{life}"
    newer = [run.checkpoint(manifest.step) for manifest in committed(run) if manifest.step > chosen.step]
    for folder in [*newer, *([run.model] if run.model.exists() else [])]:
        _make_folder(aside, undo)
        _move(folder, aside / folder.name, undo)


def _swap_code(run: Run, folder: Path, undo: ExitStack) -> None:
    """Put the code that runs now in the place of the run's. What it replaces stays beside the life's files."""
    new, present, before = folder / "code-new", run.code / "launcher", folder / "code-before"
    undo.callback(shutil.rmtree, new, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
    copy_code(new)
    number = 2
    while before.exists():  # resumed before with current code, and cancelled while it waited
        before = folder / f"code-before-{number}"
        number += 1
    _move(present, before, undo)
    _move(new, present, undo)


def _make_folder(folder: Path, undo: ExitStack) -> None:
    """Make ``folder``; an error removes it again if it is empty."""
    if not folder.exists():
        undo.callback(_remove_if_empty, folder)
        folder.mkdir(mode=0o700, parents=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _move(source: Path, target: Path, undo: ExitStack) -> None:
    undo.callback(_move_back, source, target)  # first, since an interrupt may come right after the move
    source.rename(target)


def _move_back(source: Path, target: Path) -> None:
    if not source.exists():
        target.rename(source)


def _put_back_on_error(file: Path, undo: ExitStack) -> None:
    if file.exists():
        undo.callback(write_text, file, file.read_text(encoding="utf-8"))
    else:
        undo.callback(file.unlink, missing_ok=True)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Keeps a second submission of the same run waiting. A folder, since flock is not cluster-wide everywhere.

    Errors: ActionError when somebody else is at it for longer than ``OTHER_SUBMISSION_S``.
    """
    lock = run.root / ".submitting"
    end = time.monotonic() + OTHER_SUBMISSION_S
    while not _made(lock) and not (_moved_away(lock) and _made(lock)):
        if time.monotonic() > end:
            raise ActionError(f"{run.id} is being submitted by somebody else", code="submitting", hint=f"if that is not so, remove {lock}")
        time.sleep(0.1)
    try:
        write_text(lock / "owner", f"{socket.gethostname()} {boot_id()} {os.getpid()} {process_start(os.getpid())}\n")
        yield
    finally:
        shutil.rmtree(lock, ignore_errors=True)


def _made(lock: Path) -> bool:
    try:
        lock.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise ActionError(f"{lock.parent} is gone: its submission was refused", code="no-run") from None
    return True


def _moved_away(lock: Path) -> bool:
    """Move the lock of a process that is known to be gone out of the way; False when it may live.

    It stays under its owner's name, so that a lock of a living process is never moved in its place by who looked a moment ago.
    """
    try:
        host, boot, pid, start = (lock / "owner").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return False
    if host != socket.gethostname() or (boot == boot_id() and str(process_start(int(pid))) == start):
        return False
    with suppress(OSError):  # somebody else was faster
        lock.rename(lock.with_name(f"{lock.name}-{boot}-{pid}-{start}"))
    return True
