"""The supervisor: starts the ranks of a life, passes a stop on, says how the life ended and whether another follows.

It runs on the host, as the batch step of a Slurm job or as a process of its own on this machine: ``python -m launcher.supervise RUN``.
Standard library only (Python 3.9); it trains nothing and loads no torch. Exit codes: 0 finished (or a follow-up job goes on), 6, 7.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.continuation import Decision, decide, did_a_step, full_time_min, history, newest, whole
from launcher.errors import EXIT_STOPPED, FtlaunchError, GateError, RunFailed, RunStopped
from launcher.node import STOP_DEATHS, TO_THE_RANKS, Node, StepAskedToStop, node_here, node_of_job
from launcher.plan import Plan
from launcher.processes import Ranks
from launcher.run import (
    ExitRecord,
    Lease,
    Run,
    Verdict,
    boot_id,
    may_commit,
    now,
    process_start,
    read_exit_records,
    renew_lease,
    take_lease,
    verdict_of,
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""TERM and USR2 stop the life; INT, from a person, ends automatic continuation as well. QUIT kills the ranks."""

LOOK_S = 0.3
RECORDS_S = 2.0
"""Exit records are looked for this often: a shared file system is not for polling."""
HEARTBEAT_S = 30.0
FIRST_REPEAT_S, LAST_REPEAT_S = 2.0, 16.0
"""A stop is passed on again and again, since a rank may not have had its handlers yet."""
GRACE_S = 5.0
"""After the first bad exit the others get this long to end by themselves and say why."""
CLEAN_BEFORE_REQUEUE_S = 10.0
"""The grace time is for asking Slurm, not for removing files (an image took 38 s); what is left is swept by the next life on the node."""
KILLED_WITHIN_S = 900.0
"""After a requeue was accepted Slurm kills the job; waiting longer than this means it does not."""


class Wish:
    """What signals asked for. Handlers only write here; they are in place before anything else happens."""

    def __init__(self) -> None:
        self.source: str | None = None
        self.cancelled = False
        self.kill = False

    def note(self, number: int, frame: FrameType | None) -> None:
        self.source = self.source or signal.Signals(number).name[3:]
        self.cancelled = self.cancelled or number in (signal.SIGINT, signal.SIGQUIT)
        self.kill = self.kill or number == signal.SIGQUIT


def listen() -> Wish:
    """Take over the signals. Whoever starts the supervisor may have blocked or ignored them until now, so that none kills it."""
    wish = Wish()
    numbers = (*STOP_SIGNALS, signal.SIGQUIT)
    for number in numbers:
        signal.signal(number, wish.note)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return wish


def main(arguments: Sequence[str]) -> int:
    wish = listen()
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m launcher.supervise RUN\n")
        return 2
    return supervise(arguments[0], wish)


def supervise(folder: str, wish: Wish | None = None) -> int:
    """Live once, or on this machine until there is nothing to repeat; returns the exit code. Also what submitit's pickle calls."""
    wish = wish or listen()
    os.umask(0o077)
    run = Run(Path(folder))
    while True:
        life = claim_life(run)
        say = _log(run, life)
        try:
            code = Life(run, life, wish, say).live()
        except FtlaunchError as error:
            say(str(error))
            return _failed(run, life, str(error).splitlines()[0])
        except Exception:
            say(traceback.format_exc())
            cause = f"the supervisor itself failed: {traceback.format_exc().splitlines()[-1]}; see {run.supervisor_log(life)}"
            return _failed(run, life, cause)
        if code is not None:
            return code


def _failed(run: Run, life: int, cause: str) -> int:
    """The end of a run whose supervisor cannot go on; returns the exit code."""
    if not may_commit(run, life):
        return RunStopped.exit_code
    run.append_event("failed", life=life, job_id=os.environ.get("SLURM_JOB_ID"), cause=cause)
    return RunFailed.exit_code


