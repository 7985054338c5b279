"""The memory of a step, measured again with the versions that are installed: a few layers of the real widths, on a fake GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the training's tests need torch: pip install -e '.[train,dev]'")
pytest.importorskip("pydantic", reason="predictions are the planner's, and the source's stack has no planner")

from benchmarks.fake_gpu import compiler
from benchmarks.memory_cases import MODELS, QUICK, Case, facts_of, preset_of, stack_of, surroundings
from launcher.hardware.memory import fullest_moment
from launcher.hardware.split import split
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    if compiler() is None:
        pytest.skip("a fake GPU is compiled: no C++ compiler here")
    file = tmp_path_factory.mktemp("memory") / "quick.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_fake", "--quick", "--to", str(file)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return {row["name"]: row for row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_predicted_as_measured_again(case: Case, measured: dict[str, dict[str, Any]]) -> None:
    hardware, layout, batch = surroundings(case)
    predicted = fullest_moment(preset_of(case), facts_of(case), hardware, layout, batch, case.attention, stack_of(case)).total
    assert 0.97 <= predicted / measured[case.name]["peak_bytes"] <= 1.05


@pytest.mark.parametrize("gpus", [2, 6, 8])
@pytest.mark.parametrize("model", MODELS)
def test_split_is_accelerates(model: str, gpus: int) -> None:
    from benchmarks.memory_step import config_of
    from launcher.train.split import device_split, weight_budget

    facts = facts_of(Case(model))
    budget = weight_budget(80e9, "adafactor", False)
    theirs = device_split(config_of(facts), dict.fromkeys(range(gpus), budget))
    ours = split(facts, gpus, budget)
    assert ours is not None
    layers = [gpu for name, gpu in theirs.items() if ".layers." in name or ".h." in name]
    assert [part.layers for part in ours] == [layers.count(gpu) for gpu in range(gpus)]
    assert [part.head for part in ours].index(True) == theirs["lm_head"]
