"""The wish to stop: TERM and USR2 set a flag and do nothing else. Imported before everything, so it imports next to nothing."""

from __future__ import annotations

import signal


class Stop:
    """Whether this rank was asked to stop. What to do about it is agreed between the ranks, in the loop."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, *_: object) -> None:
        self.requested = True


def listen() -> Stop:
    """Install the handlers; any number of signals in any order has the effect of one."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, stop.request)
    return stop
