"""Forks ranks from a process that has imported the libraries once, since that takes longer than a tiny run. A program, and its client.

The program reads one life a line, ``{"run", "life", "ranks", "port", "stop_at"}``, and answers with the ranks' exit codes. A rank is what
``python -m launcher.train`` makes of it: its environment, its log, its signals, its exit record.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.node import free_port

SOURCE = Path(__file__).parents[2]
PATIENCE_S = 240


class RankServer:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def train(self, run: Any, *, life: int = 0, stop_at: int | None = None) -> list[int]:
        """Exit codes by rank. ``stop_at``: rank 0 gets USR2 while it computes this step."""
        run.life(life).mkdir(parents=True, exist_ok=True)
        wanted = {"run": str(run.root), "life": life, "ranks": run.plan(life).world_size, "port": free_port(), "stop_at": stop_at}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        for rank, code in enumerate(codes):
            if code > 0 and code != 85:
                sys.stderr.write(f"--- rank {rank}, life {life}: exit code {code}\n{run.rank_log(life, rank).read_text()[-1200:]}\n")
        return codes


@contextmanager
def serve_ranks() -> Iterator[RankServer]:
    environ = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen([sys.executable, __file__], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield RankServer(process)
        process.stdin.close()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    import accelerate  # noqa: F401
    import transformers.optimization  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models import gpt_bigcode, llama, starcoder2  # noqa: F401

    import launcher.train.engine_fsdp
    import launcher.train.engine_plain
    import launcher.train.engine_zero
    import launcher.train.loop  # noqa: F401
    from launcher.train.live import live

    for line in sys.stdin:
        wanted = json.loads(line)
        children = [os.fork() or _rank(wanted, rank, live) for rank in range(wanted["ranks"])]
        answers.write(json.dumps(_wait(children)) + "\n")
        answers.flush()


def _wait(children: list[int]) -> list[int]:
    """Exit codes; ranks that outlive one which failed are killed, as the supervisor does."""
    codes: dict[int, int] = {}
    deadline_s = time.monotonic() + PATIENCE_S
    while len(codes) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
        if time.monotonic() > deadline_s or any(code not in (0, 85) for code in codes.values()):
            for child in set(children) - codes.keys():
                grace_s = time.monotonic() + 10  # to leave an exit record
                while time.monotonic() < grace_s and not _ended(child, codes):
                    time.sleep(0.01)
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


def _ended(child: int, codes: dict[int, int]) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        codes[child] = os.waitstatus_to_exitcode(status)
    return bool(pid)


def _rank(wanted: dict[str, Any], rank: int, live: Any) -> Any:
    from launcher.run import Run
    from launcher.train.order import Order
    from launcher.train.stop import listen

    stop = listen()
    log = os.open(Run(Path(wanted["run"])).rank_log(wanted["life"], rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    world = {"RANK": rank, "WORLD_SIZE": wanted["ranks"], "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": wanted["port"]}
    os.environ.update({name: str(value) for name, value in world.items()}, FTLAUNCH_LIFE=str(wanted["life"]))
    samples = Order.samples

    def samples_and_signal(order: Order, step: int) -> Any:
        if rank == 0 and step == wanted["stop_at"]:
            os.kill(os.getpid(), signal.SIGUSR2)
        return samples(order, step)

    Order.samples = samples_and_signal
    live([wanted["run"]], stop)


if __name__ == "__main__":
    _serve()
