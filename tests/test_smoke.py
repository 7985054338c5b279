"""``submit --smoke``: a short run that is stopped and resumed on purpose, and what its verdict says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import metrics
from launcher.cli import smoke as smoke_module
from launcher.cli.line import Wish, read
from launcher.cli.smoke import STEPS, Seen, epochs_for, failed, smoke, smoke_line, smoke_settings, verdict
from launcher.run import Run
from tests.plans import plan_of, preset
from tests.toy import toy_plan, toy_run

SITE = """\
extends: slurm
name: testing
source: a test
partitions:
  long: {max_time: 48h}
  short: {max_time: 10m, test: true}
default_partition: long
runs: /r
images: /i
data: /d
"""


@pytest.mark.train
def test_on_this_machine(tmp_path: Path) -> None:
    environment = {**os.environ, "FTLAUNCH_DATA": str(tmp_path / "data"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "launcher.cli", "submit", "tiny", "--smoke", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] and all(line["ok"] for line in document["verdict"])
    assert Run(Path(document["folder"])).lives_started() == 2


def test_settings_keep_what_is_tried_and_shorten_the_rest() -> None:
    plan = plan_of(preset(gpus=4, training={"effective_batch": 256, "micro_batch": 2}))[0]
    settings = dict(setting.split("=") for setting in smoke_settings(plan))
    assert (settings["training.effective_batch"], settings["data.num_samples"]) == ("8", str(8 * STEPS + 1))
    packed = plan_of(preset(gpus=4, data={"name": "a/c", "packing": "documents"}, training={"effective_batch": 256, "micro_batch": 2}))[0]
    assert f"data.num_samples={8 * STEPS * 4 + 1}" in smoke_settings(packed), "rows of 1024 tokens"
    assert not settings.keys() & {"training.micro_batch", "training.dtype", "attention", "parallelism", "gpus", "nodes"}


@pytest.mark.parametrize(
    ("options", "partition", "time"),
    [({}, "short", "10m"), ({"partition": "long"}, "long", "20m"), ({"time": "1h"}, "short", "1h")],
    ids=["test partition", "named", "time named"],
)
def test_where_it_goes(tmp_path: Path, options: dict[str, Any], partition: str, time: str) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    line = smoke_line(read(Wish("presets/tiny", site=str(tmp_path / "site.yaml"), options=options, allowed=("time",))))
    assert (line.slurm["partition"].value, line.slurm["time"].value) == (partition, time)
    assert line.preset.value.name == "tiny-smoke"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was stopped after step 3 and went on."""
    run = toy_run(tmp_path, toy_plan())
    for life, event in ((0, "started"), (0, "checkpoint"), (0, "requeued"), (1, "started"), (1, "finished")):
        run.append_event(event, life=life, **({"step": 3, "reason": "stop"} if event == "checkpoint" else {}))
    metrics.append(run.metrics_file, "checkpoint", step=3, life=0, blocked_s=0.5)
    for life, steps in ((0, (1, 2, 3)), (1, (4, 5))):
        (run.life(life)).mkdir(parents=True, exist_ok=True)
        for step in steps:
            metrics.append(run.metrics_file, "train", step=step, life=life, step_s=2.0)
    return run


SEEN = Seen(submitted=100.0, started=[130.0, 220.0], stepped=[150.0, 240.0], stop=170.0, ended=180.0)


def test_a_run_that_was_too_quick_is_made_once_more(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, asked = toy_run(tmp_path / "quick", toy_plan()), []
    quick.append_event("finished", life=0)
    metrics.append(quick.metrics_file, "train", step=1, life=0, step_s=0.05)

    def interrupted(line: Any) -> tuple[Run, Seen]:
        asked.append(line.preset.value.training.epochs)
        return (quick if len(asked) == 1 else run), SEEN

    monkeypatch.setattr(smoke_module, "_interrupted", interrupted)
    (tmp_path / "site.yaml").write_text(SITE)
    found, findings = smoke(smoke_line(read(Wish("presets/tiny", site=str(tmp_path / "site.yaml"), allowed=("time",)))))
    assert found is run and not failed(findings)
    assert len(asked) == 2 and asked[1] == epochs_for(0.025) == 50


def test_verdict_of_a_good_run(run: Run) -> None:
    found = verdict(run, SEEN)
    assert not failed(found)
    assert {one.what: one.measured for one in found} == {
        "queue": "30 s",
        "start-up": "20 s",
        "step": "2 s",
        "save": "0.5 s, step 3",
        "stop": "10 s from notice to end, of 30 s asked for",
        "next life": "40 s",
        "start-up again": "20 s",
        "resumed": "at step 4",
        "end": "5 steps in 2 lives",
        "steps": "all there",
    }


@pytest.mark.parametrize(
    ("changes", "row", "bad"),
    [
        ({"ended": 201.0}, None, {"stop"}),
        ({"stop": None}, None, {"stop"}),
        ({"stepped": [150.0]}, None, {"start-up again"}),
        ({}, {"step": 7, "life": 1, "step_s": 1.0}, {"steps"}),
        ({}, {"step": 3, "life": 1, "step_s": 1.0}, {"resumed"}),
    ],
    ids=["slow", "never asked", "no second life", "a step is missing", "steps repeated"],
)
def test_verdict_of_a_bad_run(run: Run, changes: dict[str, Any], row: dict[str, Any] | None, bad: set[str]) -> None:
    if row is not None:
        metrics.append(run.metrics_file, "train", **row)
    found = verdict(run, Seen(**{**vars(SEEN), **changes}))
    assert {one.what for one in found if not one.ok} == bad
