"""What would make a run faster: computed, and still the same training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.advice import SAME_TRAINING, advise
from launcher.cli.line import Wish, planned, read
from launcher.cli.replan import advice
from launcher.errors import Finding
from launcher.plan import Plan
from launcher.remedies import Change, changed, value_of
from tests.plans import plan_of, preset, stack


def advised(name: str, *settings: str) -> dict[str, Finding]:
    line = read(Wish(f"presets/{name}", settings=settings))
    return {finding.code: finding for finding in advice(line, planned(line)[0])}


def test_naive_model_parallelism_is_found() -> None:
    found = advised("starcoder2-15b")
    assert "at any time 5 of 6 GPUs wait" in found["waiting-gpus"].message
    assert (found["waiting-gpus"].key, found["waiting-gpus"].line) == ("parallelism", 32)
    assert "training.dtype: bf16" in found["cheaper"].message and "parallelism: " in found["cheaper"].message
    assert found["cheaper-variant"].message.startswith("preset starcoder2-15b-fast does this training in ")
    assert found["cheaper-variant"].hint == "ftlaunch check starcoder2-15b-fast"


def test_what_is_good_is_left_alone() -> None:
    assert "waiting-gpus" not in advised("starcoder2-3b-fast")
    assert advised("tiny") == {}


def replanner(wish: Any, **changes: Any) -> Any:
    def replan(change: Change) -> tuple[Plan, list[Finding]] | None:
        other = changed(wish, change)
        return None if other is None else plan_of(other, **changes)

    return replan


SLOW: dict[str, Any] = {"gpus": 4, "data": {"name": "a/c", "num_samples": 100_000}, "training": {"dtype": "fp32", "micro_batch": 1}}


def test_every_change_keeps_the_training() -> None:
    tried: list[Change] = []
    wish = preset(**SLOW)

    def replan(change: Change) -> tuple[Plan, list[Finding]] | None:
        tried.append(change)
        return replanner(wish)(change)

    plan = plan_of(wish)[0]
    assert [finding.code for finding in advise(plan, replan)] == ["cheaper"]
    assert tried and not {key for change in tried for key in change} & set(SAME_TRAINING)


def test_a_change_that_is_refused_is_not_advised() -> None:
    wish = preset(**SLOW)
    refused = Finding("error", "gpu-memory", "no")
    plan = plan_of(wish)[0]
    assert advise(plan, lambda change: (plan_of(changed(wish, change))[0], [refused])) == []


def test_another_stack_only_where_this_one_lacks_something() -> None:
    wish, poor = preset(**SLOW), stack(parallelism=["ddp"], attention=["sdpa"])
    used: list[str] = []

    def replan(change: Change) -> tuple[Plan, list[Finding]] | None:
        used.append(str(change.get("stack", "s")))
        rich = stack(name="rich", parallelism=["ddp", "zero2", "zero3", "fsdp"], attention=["sdpa", "xformers"])
        return replanner(wish, stack=rich if "stack" in change else poor)(change)

    advise(plan_of(wish, stack=poor)[0], replan, ["s", "rich"])
    assert {"s", "rich"} == set(used)


@pytest.mark.parametrize(
    ("other", "taken"),
    [({}, True), ({"training": {"epochs": 9}}, False), ({"adapter": {"kind": "lora"}}, False), ({"name": "x-y", "gpus": 1}, True)],
    ids=["same", "more epochs", "adapter", "fewer GPUs"],
)
def test_variants_of_the_same_training(other: dict[str, Any], taken: bool) -> None:
    plan = plan_of(preset(**SLOW))[0]
    variant = plan_of(preset(**{**SLOW, **other, "training": {**SLOW["training"], **other.get("training", {})}}))[0]
    assert plan.time is not None and variant.time is not None and plan.time.gpu_hours is not None
    cheap = replace(variant, time=replace(variant.time, gpu_hours=plan.time.gpu_hours / 10))
    codes = [finding.code for finding in advise(plan, lambda change: None, variants={"v": cheap})]
    assert codes == ["cheaper-variant"] * taken
    assert value_of(cheap, "training.effective_batch") == 24
