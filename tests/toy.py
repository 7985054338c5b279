"""Plans and runs for the tests of the supervisor: two ranks on CPU that train nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from launcher.plan import Batch, Container, Layout, Plan
from launcher.preset.hardware import Hardware
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from launcher.render import render
from launcher.run import Run
from launcher.runs import create_run

TRAINER = Path(__file__).with_name("toy_train.py")


def toy_plan(
    *, site: dict[str, Any] | None = None, preset: dict[str, Any] | None = None, nodes: int = 1, ranks: int = 2, **changes: Any
) -> Plan:
    """A plan of the local site unless ``site`` says otherwise; ``changes`` replace fields of the plan."""
    written = {
        "name": "toy",
        "model": {"config": {"model_type": "llama"}, "tokenizer": "train"},
        "data": {"path": "stdlib"},
        "training": {"sequence_length": 8, "effective_batch": 2, "learning_rate": 0.1},
        "hardware": "cpu",
        "stack": "cpu",
        "gpus": 0,
        "nodes": nodes,
        "ranks_per_node": ranks,
    }
    place = {"name": "here", "source": "the tests", "scheduler": "none", "container": {"use": "none"}}
    cpu = {"name": "cpu", "source": "the tests", "cpus": 4, "memory_gib": 4}
    plan = Plan(
        identity="0123456789abcdef" * 4,
        preset=Preset.model_validate({**written, **(preset or {})}).model_dump(mode="json"),
        hardware=Hardware.model_validate({**cpu, **changes.pop("hardware", {})}).model_dump(mode="json"),
        site=Site.model_validate({**place, **(site or {})}).model_dump(mode="json"),
        stack={"name": "cpu"},
        layout=Layout(nodes, 0, ranks, cpus_per_node=ranks, memory_per_node_gib=1, threads_per_rank=1),
        batch=Batch(2, (1,) * (nodes * ranks), 1, 1),
        attention="eager",
        container=Container("none"),
        time_limit_min=None,
        signal_lead_s=30,
    )
    return dataclasses.replace(plan, **changes)


def toy_run(runs: Path, plan: Plan, *, python: str = "/usr/bin/python3", new: bool = False, **behaviour: Any) -> Run:
    """A run folder whose ``code`` holds the toy trainer; ``behaviour`` is its ``toy.json``."""
    run = create_run(plan, lambda run: render(plan, run, python=python), "name: toy\n", runs, new=new)
    put_toy(run, **behaviour)
    return run


def put_toy(run: Run, **behaviour: Any) -> None:
    shutil.rmtree(run.code / "launcher" / "train")
    (run.code / "launcher" / "train").mkdir()
    shutil.copy(TRAINER, run.code / "launcher" / "train" / "__main__.py")
    (run.root / "toy.json").write_text(json.dumps({"steps": 5, "step_s": 0.01, **behaviour}))


def names(run: Run) -> list[str]:
    return [event["event"] for event in run.events()]