def claim_life(run: Run) -> int:
    """The number of the next life; two supervisors never get the same one."""
    life = run.lives_started()
    while True:
        run.life(life).mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(run.supervisor_log(life), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return life
        except FileExistsError:
            life += 1


@dataclass(frozen=True)
class Life:
    """One stay of a run on nodes, from its lease to its verdict."""

    run: Run
    number: int
    wish: Wish
    say: Callable[[str], None]

    def live(self) -> int | None:
        """The exit code, or None where the next life begins in this process. Errors: FtlaunchError, with which the run has failed."""
        run, plan = self.run, self.run.plan(self.number)
        node = node_of_job(run, plan, self.number) if plan.site["scheduler"] == "slurm" else node_here(run, plan, self.number)
        try:
            lease = take_lease(run, self.number, node.job_id)
        except RuntimeError as error:
            self.say(str(error))
            return RunStopped.exit_code
        restarts = node.job.restarts if node.job else None
        self._event(
            node,
            "started",
            host=socket.gethostname(),
            boot_id=boot_id(),
            pid=os.getpid(),
            pid_start=process_start(os.getpid()),
            nodes=node.names,
            restarts=restarts,
            world_size=plan.world_size,
        )
        self._mind_cancellation()
        try:
            verdict = self._train(plan, node, lease)
        except BaseException:
            node.clean()
            raise
        if verdict.kind == "lost" or not self._is_newest():
            self.say("a newer life owns the run; this one has ended its ranks")
            node.clean()
            return RunStopped.exit_code
        return self._conclude(plan, node, verdict)

    def _train(self, plan: Plan, node: Node, lease: Lease) -> Verdict:
        if self.wish.source is None:
            try:
                for remark in node.prepare(lambda: self.wish.source is not None):
                    self.say(remark)
            except StepAskedToStop as error:
                self.wish.source = str(error)
            except GateError as error:
                return Verdict("failed", str(error), retry=False)
            except FtlaunchError as error:
                return self._before_the_first_step(node) if self.wish.source else Verdict("failed", str(error))
        if self.wish.source is not None:
            return self._before_the_first_step(node)
        ranks = node.start()
        self.say(f"{plan.world_size} ranks started on {', '.join(node.names)}")
        return self._watch(node, ranks, lease)

    def _before_the_first_step(self, node: Node) -> Verdict:
        self._event(node, "stop_requested", source=self.wish.source)
        return Verdict("stopped", "before the first step")

    def _watch(self, node: Node, ranks: Ranks, lease: Lease) -> Verdict:
        """Until every rank has ended, by itself or by our hand."""
        asked = False
        heartbeat = time.monotonic() + HEARTBEAT_S
        repeat_at, repeat_s, records_at, deadline = 0.0, FIRST_REPEAT_S, 0.0, float("inf")
        while not ranks.all_ended():
            clock = time.monotonic()
            if self.wish.source is not None and not asked:
                asked = True
                self.say(f"stop requested by {self.wish.source}")
                self._event(node, "stop_requested", source=self.wish.source)
            if asked and clock >= repeat_at:
                ranks.pass_on(signal.SIGUSR2)
                repeat_at, repeat_s = clock + repeat_s, min(2 * repeat_s, LAST_REPEAT_S)
            if clock >= heartbeat:
                heartbeat = clock + HEARTBEAT_S
                if not self._is_ours(lease):
                    ranks.kill()
                    return Verdict("lost")
            if deadline == float("inf") and (_any_bad(ranks.exit_codes().values()) or (clock >= records_at and self._left_bad_record())):
                deadline = clock + GRACE_S
            if clock >= records_at:
                records_at = clock + RECORDS_S
            if self.wish.kill or clock >= deadline:
                break
            time.sleep(LOOK_S)
        codes = ranks.exit_codes()
        ranks.kill()
        return self._verdict(node, codes, ranks, asked)

    def _is_ours(self, lease: Lease) -> bool:
        """Heartbeat. A file system that fails for a moment, or is full, must not end the training."""
        try:
            self._mind_cancellation()
            return renew_lease(self.run, lease)
        except OSError as error:
            self.say(f"no heartbeat: {error}")
            return True

    def _is_newest(self) -> bool:
        """Asked before anything is concluded: rank 0 sees a newer life at its next step, long before our next heartbeat."""
        try:
            return may_commit(self.run, self.number)
        except OSError as error:
            self.say(f"the lease could not be read: {error}")
            return True

    def _left_bad_record(self) -> bool:
        try:
            return _any_bad(record.exit_code for record in read_exit_records(self.run, self.number))
        except OSError:
            return False

    def _verdict(self, node: Node, codes: dict[int, int], ranks: Ranks, asked: bool) -> Verdict:
        """From exit codes and exit records; the rank that ended badly first gives the cause."""
        records = {record.rank: record for record in read_exit_records(self.run, self.number)}
        codes = in_order_of_failure(codes, records)
        self.say(f"exit codes by rank: {codes}")
        if self.wish.kill:
            return Verdict("stopped", "the ranks were killed on request")
        if not asked and codes and set(codes.values()) <= {0, EXIT_STOPPED, *STOP_DEATHS} and set(codes.values()) != {0}:
            asked = True
            self._event(node, "stop_requested", source=TO_THE_RANKS)
        verdict = verdict_of(codes, asked)
        if verdict.kind == "stopped" and verdict.cause and not self.wish.cancelled and did_a_step(self.run, self.number):
            verdict = Verdict("failed", f"stopped {verdict.cause}")
        if not verdict.cause:
            return verdict
        rank = next((rank for rank, code in codes.items() if _any_bad([code])), None)
        reason = records[rank].reason if rank in records else ranks.last_words()
        log = "" if rank is None else f"see {self.run.rank_log(self.number, rank)}"
        return Verdict(verdict.kind, "; ".join(filter(None, (verdict.cause, reason, log))), verdict.retry)

    def _conclude(self, plan: Plan, node: Node, verdict: Verdict) -> int | None:
        """Record the verdict, then end the run or go on with it."""
        checkpoint = newest(self.run)
        step = checkpoint.step if checkpoint else 0
        if checkpoint and not whole(self.run, checkpoint):
            self.say(f"the newest checkpoint, step {step}, is not whole; the next life falls back to the one before")
        if verdict.kind == "failed":
            self.say(f"crashed: {verdict.cause}")
            self._event(node, "crashed", cause=verdict.cause, checkpoint=step)
        self._mind_cancellation()
        decision = decide(verdict, history(self.run, plan), plan, cancelled=self.wish.cancelled)
        if decision.event == "again" and node.job is not None:
            return self._go_on(plan, node, step, decision)
        node.clean()
        if decision.event == "again":
            self.say("another life follows")
            return None
        self._event(node, decision.event, step=step, cause=decision.cause or None)
        self.say(" ".join(filter(None, (decision.event, decision.cause))))
        return {"finished": 0, "failed": RunFailed.exit_code, "stopped": RunStopped.exit_code}[decision.event]

    def _go_on(self, plan: Plan, node: Node, step: int, decision: Decision) -> int:
        """Another life through Slurm: the same job again, or a job that follows this one."""
        assert node.job is not None
        refused = ""
        if plan.site["continuation"] == "requeue":
            node.clean(within_s=CLEAN_BEFORE_REQUEUE_S)
            answer, reason = node.job.requeue()
            if answer == "accepted":
                self._event(node, "requeued", step=step, cause=decision.cause or None)
                self.say(" ".join(filter(None, ("requeued", reason))))
                return self._wait_to_be_killed()
            if answer == "cancelled":
                self._event(node, "stopped", step=step, cause=reason, cancelled=True)
                self.say(reason)
                return RunStopped.exit_code
            refused = f"requeue refused: {reason}"
            self.say(refused)
        try:
            job_id = node.job.follow_up(self.run.job_file(self.number), full_time_min(self.run))
        except FtlaunchError as error:
            cause = "; ".join(filter(None, (decision.cause, refused, str(error), f"to go on, type: ftlaunch resume {self.run.root}")))
            self._event(node, "stopped", step=step, cause=cause)
            self.say(cause)
            return RunStopped.exit_code
        self._event(node, "continued", step=step, next_job_id=job_id, cause=refused or None)
        node.clean()
        self.say(f"job {job_id} follows this one")
        return 0

    def _wait_to_be_killed(self) -> int:
        """Returning would end the batch step, and the job would count as completed instead of requeued."""
        end = time.monotonic() + KILLED_WITHIN_S
        while time.monotonic() < end:
            time.sleep(1)
        self.say("Slurm accepted the requeue and did not end this job")
        return RunStopped.exit_code

    def _mind_cancellation(self) -> None:
        """A person may have ended the run before this supervisor could hear a signal: ``cancel`` writes first and signals then."""
        said = self.run.events("submitted", "resumed", "cancel_requested")
        if said and said[-1]["event"] == "cancel_requested" and said[-1]["life"] == self.number:
            self.wish.cancelled = True
            self.wish.source = self.wish.source or "cancel"

    def _event(self, node: Node, event: str, **details: object) -> None:
        for last in (False, False, True):
            try:
                self.run.append_event(event, life=self.number, job_id=node.job_id, **details)
                return
            except OSError as error:
                self.say(f"event {event} could not be written: {error}")
                if last:
                    return
                time.sleep(1)


def in_order_of_failure(codes: Mapping[int, int], records: Mapping[int, ExitRecord]) -> dict[int, int]:
    """Exit codes with those of bad records added, ordered so that the first bad one is the cause and the others its consequence.

    They come in the order in which they were seen, deaths by signal first; of ranks that left records, those know it better.
    """
    codes = {**codes, **{rank: record.exit_code for rank, record in records.items() if _any_bad([record.exit_code]) and rank not in codes}}
    told = [rank for rank, code in codes.items() if _any_bad([code]) and rank in records]
    by_time = iter(sorted(told, key=lambda rank: records[rank].time))
    order = [next(by_time) if rank in told else rank for rank in codes]
    return {rank: codes[rank] for rank in order}


def _any_bad(codes: Iterable[int]) -> bool:
    return any(code not in (0, EXIT_STOPPED) for code in codes)


def _log(run: Run, life: int) -> Callable[[str], None]:
    """Writes a line to the life's own log and to the batch step's."""

    def say(message: str) -> None:
        line = f"{now()} life {life}: {message}\n"
        with suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()
        with suppress(OSError), open(run.supervisor_log(life), "a", encoding="utf-8") as log:
            log.write(line)

    return say


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
