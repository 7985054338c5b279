"""Disk of checkpoints and runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plans import FACTS, plan_of, preset


@pytest.mark.parametrize(
    ("wish", "checkpoint_gib"),
    [
        ({"training": {"optimizer": "adamw"}}, 12),
        ({"training": {"optimizer": "adamw_8bit"}}, 6),
        ({"training": {"optimizer": "adamw", "dtype": "bf16_pure"}}, 6),
        ({"training": {"optimizer": "adafactor"}, "parallelism": "zero3"}, 8),
    ],
    ids=["adamw", "adamw-8bit", "bf16-pure", "adafactor-zero"],
)
def test_disk_of_a_checkpoint(wish: dict[str, Any], checkpoint_gib: int) -> None:
    disk = plan_of(preset(**wish), model_facts=FACTS.model_copy(update={"parameters": 2**30}))[0].disk
    assert disk is not None and disk.checkpoint_gib == checkpoint_gib


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        ({"training": {"epochs": 3}}, 3),
        ({"training": {"epochs": 3}, "checkpoint": {"keep_epochs": 2}}, 2),
        ({"training": {"epochs": 3}, "checkpoint": {"minutes": 30, "keep": 4}}, 7),
        ({"training": {"epochs": 3}, "checkpoint": {"every": "100", "keep": 10}}, 10),
        ({"training": {"epochs": 3}, "checkpoint": {"every": "never"}}, 2),
    ],
    ids=["epochs", "some-epochs", "timed", "steps", "never"],
)
def test_disk_of_a_run(wish: dict[str, Any], kept: int) -> None:
    disk = plan_of(preset(**wish), model_facts=FACTS.model_copy(update={"parameters": 2**30}))[0].disk
    assert disk is not None and disk.total_gib == 12 * (kept + 1) + 4


def test_disk_of_adafactor_and_of_lora() -> None:
    """2 layers of width 32, 16 inside, vocabulary 32: as many rows and columns for the embedding as for the head."""
    facts = FACTS.model_copy(update={"parameters": 2**30})
    layer = 4 * (32 + 32) + 3 * (16 + 32)
    plan, _ = plan_of(preset(training={"optimizer": "adafactor"}), model_facts=facts)
    assert plan.disk is not None and plan.disk.checkpoint_gib == round(4 + 4 * (2 * layer + 2 * 64 + 5 * 32) / 2**30, 3)
    from launcher.hardware.disk import num_trained

    assert num_trained(preset(adapter={"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}), facts) == 2 * 4 * 2 * (32 + 32)
