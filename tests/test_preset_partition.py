"""Which partition a preset gets, the node that is planned for, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.preset.choose import Chosen, choose_slurm, with_partition
from launcher.preset.hardware import Hardware
from launcher.preset.partition import node_for, nodes_of, partition_findings, suiting
from launcher.preset.reading import read_preset
from launcher.preset.site import Site
from tests.plans import GPU, hardware, preset, site

FILES = {
    "a100-40gb": hardware(name="a100-40gb", gpu={**GPU, "kind": "a100-40gb", "memory_gib": 39.4}),
    "a100-80gb": hardware(name="a100-80gb", gpu={**GPU, "kind": "a100-80gb", "memory_gib": 79.2}),
    "h100": hardware(name="h100", gpu={**GPU, "kind": "h100", "memory_gib": 79.0}),
}
WANTED = FILES["a100-80gb"]


def cluster(**partitions: dict[str, Any]) -> tuple[Site, dict[str, Hardware]]:
    made = site(partitions=partitions)
    return made, nodes_of(made, FILES.__getitem__)


SMALL: dict[str, Any] = {"hardware": "a100-40gb", "gpu": "a100-40gb", "gpus_per_node": 1, "max_nodes": 1}
BIG: dict[str, Any] = {"hardware": "a100-80gb", "gpu": "a100-80gb", "gpus_per_node": 4}
TEST: dict[str, Any] = {**BIG, "test": True}
HOPPER: dict[str, Any] = {"hardware": "h100", "gpu": "h100", "gpus_per_node": 2}


@pytest.mark.parametrize(
    ("partitions", "wish", "expected"),
    [
        pytest.param({"small": SMALL, "big": BIG, "hopper": HOPPER}, {"gpus": 2}, ["big"], id="of-its-kind"),
        pytest.param({"small": SMALL, "hopper": HOPPER}, {"gpus": 2}, ["hopper"], id="as-large"),
        pytest.param({"small": SMALL}, {"gpus": 2}, ["small"], id="the-largest-that-there-is"),
        pytest.param({"big": BIG, "two": {**BIG, "gpus_per_node": 2}}, {"gpus": 2}, ["two"], id="smallest-node-that-holds-it"),
        pytest.param({"big": BIG, "two": {**BIG, "gpus_per_node": 2}}, {"gpus": 3}, ["big"], id="only-one-holds-it"),
        pytest.param({"big": BIG, "two": {**BIG, "gpus_per_node": 2}}, {"gpus": 9}, ["big"], id="none-holds-it"),
        pytest.param({"big": {**BIG, "max_nodes": 1}, "more": BIG}, {"gpus": 2, "nodes": 2}, ["more"], id="too-many-nodes"),
        pytest.param({"big": BIG, "same": BIG}, {"gpus": 2}, ["big", "same"], id="nothing-tells-them-apart"),
        pytest.param({"test": TEST, "hopper": HOPPER}, {"gpus": 2}, ["hopper"], id="never-a-test-partition"),
        pytest.param({"undescribed": {"gpu": "a100-80gb", "gpus_per_node": 4}}, {"gpus": 2}, [], id="no-hardware"),
        pytest.param({"big": BIG, "cpu": {"gpus_per_node": 0}, "fat": {"gpus_per_node": 0}}, {"gpus": 0}, ["cpu"], id="without-gpus"),
        pytest.param({"big": BIG}, {"gpus": 0}, [], id="without-gpus-none"),
    ],
)
def test_partitions_that_suit(partitions: dict[str, Any], wish: dict[str, Any], expected: list[str]) -> None:
    made, nodes = cluster(**partitions)
    assert suiting(preset(**wish), WANTED, made, nodes) == expected


def test_a_node_is_the_file_with_what_the_partition_says() -> None:
    said = {"cpus_per_node": 28, "memory_per_node_gib": 100, "driver": "570.1", "cuda": "12.8"}
    made, nodes = cluster(share=BIG, own={**BIG, **said})
    share, own = nodes["share"], nodes["own"]
    assert (share.name, share.gpus, share.cpus, share.memory_gib, share.driver) == ("cluster-share", 4, 32, 240, "555.42.02")
    assert (own.cpus, own.memory_gib, own.driver, own.cuda, own.gpu) == (28, 100, "570.1", "12.8", WANTED.gpu)
    assert node_for(preset(), WANTED, made, "own", nodes) == own
    assert node_for(preset(), WANTED, made, None, nodes) == node_for(preset(gpus=0), WANTED, made, "own", nodes) == WANTED
    assert node_for(preset(), WANTED, made, "elsewhere", nodes) == WANTED


@pytest.mark.parametrize(
    ("partitions", "partition", "expected"),
    [
        pytest.param({"big": BIG}, "big", [], id="its-own-gpu"),
        pytest.param(
            {"small": SMALL},
            "small",
            ["advice: hardware-of-site: hardware: planned for a100-40gb, which partition small of site cluster has, not for a100-80gb"],
            id="another-gpu",
        ),
        pytest.param(
            {"odd": {"gpu": "l40s"}},
            "odd",
            [
                "error: gpu-not-in-partition: hardware: partition odd of site cluster has l40s, the preset is planned for a100-80gb "
                "(a hardware file of yours with kind: l40s, named by hardware in the preset or in the site's partition)"
            ],
            id="a-gpu-that-nothing-describes",
        ),
        pytest.param({"odd": {}}, "odd", [], id="nothing-known"),
        pytest.param(
            {"big": BIG, "same": BIG},
            None,
            [
                "error: partition-missing: slurm.partition: site cluster has several partitions for this: big (4 × a100-80gb), "
                "same (4 × a100-80gb) (--partition, or slurm.partition)"
            ],
            id="several",
        ),
        pytest.param({}, None, [], id="none"),
    ],
)
def test_what_is_said(partitions: dict[str, Any], partition: str | None, expected: list[str]) -> None:
    made, nodes = cluster(**partitions)
    suits = suiting(preset(), WANTED, made, nodes)
    found = partition_findings(preset(), WANTED, made, partition, suits, nodes)
    assert [f"{finding.level}: {finding.code}: {finding}" for finding in found] == expected


def test_a_site_that_wants_a_partition() -> None:
    made = site(partition="required")
    (finding,) = partition_findings(preset(gpus=0), WANTED, made, None, [], {})
    assert finding.message == "site cluster wants a partition, and none is described here that has no GPU"
    assert partition_findings(preset(), WANTED, made, "any", [], {}) == []
    assert partition_findings(preset(), WANTED, site(scheduler="none", partition="required"), None, [], {}) == []


def test_the_choice_brings_constraint_and_qos(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("extends: tiny\n")
    wish = read_preset(str(tmp_path / "x.yaml"))
    own = {"constraint": "volta32", "qos": "debug"}
    made = site(default_qos="normal", partitions={"gpu": {}, "interactive": own})
    there = choose_slurm(wish, made, environ={}, config=None, suits=["interactive"])
    assert there == {
        "partition": Chosen("interactive", "site cluster: the partition that suits"),
        "qos": Chosen("debug", "site cluster, partition interactive"),
        "constraint": Chosen("volta32", "site cluster, partition interactive"),
    }
    environ = {"SBATCH_PARTITION": "gpu", "SBATCH_QOS": "mine"}
    assert {key: one.value for key, one in choose_slurm(wish, made, environ=environ, config=None, suits=["interactive"]).items()} == {
        "partition": "gpu", "qos": "mine",
    }  # fmt: skip
    assert "partition" not in choose_slurm(wish, made, environ={}, config=None, suits=["gpu", "interactive"])
    assert with_partition(there, made, "gpu") == {"partition": "gpu", "qos": "normal"}
    assert with_partition({"time": Chosen("2h", "x")}, made, "interactive") == {"partition": "interactive", "time": "2h", **own}


def test_the_sites_default_comes_before_what_suits(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("extends: tiny\n")
    made = site(default_partition="gpu", partitions={"gpu": {}, "other": {}})
    chosen = choose_slurm(read_preset(str(tmp_path / "x.yaml")), made, environ={}, config=None, suits=["other"])
    assert chosen["partition"] == Chosen("gpu", "site cluster")
