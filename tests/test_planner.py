"""The planner: layout, batch, time limit, identity."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from launcher.plan import Container, Plan, Staged, from_json, to_json
from launcher.planner import identity, identity_keys_changed, summary
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from tests.plans import STAGED, plan_of, preset, site, stack


@pytest.mark.parametrize(
    ("effective", "micro", "gpus", "shares", "held", "steps"),
    [
        (25, 5, 6, (5, 4, 4, 4, 4, 4), 5, 1),
        (25, 2, 4, (7, 6, 6, 6), 2, 4),
        (24, 8, 2, (12, 12), 6, 2),
        (25, 5, 1, (25,), 5, 5),
        (256, 2, 8, (32,) * 8, 2, 16),
        (4, 8, 2, (2, 2), 2, 1),
        (2, 1, 3, (1, 1, 0), 1, 1),
    ],
    ids=["25-on-6", "25-on-4", "24-on-2", "25-on-1", "256-on-8", "capped", "fewer-than-ranks"],
)
def test_batch(effective: int, micro: int, gpus: int, shares: tuple[int, ...], held: int, steps: int) -> None:
    plan, findings = plan_of(preset(gpus=gpus, training={"effective_batch": effective, "micro_batch": micro}))
    assert (plan.batch.samples_per_rank, plan.batch.micro_batch, plan.batch.micro_steps) == (shares, held, steps)
    assert sum(plan.batch.samples_per_rank) == effective
    assert ("idle-ranks" in [finding.code for finding in findings]) == (0 in shares)


@pytest.mark.parametrize(
    ("wish", "at", "layout"),
    [
        ({}, {}, (2, 2, 16, 120, 8)),
        ({"gpus": 0}, {}, (0, 1, 64, 480, 8)),
        ({"gpus": 6, "parallelism": "device_map"}, {}, (6, 1, 48, 360, 8)),
        ({"cpus_per_node": 5, "memory_per_node_gib": 7}, {}, (2, 2, 5, 7, 2)),
        ({"threads_per_rank": 3}, {}, (2, 2, 16, 120, 3)),
        ({"gpus": 0, "ranks_per_node": 2}, {}, (0, 2, 64, 480, 8)),
        ({}, {"cpus_per_gpu": 4, "memory_per_gpu_gib": 32}, (2, 2, 8, 64, 4)),
        ({}, {"whole_nodes": True}, (2, 2, 64, 480, 8)),
    ],
    ids=["share", "cpu", "device-map", "typed", "threads", "two-on-cpu", "site-per-gpu", "whole-nodes"],
)
def test_layout(wish: dict[str, Any], at: dict[str, Any], layout: tuple[int, ...]) -> None:
    found = plan_of(preset(**wish), site=site(**at))[0].layout
    assert (found.gpus_per_node, found.ranks_per_node, found.cpus_per_node, found.memory_per_node_gib, found.threads_per_rank) == layout


def test_two_nodes() -> None:
    plan, _ = plan_of(preset(nodes=2, training={"effective_batch": 25}))
    assert (plan.world_size, plan.batch.samples_per_rank) == (4, (7, 6, 6, 6))


@pytest.mark.parametrize(
    ("at", "options", "minutes", "lead"),
    [
        ({}, {}, 1440, 61),
        ({}, {"time": "90m"}, 90, 61),
        ({}, {"time": "1m"}, 1, 30),
        ({"signal_lead_s": 30}, {"time": "3m"}, 3, 31),
        ({"partitions": {"p": {"max_time": "48h"}}}, {"partition": "p"}, 2880, 61),
        ({"scheduler": "none"}, {}, None, 61),
    ],
    ids=["default", "typed", "half-at-most", "site-lead", "partition", "no-scheduler"],
)
def test_time_limit_and_signal_lead(at: dict[str, Any], options: dict[str, str], minutes: int | None, lead: int) -> None:
    plan, _ = plan_of(site=site(**at), slurm=options)
    assert (plan.time_limit_min, plan.signal_lead_s) == (minutes, lead)
    assert "time" not in plan.slurm


def test_options_of_the_preset_where_none_were_resolved() -> None:
    wish = preset(slurm={"account": "a", "time": "2h"})
    assert (plan_of(wish)[0].slurm, plan_of(wish)[0].time_limit_min) == ({"account": "a"}, 120)
    assert plan_of(wish, slurm={"account": "b"})[0].slurm == {"account": "b"}
    local, findings = plan_of(wish, site=site(scheduler="none"))
    assert local.slurm == {} and "slurm-unused" in [finding.code for finding in findings]


def test_attention_auto() -> None:
    assert plan_of()[0].attention == "sdpa"
    assert plan_of(stack=stack(attention=["eager"]))[0].attention == "eager"
    assert plan_of(preset(attention="xformers"))[0].attention == "xformers"


def test_plan_round_trips_and_keeps_the_preset() -> None:
    wish = preset(adapter={"kind": "lora", "targets": ["q_proj"]})
    plan, _ = plan_of(wish, staged=STAGED, allowed=["time", "memory"])
    assert from_json(to_json(plan)) == plan
    assert Preset.model_validate(plan.preset) == wish
    assert plan.allowed == ("memory", "time")


def test_mirrors_are_not_in_the_plan() -> None:
    """A pip index may hold a password, and people show their plans."""
    at = site(mirrors={"pip_index": "https://ada:secret@mirror.invalid/simple"})
    plan, _ = plan_of(site=at)
    assert "secret" not in str(to_json(plan))
    assert Site.model_validate(plan.site) == site()


def test_summary_has_what_interfaces_promise() -> None:
    found = summary(plan_of(preset(gpus=4, training={"effective_batch": 25, "micro_batch": 2}))[0])
    assert {key: value for key, value in found.items() if key not in ("memory", "time", "disk")} == {
        "name": "x", "model": "a/b", "site": "cluster", "stack": "s", "nodes": 1, "gpus_per_node": 4, "world_size": 4,
        "effective_batch": 25, "micro_batch": 2, "gradient_accumulation": 4, "samples_per_rank": [7, 6, 6, 6],
        "samples_per_micro_step": [[2, 2, 2, 1], [2, 2, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1]],
        "sequence_length": 1024, "attention": "sdpa",
        "adapter": "none", "parallelism": "ddp", "dtype": "bf16", "time_limit_min": 1440, "signal_lead_s": 61,
    }  # fmt: skip
    assert set(found["disk"]) == {"checkpoint_gib", "total_gib", "files"}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "y"}, {"description": "other"}, {"gpus": 4}, {"nodes": 2}, {"ranks_per_node": 1}, {"cpus_per_node": 3},
        {"memory_per_node_gib": 9}, {"threads_per_rank": 1}, {"training": {"micro_batch": 1}},
        {"evaluation": {"micro_batch": 4}}, {"slurm": {"time": "2h"}},
        {"limits": {"max_lives": 2}}, {"checkpoint": {"every": "10"}}, {"hardware": "other"}, {"site": "other"},
    ],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_identity_stays(changes: dict[str, Any]) -> None:
    old, new = plan_of()[0], plan_of(preset(**changes))[0]
    assert old.identity == new.identity
    assert identity_keys_changed(old, new) == []


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("ddp", "fsdp", []),
        ("fsdp", "ddp", []),
        ("zero2", "zero2", []),
        ("ddp", "zero2", ["parallelism"]),
        ("zero3", "fsdp", ["parallelism"]),
        ("zero2", "zero3", ["parallelism"]),
    ],
    ids=str,
)
def test_which_engine_may_continue_which(before: str, after: str, changed: list[str]) -> None:
    old, new = (plan_of(preset(parallelism=kind, gpus=gpus))[0] for kind, gpus in ((before, 2), (after, 4)))
    assert identity_keys_changed(old, new) == changed
    assert (old.identity == new.identity) is (not changed)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"training": {"learning_rate": 1e-5}}, ["training.learning_rate"]),
        ({"training": {"effective_batch": 25, "seed": 1}}, ["training.effective_batch", "training.seed"]),
        ({"data": {"name": "a/d"}}, ["data.name"]),
        ({"model": {"name": "a/b", "revision": "v2"}}, ["model.revision"]),
        ({"parallelism": "device_map"}, ["parallelism"]),
        ({"adapter": {"kind": "lora"}}, ["adapter", "adapter.alpha", "adapter.dropout", "adapter.kind", "adapter.rank"]),
        ({"stack": "other"}, ["stack"]),
    ],
    ids=["lr", "batch-seed", "data", "revision", "parallelism", "adapter", "stack"],
)
def test_identity_changes(changes: dict[str, Any], keys: list[str]) -> None:
    old, new = plan_of()[0], plan_of(preset(**changes))[0]
    assert old.identity != new.identity
    assert identity_keys_changed(old, new) == keys


def test_identity_follows_the_pins_and_not_the_words_of_a_stack() -> None:
    old = plan_of()[0]
    worded, pinned = (plan_of(stack=stack(**change))[0] for change in ({"notes": ["a"], "description": "b"}, {"python": "3.12"}))
    assert (worded.identity == old.identity, identity_keys_changed(old, worded)) == (True, [])
    assert (pinned.identity == old.identity, identity_keys_changed(old, pinned)) == (False, ["stack"])


def test_identity_follows_the_content_of_local_data_and_not_its_path() -> None:
    here, there = preset(data={"path": "/a/data.jsonl"}), preset(data={"path": "/b/data.jsonl"})
    other = Staged(**{**vars(STAGED), "data_sha": "def"})
    old, moved, changed = plan_of(here, staged=STAGED)[0], plan_of(there, staged=STAGED)[0], plan_of(here, staged=other)[0]
    assert (moved.identity == old.identity, identity_keys_changed(old, moved)) == (True, [])
    assert (changed.identity == old.identity, identity_keys_changed(old, changed)) == (False, ["data"])
    assert plan_of(staged=STAGED)[0].identity == plan_of(staged=other)[0].identity, "data on the hub is known by its revision"


def test_identity_of_a_mixture_follows_contents_revisions_and_weights() -> None:
    def planned(path: str = "/a/x.jsonl", revision: str = "v1", weight: float = 0.3, sha: str = "abc", **more: Any) -> Plan:
        sources = [{"path": path, "weight": 0.7}, {"name": "o/b", "revision": revision, "weight": weight}]
        wish = preset(data={"sources": sources, **more})
        return plan_of(wish, staged=Staged(**{**vars(STAGED), "data_sha": sha}))[0]

    old, moved = planned(), planned("/b/x.jsonl")
    assert (moved.identity == old.identity, identity_keys_changed(old, moved)) == (True, [])
    assert identity_keys_changed(old, planned(sha="def")) == ["data"]
    for changed in (planned(revision="v2"), planned(weight=0.4)):
        assert identity_keys_changed(old, changed) == ["data.sources"]
    others = [planned(sha="def"), planned(revision="v2"), planned(weight=0.4), planned(format="fim"), planned(long_documents="split")]
    assert len({plan.identity for plan in (old, *others)}) == 6
    wish = preset(data={"sources": [{"path": "/a"}]})
    marks = [identity(wish, None, Container("none"), None, {"data": mark}) for mark in ("1", "2")]
    assert marks[0] != marks[1], "where a job stages, fingerprints stand for the contents"


def test_identity_follows_the_content_of_a_local_model_and_not_its_path() -> None:
    here, there = preset(model={"path": "/a/model"}), preset(model={"path": "/b/model"})
    first, second = (Staged(**{**vars(STAGED), "model_sha": sha}) for sha in ("123", "456"))
    old, moved, changed = plan_of(here, staged=first)[0], plan_of(there, staged=first)[0], plan_of(here, staged=second)[0]
    assert (moved.identity == old.identity, identity_keys_changed(old, moved)) == (True, [])
    assert (changed.identity == old.identity, identity_keys_changed(old, changed)) == (False, ["model"])
    assert identity_keys_changed(plan_of(here)[0], plan_of(there)[0]) == ["model.path"], "what is not staged is known by its path"


def test_identity_of_an_own_image() -> None:
    wish = preset(stack={"image": "/x.sif"})
    plan, findings = plan_of(wish, stack=None, container=Container("apptainer", image="/x.sif", identity="1"))
    moved = plan_of(preset(stack={"image": "/y.sif"}), stack=None, container=Container("apptainer", image="/y.sif", identity="1"))[0]
    other = plan_of(wish, stack=None, container=Container("apptainer", image="/x.sif", identity="2"))[0]
    assert plan.identity == moved.identity != other.identity
    assert (identity_keys_changed(plan, moved), identity_keys_changed(plan, other)) == ([], ["stack"])
    unknown = [plan_of(preset(stack={"image": image}), stack=None)[0] for image in ("/x.sif", "/y.sif")]
    assert identity_keys_changed(*unknown) == ["stack.image"]
    assert (plan.stack, "stack-unknown" in [finding.code for finding in findings]) == ({}, True)


def test_identity_is_64_hex_digits_and_does_not_move() -> None:
    """A change here makes every run a new one: wanted, or a mistake."""
    assert plan_of()[0].identity == "933232eba1dcb6d8ea2ce059aa64b0ecf67b5e961a1261df0790c2c69c3893a4"


def test_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan_of(staged=STAGED)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the planner looked at the world")

    with monkeypatch.context() as patch:
        for owner, names in ((time, ("time", "monotonic", "perf_counter")), (os, ("getenv", "getcwd", "stat", "listdir"))):
            for name in names:
                patch.setattr(owner, name, refuse)
        patch.setattr(os, "environ", None)
        patch.setattr("builtins.open", refuse)
        patch.setattr("subprocess.Popen", refuse)
        after = plan_of(staged=STAGED)
    assert after == before


def test_memory_and_time_are_not_guessed() -> None:
    plan, findings = plan_of(model_facts=None)
    assert (plan.memory, plan.time, plan.disk) == (None, None, None)
    assert [(finding.level, finding.code) for finding in findings] == [
        ("advice", "attention-chosen"),
        ("advice", "not-executed-here"),
        ("advice", "model-facts-unknown"),
    ]
