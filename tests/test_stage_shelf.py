"""Folders that exist whole or not at all: locks, takeover from the dead, sweeping. Real processes, real SIGKILL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ActionError
from launcher.run import boot_id
from launcher.stage.shelf import make, read_facts

KILLED = """
import os, signal, sys
from pathlib import Path
from launcher.stage.shelf import make

def build(folder):
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)

make(Path(sys.argv[1]), build, print, resumable=sys.argv[2] == "resumable")
"""


def build(folder: Path) -> dict[str, Any]:
    (folder / "content").write_text("whole")
    return {"number": 1}


def refuse(*_: object) -> Any:
    raise AssertionError("must not be called")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "shelf" / "thing"
    assert make(folder, build, refuse) == {"number": 1}
    assert names(folder) == ["content", "facts.json"]
    assert make(folder, refuse, refuse) == {"number": 1}
    assert names(tmp_path / "shelf") == ["thing"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        build(folder)
        raise ActionError("no")

    with pytest.raises(ActionError):
        make(tmp_path / "thing", fail, refuse)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["swept", "resumable"])
def test_what_a_killed_build_left_does_not_count(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "thing"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), kind])
    assert killed.returncode == -signal.SIGKILL
    assert read_facts(folder) is None
    assert len(names(tmp_path)) == 2, "a lock and a temporary folder"
    seen = []

    def look(temporary: Path) -> dict[str, Any]:
        seen.extend(names(temporary))
        return build(temporary)

    make(folder, look, refuse, resumable=kind == "resumable")
    assert seen == (["half"] if kind == "resumable" else [])
    assert names(tmp_path) == ["thing"]


def test_the_second_of_two_waits_and_takes_what_the_first_made(tmp_path: Path) -> None:
    building, waiting = threading.Event(), threading.Event()
    told: list[str] = []

    def slow(folder: Path) -> dict[str, Any]:
        building.set()
        assert waiting.wait(60)
        return build(folder)

    def say(line: str) -> None:
        told.append(line)
        waiting.set()

    first = threading.Thread(target=make, args=(tmp_path / "thing", slow, refuse))
    first.start()
    assert building.wait(60)
    assert make(tmp_path / "thing", refuse, say) == {"number": 1}
    first.join()
    assert len(told) == 1
    assert "another staging of thing" in told[0]
    assert names(tmp_path) == ["thing"]


def foreign_lock(folder: Path, heartbeat: str) -> None:
    folder.mkdir()
    lease = {"life": 0, "job_id": None, "host": "elsewhere", "boot_id": "x", "pid": 1, "pid_start": 1, "heartbeat": heartbeat}
    (folder / "lease.json").write_text(json.dumps(lease))


class StillWaiting(Exception):
    pass


def stop_waiting(line: str) -> None:
    raise StillWaiting(line)


def test_a_silent_holder_elsewhere_is_replaced(tmp_path: Path) -> None:
    foreign_lock(tmp_path / ".lock-thing", "2020-01-01T00:00:00.000Z")
    assert make(tmp_path / "thing", build, refuse) == {"number": 1}
    assert names(tmp_path) == ["thing"]


def test_a_holder_elsewhere_with_a_heartbeat_is_waited_for(tmp_path: Path) -> None:
    foreign_lock(tmp_path / ".lock-thing", "2999-01-01T00:00:00.000Z")
    with pytest.raises(StillWaiting, match="process 1 on elsewhere"):
        make(tmp_path / "thing", refuse, stop_waiting)


def test_a_lock_without_a_lease_is_just_begun(tmp_path: Path) -> None:
    (tmp_path / ".lock-thing").mkdir()
    with pytest.raises(StillWaiting, match="just begun"):
        make(tmp_path / "thing", refuse, stop_waiting)


def test_a_holder_of_an_earlier_boot_is_dead(tmp_path: Path) -> None:
    import socket

    foreign_lock(tmp_path / ".lock-thing", "2999-01-01T00:00:00.000Z")
    lease = json.loads((tmp_path / ".lock-thing/lease.json").read_text())
    lease.update(host=socket.gethostname(), boot_id="not " + boot_id())
    (tmp_path / ".lock-thing/lease.json").write_text(json.dumps(lease))
    assert make(tmp_path / "thing", build, refuse) == {"number": 1}


def test_one_who_was_replaced_does_not_commit(tmp_path: Path) -> None:
    def replaced(folder: Path) -> dict[str, Any]:
        lease = json.loads((tmp_path / ".lock-thing/lease.json").read_text())
        (tmp_path / ".lock-thing/lease.json").write_text(json.dumps({**lease, "pid": 1}))
        return build(folder)

    with pytest.raises(ActionError, match="took over"):
        make(tmp_path / "thing", replaced, refuse)
    assert names(tmp_path) == [".lock-thing"]


def test_damaged_facts_are_said(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text("{")
    with pytest.raises(ActionError, match="is damaged"):
        read_facts(tmp_path)
