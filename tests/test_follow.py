"""Following a run on this machine: until its end, through signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import checkpoint
from launcher.follow import follow
from launcher.run import Run
from launcher.state import Known, state_of
from launcher.submit import submit
from tests.toy_runs import FOREVER, ended, wait_until


def test_follow_until_the_end(local: Callable[..., Run]) -> None:
    run, looks = local(), []
    submit(run)
    assert follow(run, lambda: looks.append(state_of(run, Known())), interval_s=0.05) == "finished"
    assert looks[-1] == "finished" and looks[0] in ("queued", "running")


FOLLOWER = """
import sys
from pathlib import Path
from launcher.follow import follow
from launcher.run import Run
print(follow(Run(Path(sys.argv[1])), lambda: None, interval_s=0.05))
"""


@pytest.mark.parametrize(
    ("sent", "answer", "saved"),
    [
        pytest.param([signal.SIGINT], "stopped", 1, id="INT-saves"),
        pytest.param([signal.SIGTERM], "stopped", 1, id="TERM-saves"),
        pytest.param([signal.SIGHUP], "detached", 0, id="HUP-detaches"),
    ],
)
def test_follow_passes_signals_on(local: Callable[..., Run], sent: list[int], answer: str, saved: int) -> None:
    run = local(**FOREVER)
    submit(run)
    wait_until(run.metrics_file.exists, run)
    follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(run.root)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: "SigCgt" in Path(f"/proc/{follower.pid}/status").read_text() and _catches(follower.pid, signal.SIGHUP), run)
    for number in sent:
        follower.send_signal(number)
    assert follower.communicate(timeout=60)[0].strip() == answer
    assert len(checkpoint.committed(run)) == saved
    assert ended(run) is (answer == "stopped")


def test_second_interrupt_kills_the_ranks(local: Callable[..., Run]) -> None:
    run = local(faults=[{"rank": 0, "step": 3, "what": "hang"}], **FOREVER)
    submit(run)
    wait_until(lambda: run.metrics_file.exists() and len(run.metrics_file.read_text().splitlines()) == 3, run)
    follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(run.root)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: _catches(follower.pid, signal.SIGHUP), run)
    follower.send_signal(signal.SIGINT)
    wait_until(lambda: run.events("stop_requested"), run)
    follower.send_signal(signal.SIGINT)
    assert follower.communicate(timeout=60)[0].strip() == "stopped"
    assert "killed on request" in run.events("stopped")[0]["cause"]


def _catches(pid: int, number: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
