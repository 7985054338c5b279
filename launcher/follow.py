"""Waits for a run on this machine and hands the terminal's signals to its supervisor. Prints nothing: the caller shows what it likes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Literal

from launcher.run import Run, State, is_process_alive, read_lease
from launcher.state import Known, state_of

LOOK_S = 0.3

Ended = Literal["detached"] | State


def follow(run: Run, look: Callable[[], None], *, interval_s: float = LOOK_S) -> Ended:
    """Call ``look`` every ``interval_s`` until the run has ended here; returns its state then, or ``detached`` after a HUP.

    The first INT or TERM is passed on as a stop and waited for, a second INT kills the ranks.
    """
    heard: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while True:
            state = state_of(run, Known())
            look()
            if state not in ("queued", "running", "stopping", "continuing"):
                return state
            if signal.SIGHUP in heard:
                return "detached"
            if heard:
                # Sent again at every look: the supervisor minds repetition as little as the ranks do.
                _send(run, signal.SIGQUIT if heard.count(signal.SIGINT) > 1 else signal.SIGINT)
            time.sleep(interval_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(run: Run, number: int) -> None:
    """To the supervisor, if it has begun its life and is on this machine."""
    lease = read_lease(run)
    if lease is not None and is_process_alive(lease):
        with suppress(ProcessLookupError):
            os.kill(lease.pid, number)
