"""Gates of memory, disk and time: what is said of a plan with given predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import Finding
from launcher.hardware.fits import UNOBSERVED, Observed, check_fits
from launcher.hardware.gates import GATES
from launcher.plan import Disk, Memory, Plan, Time
from launcher.preset.model import ModelFacts
from tests.plans import FACTS, STAGED, plan_of, preset, site

PARTS = {"weights": 30.0, "gradients": 0.01, "optimizer": 12.0, "activations": 40.0, "logits": 3.0, "other": 1.0}
MEMORY = Memory(per_gpu_gib=60.0, available_gib=78.0, fits=True, host_per_node_gib=20.0, parts=PARTS)
TIME = Time(step_s=100.0, steps=1000, total_h=28.0, gpu_hours=56.0, continuations=1, startup_s=120.0, checkpoint_stop_s=30.0)
DISK = Disk(checkpoint_gib=10.0, total_gib=40.0, files=300)
PREEMPTIBLE: dict[str, Any] = {"partitions": {"low": {"preemptible": True, "grace_s": 60}}}


def found(
    plan: Plan, observed: Observed = UNOBSERVED, facts: ModelFacts = FACTS, at: Any = None, wish: dict[str, Any] | None = None
) -> list[Finding]:
    return list(check_fits(plan, preset(**(wish or {})), at or site(), facts, observed))


def plan(**predictions: Any) -> Plan:
    options = predictions.pop("slurm", {})
    bare = plan_of(slurm=options, **predictions.pop("changes", {}))[0]
    return replace(bare, **{"memory": MEMORY, "time": TIME, "disk": DISK, "time_limit_min": 60, "signal_lead_s": 120, **predictions})


def test_what_fits_is_not_spoken_of() -> None:
    assert found(plan(), Observed(disk_free_gib=40.0, disk_free_files=300, token=False)) == []


@pytest.mark.parametrize(
    ("predictions", "observed", "expected"),
    [
        (
            {"memory": replace(MEMORY, per_gpu_gib=86.0, fits=False)},
            {},
            "error: gpu-memory: training.micro_batch: 86.0 GiB on the fullest GPU, where 78.0 can be used: activations 40.0, weights 30.0, "
            "optimizer 12.0, logits 3.0, other 1.0 (a smaller micro_batch, activation_checkpointing: full, a sharded parallelism, or "
            "--allow memory)",
        ),
        (
            {"memory": replace(MEMORY, host_per_node_gib=120.5)},
            {},
            "error: host-memory: memory_per_node_gib: 120.5 GiB of RAM are needed on a node, 120 are asked for "
            "(memory_per_node_gib: 121, or --allow memory)",
        ),
        (
            {},
            {"disk_free_gib": 39.9},
            "error: disk-too-small: checkpoint: the run's checkpoints and model take 40.0 GiB, 39.9 are free in the runs folder "
            "(fewer checkpoints (checkpoint.keep, checkpoint.keep_epochs), or another runs folder)",
        ),
        (
            {},
            {"disk_free_files": 299},
            "error: disk-too-small: checkpoint: the run makes up to 300 files, 299 are free in the runs folder "
            "(fewer checkpoints (checkpoint.keep, checkpoint.keep_epochs), or another runs folder)",
        ),
        (
            {"time_limit_min": 6},
            {},
            "error: no-checkpoint-in-time: slurm.time: a life of 6m is told to stop after 4 min; start-up, one step and its checkpoint "
            "take 4 min: no life would get further than the one before (a longer time limit, or --allow time)",
        ),
    ],
    ids=["GPU", "node", "disk", "files", "time"],
)
def test_what_does_not_fit(predictions: dict[str, Any], observed: dict[str, Any], expected: str) -> None:
    findings = found(plan(**predictions), Observed(**observed))
    assert [f"{finding.level}: {finding.code}: {finding}" for finding in findings] == [expected]
    assert all(finding.code in GATES for finding in findings if finding.level == "error")


def test_on_cpu_it_is_the_nodes_ram() -> None:
    bare = plan(memory=replace(MEMORY, fits=False, per_gpu_gib=100.0))
    (finding,) = found(replace(bare, layout=replace(bare.layout, gpus_per_node=0)))
    assert (finding.code, finding.key) == ("host-memory", "memory_per_node_gib")
    assert finding.message.startswith("a rank computes with 100.0 GiB of RAM, where 78.0 can be used: activations 40.0")


def test_on_this_machine_nothing_limits_the_time() -> None:
    assert found(plan(time_limit_min=None)) == []


def test_a_qos_preempts_whatever_the_partition() -> None:
    at = site(qos={"besteffort": {"preemptible": True, "grace_s": 0, "preempted_every": "6h"}}, partitions={"gpu": {"max_time": "48h"}})
    options = {"partition": "gpu", "qos": "besteffort"}
    (finding,) = found(plan(slurm=options), at=at)
    assert finding.message.startswith("qos besteffort gives 0 s between notice and kill")
    assert found(plan(slurm={"partition": "gpu", "qos": "normal"}), at=at) == []
    often = plan_of(preset(data={"name": "a/c", "num_samples": 1000}), site=at, slurm=options)[0].time
    seldom = plan_of(preset(data={"name": "a/c", "num_samples": 1000}), site=at, slurm={"partition": "gpu"})[0].time
    assert often is not None and often.expected_loss_share is not None
    assert seldom is not None and seldom.expected_loss_share is None


@pytest.mark.parametrize(
    ("wish", "grace_s", "warned"),
    [({}, 60, True), ({}, 200, False), ({"checkpoint": {"minutes": 10}}, 60, False)],
    ids=["too short", "long enough", "timed saves"],
)
def test_save_against_grace(wish: dict[str, Any], grace_s: int, warned: bool) -> None:
    at = site(partitions={"low": {"preemptible": True, "grace_s": grace_s}})
    findings = found(plan(changes={"site": at}, slurm={"partition": "low"}), at=at, wish=wish)
    assert [finding.code for finding in findings] == ["save-longer-than-grace"] * warned
    assert all("only timed checkpoints protect" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("gated", "token", "staged", "refused"),
    [
        (True, False, False, True),
        (True, True, False, False),
        (True, None, False, False),
        (False, False, False, False),
        (True, False, True, False),
    ],
    ids=["no token", "token", "nobody looked", "not gated", "already here"],
)
def test_gated_model(gated: bool, token: bool | None, staged: bool, refused: bool) -> None:
    facts = FACTS.model_copy(update={"gated": gated})
    changes = {"staged": STAGED if staged else None}
    wish = {"model": {"name": "a/b"}}
    codes = [finding.code for finding in found(plan(changes=changes), Observed(token=token), facts, wish=wish)]
    assert codes == ["gated-model"] * refused
