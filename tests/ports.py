"""Ports that stay free until who asked for one binds it."""

from __future__ import annotations

import secrets
import socket

RANGE = range(30000, 32768)
"""Below the ports that Linux hands out by itself, above those of the tests' Slurm."""


def free_port() -> int:
    """On the loopback interface; unlike a port that the system chose, it is not handed out to somebody else a moment later."""
    for _ in range(100):
        port = secrets.choice(RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"no free port in {RANGE}")
