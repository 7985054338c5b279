"""The ranks of one life as processes: started, looked at, signalled, killed. Standard library only (Python 3.9).

Two kinds with the same verbs: children of the supervisor on this machine, or the tasks behind one ``srun``. What an exit means is
decided elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

PR_SET_PDEATHSIG = 1

_GUARD = "exec 3<&0; (read _ <&3; kill -KILL 0) &"
"""Leaves one process behind that kills its own process group when the pipe on its standard input is closed."""

_TASKS_ENDED = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)
_EXITED = re.compile(r"^Exited with exit code (\d+)$")
_SIGNAL_NUMBERS = {signal.strsignal(number): int(number) for number in signal.valid_signals()}


class Ranks(Protocol):
    def exit_codes(self) -> dict[int, int]:
        """Rank → exit code (negative: killed by that signal) of those that ended, in the order in which it was seen."""

    def all_ended(self) -> bool: ...

    def pass_on(self, number: int) -> None:
        """Send a signal to every rank that still runs."""

    def kill(self) -> None:
        """Also what ranks that have ended left running. Nothing can be done with them afterwards but to ask how they ended."""

    def last_words(self) -> str:
        """One line about what went wrong outside the ranks themselves, or nothing."""


class LocalRanks:
    """One child process for each rank, all in one process group. They die with the supervisor, whatever kills it.

    The death signal reaches a child of ours alone, and in a container the rank is a grandchild. So a guard in the group waits for the
    end of a pipe that only we hold open. It is nobody's child, and as long as it lives the group's number is not given away.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], logs: Sequence[Path], cwd: Path
    ) -> None:
        self._codes: dict[int, int] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        held_by_guard, lifeline = os.pipe()
        self._lifeline = os.fdopen(lifeline, "wb")  # closed on exec: no rank inherits it
        try:
            self._group = _start_guard(held_by_guard)
        finally:
            os.close(held_by_guard)
        before_exec = die_with(os.getpid(), self._group)
        try:
            for command, environment, log in zip(commands, environments, logs):
                with open(log, "ab") as output:
                    self._processes.append(
                        subprocess.Popen(
                            list(command),
                            env=dict(environment),
                            cwd=cwd,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            preexec_fn=before_exec,  # safe: the supervisor has one thread
                        )
                    )
        except BaseException:
            self.kill()
            raise

    def exit_codes(self) -> dict[int, int]:
        ended = {
            rank: code for rank, process in enumerate(self._processes) if rank not in self._codes and (code := process.poll()) is not None
        }
        # Seen in one look, a death by signal came first: the others fail because their peer is gone.
        self._codes.update(sorted(ended.items(), key=lambda item: item[1] >= 0))
        return dict(self._codes)

    def all_ended(self) -> bool:
        return len(self.exit_codes()) == len(self._processes)

    def pass_on(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)

    def kill(self) -> None:
        if not self._lifeline.closed:
            with suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)
            self._lifeline.close()
        for process in self._processes:
            process.wait()

    def last_words(self) -> str:
        return ""


class StepRanks:
    """The tasks of one Slurm step, behind the ``srun`` that started them."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], world_size: int, log: Path) -> None:
        self._log, self._world_size = log, world_size
        self._codes: dict[int, int] = {}
        with open(log, "ab") as output:
            self._start = output.tell()
            self._srun = subprocess.Popen(
                list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def exit_codes(self) -> dict[int, int]:
        code = self._srun.poll()
        for rank, ended in tasks_ended(self._said()):
            self._codes.setdefault(rank, ended)
        if code is not None:
            # srun names every task that did not end with 0; where it names none it speaks of itself.
            rest = 0 if any(self._codes.values()) else code
            for rank in range(self._world_size):
                self._codes.setdefault(rank, rest)
        return dict(self._codes)

    def all_ended(self) -> bool:
        return self._srun.poll() is not None

    def pass_on(self, number: int) -> None:
        """``srun`` forwards it to the main process of every task on every node."""
        assert number not in (signal.SIGTERM, signal.SIGHUP), "srun takes those as the order to kill"
        self._srun.send_signal(number)

    def kill(self) -> None:
        """``srun`` answers TERM by killing every task."""
        self._srun.send_signal(signal.SIGTERM)
        try:
            self._srun.wait(timeout=60)
        except subprocess.TimeoutExpired:  # a node is gone; the tasks die with the job
            self._srun.kill()
            self._srun.wait()

    def last_words(self) -> str:
        lines = [line for line in self._said().splitlines() if line.strip() and not _TASKS_ENDED.match(line)]
        return next((line for line in lines if "error" in line), lines[-1] if lines else "").strip()

    def _said(self) -> str:
        with open(self._log, "rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


def tasks_ended(said: str) -> list[tuple[int, int]]:
    """(rank, exit code) pairs from what ``srun`` writes when tasks end with anything but 0, in its order.

    ``srun: error: node1: tasks 0-1,3: Exited with exit code 85``, ``srun: error: node2: task 2: Killed``.
    """
    pairs = []
    for tasks, text in _TASKS_ENDED.findall(said):
        exited = _EXITED.match(text)
        code = int(exited[1]) if exited else -_SIGNAL_NUMBERS.get(text, signal.SIGKILL)
        for part in tasks.split(","):
            first, _, last = part.partition("-")
            pairs += [(rank, code) for rank in range(int(first), int(last or first) + 1)]
    return pairs


def die_with(parent: int, group: int = 0) -> Callable[[], None]:
    """What a child does between fork and exec: into ``group`` (0: its own), killed when ``parent`` dies, deaf to a stop until it has
    handlers of its own.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        os.setpgid(0, group)
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    return before_exec


def _start_guard(lifeline: int) -> int:
    """Begin a process group with nothing but a guard in it; returns its number."""
    quiet = subprocess.DEVNULL
    shell = subprocess.Popen(["sh", "-c", _GUARD], stdin=lifeline, stdout=quiet, stderr=quiet, preexec_fn=die_with(os.getpid()))
    assert shell.wait() == 0
    return shell.pid
