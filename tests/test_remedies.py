"""Each refusal names the smallest change that passes: tried on the shipped presets, and on small plans."""

from __future__ import annotations

import re
from typing import Any

import pytest

from launcher.cli.line import Wish, planned, read
from launcher.errors import Finding
from launcher.plan import Plan
from launcher.remedies import Change, change_text, changed, passing, refusals, with_remedies
from tests.plans import GPU, hardware, plan_of, preset, site

GPU_NODES: dict[str, Any] = {"gpu": {"max_time": "24h", "gpus_per_node": 4, "max_nodes": 2}}


@pytest.mark.parametrize(
    ("name", "settings", "code", "hint"),
    [
        ("santacoder-a100-40gb", ["training.micro_batch=8"], "gpu-memory", "training.micro_batch: 2 passes with "),
        (
            "santacoder-a100-40gb-default",
            ["training.activation_checkpointing=none", "training.micro_batch=1"],
            "gpu-memory",
            "attention: sdpa",
        ),
        ("santacoder-v100", ["training.dtype=bf16"], "dtype-not-on-gpu", "training.dtype: fp16"),
        ("santacoder-v100", ["attention=flash2", "training.dtype=fp16"], "attention-not-on-gpu", "attention: xformers"),
        ("starcoder2-15b", ["gpus=9"], "gpus-above-node", "gpus: 8"),
        ("starcoder2-15b-fast", ["gpus=1", "parallelism=single"], "gpu-memory", "gpus: 2, parallelism: fsdp"),
        ("starcoder2-15b-fast", ["stack=torch2.3-cu121"], "parallelism-not-in-stack", "stack: torch2.10-cu128"),
        ("tiny", ["attention=flash2"], "attention-not-on-gpu", "attention: sdpa"),
        ("tiny", ["cpus_per_node=1000"], "cpus-above-node", "cpus_per_node: "),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value else None,
)
def test_the_change_was_tried_and_passes(name: str, settings: list[str], code: str, hint: str) -> None:
    findings = planned(read(Wish(f"presets/{name}", settings=tuple(settings))))[1]
    (refusal,) = [finding for finding in findings if finding.code == code]
    assert refusal.hint is not None and refusal.hint.startswith(hint), refusal.hint
    text = re.sub(r"( \(\d+\))?( passes with .*)?(; or passes here: .*)?$", "", refusal.hint)
    again = [*settings, *(part.replace(": ", "=", 1) for part in re.split(r", (?=[a-z_.]+: )", text))]
    after = planned(read(Wish(f"presets/{name}", settings=tuple(again))))[1]
    assert code not in [finding.code for finding in after if finding.level == "error"], again


@pytest.mark.parametrize(
    ("wish", "changes", "code", "hint"),
    [
        ({"gpus": 6}, {"site": site(partitions=GPU_NODES), "slurm": {"partition": "gpu"}}, "gpus-above-partition", "gpus: 3, nodes: 2"),
        ({"gpus": 5}, {"site": site(partitions=GPU_NODES), "slurm": {"partition": "gpu"}}, "gpus-above-partition", "gpus: 4"),
        ({"nodes": 3}, {"site": site(partitions=GPU_NODES), "slurm": {"partition": "gpu"}}, "nodes-above-partition", "nodes: 2"),
        (
            {},
            {"site": site(partitions=GPU_NODES), "slurm": {"partition": "gpu", "time": "48h"}},
            "time-above-partition",
            "slurm.time: 24h",
        ),
        ({"ranks_per_node": 3}, {}, "ranks-above-gpus", "ranks_per_node: 2"),
        ({"memory_per_node_gib": 9999}, {}, "memory-above-node", "memory_per_node_gib: 480"),
        ({"nodes": 2}, {"site": site(scheduler="none")}, "nodes-without-scheduler", "nodes: 1"),
        (
            {"training": {"dtype": "fp16"}, "attention": "flash2"},
            {"hardware": hardware(gpu={**GPU, "kind": "v100", "compute_capability": "7.0"})},
            "attention-not-on-gpu",
            "attention: xformers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value else None,
)
def test_small_plans(wish: dict[str, Any], changes: dict[str, Any], code: str, hint: str) -> None:
    wanted = preset(**wish)
    slurm = changes.pop("slurm", {})

    def replan(change: Change) -> tuple[Plan, list[Finding]] | None:
        other = changed(wanted, {key: value for key, value in change.items() if not key.startswith("slurm.")})
        typed = {key.removeprefix("slurm."): value for key, value in change.items() if key.startswith("slurm.")}
        return None if other is None or "stack" in change else plan_of(other, slurm={**slurm, **typed}, **changes)

    plan, findings = plan_of(wanted, slurm=slurm, **changes)
    remedied = with_remedies(plan, findings, replan)
    assert [finding.hint for finding in remedied if finding.code == code] == [hint]


@pytest.mark.parametrize(
    ("site", "hint"),
    [
        ("delftblue", "gpus: 4; or passes here: ftlaunch check starcoder2-15b-fast --gpus 3 --nodes 2"),
        ("lonestar6", "passes here: ftlaunch check starcoder2-15b-fast --gpus 2"),
    ],
)
def test_too_many_gpus_name_the_variant_that_passes(site: str, hint: str) -> None:
    """That what is named passes: tests/test_compare.py."""
    findings = planned(read(Wish("presets/starcoder2-15b", f"presets/sites/{site}")))[1]
    assert [finding.hint for finding in findings if finding.code == "gpus-above-node"] == [hint]


def test_passing_goes_on_until_nothing_is_refused() -> None:
    wanted, changes = preset(gpus=6, nodes=3), {"site": site(partitions=GPU_NODES)}

    def replan(change: Change) -> tuple[Plan, list[Finding]] | None:
        other = changed(wanted, {key: value for key, value in change.items() if not key.startswith("slurm.")})
        return None if other is None or "stack" in change else plan_of(other, slurm={"partition": "gpu"}, **changes)

    plan, findings = plan_of(wanted, slurm={"partition": "gpu"}, **changes)
    assert {finding.code for finding in refusals(findings)} == {"gpus-above-partition", "nodes-above-partition"}
    found = passing(plan, findings, replan)
    assert found is not None
    assert found[0] == {"gpus": 3, "nodes": 2}
    assert passing(plan, findings, lambda change: None) is None
    assert passing(*plan_of(), replan) == ({}, plan_of()[0])


def test_an_account_is_no_matter_of_the_plan() -> None:
    assert refusals(plan_of(site=site(account="required"))[1]) == []


def test_without_a_remedy_the_finding_stays() -> None:
    plan, findings = plan_of(preset(gpus=9))
    assert with_remedies(plan, findings, lambda change: None) == findings


def test_changes_as_a_user_writes_them() -> None:
    before, after = plan_of()[0], plan_of(preset(training={"micro_batch": 3}))[0]
    change = {"adapter": {"kind": "lora", "rank": 8}, "ranks_per_node": None, "training.tf32": True, "training.micro_batch": "auto"}
    assert change_text(change, before, after) == "adapter: {kind: lora, rank: 8}, training.tf32: true, training.micro_batch: auto (3)"
    assert changed(preset(), {"training.dtype": "fp32", "gpus": 1}) == preset(gpus=1, training={"dtype": "fp32"})
    assert changed(preset(), {"parallelism": "single"}) is None
    assert changed(preset(), {"adapter.rank": 3}) is None
