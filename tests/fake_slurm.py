"""Slurm's programs as small scripts on PATH that answer what a test wrote down, and write down what they were asked."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sacct")

PROGRAM = """#!{python} -I
import json, os, pathlib, signal, sys, time
here, name = pathlib.Path({folder!r}), pathlib.Path(sys.argv[0]).name
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({{"argv": [name, *sys.argv[1:]], "cwd": os.getcwd(), "env": dict(os.environ)}}) + "\\n")
answers = json.loads((here / f"{{name}}.json").read_text())
answer = answers.pop(0) if len(answers) > 1 else answers[0]
(here / f"{{name}}.json").write_text(json.dumps(answers))
if answer.get("interrupts"):
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(answer.get("sleep_s", 0))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""


@dataclass(frozen=True)
class FakeSlurm:
    folder: Path

    def answer(self, tool: str, *answers: dict[str, object]) -> None:
        """What ``tool`` says from now on, one call after the other; the last answer stays.

        ``out``, ``err``, ``code``; ``sleep_s`` before it answers; ``interrupts``: a Ctrl-C reaches the caller meanwhile.
        """
        (self.folder / f"{tool}.json").write_text(json.dumps(answers))

    def calls(self, tool: str) -> list[dict[str, object]]:
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if call["argv"][0] == tool]

    @property
    def tools(self) -> dict[str, str]:
        return {tool: str(self.folder / tool) for tool in TOOLS}


def make_fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(folder)
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
        (folder / tool).chmod(0o755)
        fake.answer(tool, {})
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return fake
