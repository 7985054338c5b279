"""A pretended cluster: Slurm's programs answer from the texts of ``tests/clusters/<name>``, and sbatch runs the script here and now."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.site import slurm_facts
from launcher.site.ask import Cluster
from tests.conftest import REPOSITORY

CLUSTERS = REPOSITORY / "tests" / "clusters"
NAMES = sorted(folder.name for folder in CLUSTERS.iterdir())

PROGRAM = """#!{python} -I
import json, os, pathlib, subprocess, sys
texts, log = pathlib.Path({texts!r}), pathlib.Path({log!r})
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(log, "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
broken = json.loads({broken!r})
for word, what in broken.items():
    if word in (name, *words):
        sys.stderr.write(what.get("err", ""))
        sys.exit(what.get("code", 1))
if name in ("scontrol", "sacctmgr"):
    if words == ["ping"]:
        print("Slurmctld(primary) at login1 is UP")
        sys.exit()
    topic = next(word for word in words[words.index("show") + 1:])
    file = texts / (topic + ".txt")
    if not file.exists():
        sys.stderr.write("sacctmgr: error: You are not running a supported accounting_storage plugin\\n")
        sys.exit(1)
    print(file.read_text(), end="")
elif name == "sbatch" and "--test-only" in words:
    sys.stderr.write("sbatch: Job 9 to start at 2026-11-22T20:15:00 using 1 processors on nodes n1 in partition x\\n")
elif name == "sbatch":
    with open(os.devnull) as nothing:
        subprocess.run(["bash", words[-1]], env={{**os.environ, "SLURM_JOB_ID": "4711", **json.loads({job!r})}}, stdin=nothing, check=False)
    print(4711)
"""


@dataclass(frozen=True)
class FakeCluster:
    log: Path

    def calls(self, tool: str) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == tool]


def make_fake_cluster(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    broken: dict[str, dict[str, object]] | None = None,
    job: dict[str, str] | None = None,
) -> FakeCluster:
    """``broken``: a program or a word of its arguments → how it fails (``err``, ``code``). ``job``: a job's environment."""
    folder.mkdir()
    fake = FakeCluster(folder / "calls.jsonl")
    text = PROGRAM.format(
        python=sys.executable,
        texts=str(CLUSTERS / name),
        log=str(fake.log),
        broken=json.dumps(broken or {}),
        job=json.dumps(job or {}),
    )
    for tool in ("sbatch", "srun", "scontrol", "scancel", "squeue", "sacct", "sacctmgr"):
        (folder / tool).write_text(text)
        (folder / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return fake


def cluster_of(name: str, **changes: str) -> Cluster:
    """The facts of one, without running anything. ``changes``: file → its text instead."""
    texts = {file.stem: file.read_text() for file in (CLUSTERS / name).iterdir()} | changes
    accounts = slurm_facts.table(texts.get("user", ""), ("User", "DefaultAccount"))
    return Cluster(
        slurm_facts.config(texts["config"]),
        tuple(slurm_facts.partitions(texts["partition"])),
        tuple(slurm_facts.nodes(texts["node"])),
        tuple(slurm_facts.reservations(texts["reservation"])),
        tuple(slurm_facts.associations(texts.get("assoc", ""))),
        tuple(slurm_facts.qualities(texts.get("qos", ""))),
        next((row["DefaultAccount"] for row in accounts), None),
    )
