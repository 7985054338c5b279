"""site discover: facts → a whole site file, for clusters that differ; and the command.

``python -m tests.test_site_discover`` writes the golden files anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import FtlaunchError
from launcher.preset.reading import read_site
from launcher.site.conclude import conclude, preemptible
from launcher.site.rights import rights_of
from launcher.site.site_file import site_text
from tests.conftest import REPOSITORY
from tests.discovered import MACHINE, TODAY, discovered, site_of
from tests.fake_cluster import NAMES, cluster_of, make_fake_cluster

GOLDEN = REPOSITORY / "tests" / "golden" / "discovered"


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_file(name: str) -> None:
    assert discovered(name) == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_read(name: str, tmp_path: Path) -> None:
    site = site_of(discovered(name), tmp_path)
    assert site.scheduler == "slurm" and site.partitions
    assert all(TODAY in source for source in site.sources.values())


def test_typed_gpus_and_limits(tmp_path: Path) -> None:
    site = site_of(discovered("shared"), tmp_path)
    assert (site.gpu_request, site.gpu_typed, site.gpu_type, site.memory, site.whole_nodes) == ("gres", True, None, "mem", False)
    gpus = {name: (entry.gpus_per_node, entry.gpu, entry.hardware) for name, entry in site.partitions.items()}
    assert gpus == {
        "main": (0, None, None),
        "gpu": (4, None, None),
        "a100-80": (4, "a100-80gb", "a100-80gb"),
        "gputest": (4, "a100-80gb", "a100-80gb"),
        "on": (0, None, None),
    }
    assert [entry.max_time for entry in site.partitions.values()] == ["72h", "36h", "12h", "15m", "8h"]
    assert [name for name, entry in site.partitions.items() if entry.test] == ["gputest"]
    node = site.partitions["a100-80"]
    assert (node.cpus_per_node, node.memory_per_node_gib, node.max_nodes) == (126, (515000 - 8192) // 1024, 2)
    assert (site.account, site.default_account, site.submit_limit, site.continuation) == ("optional", None, 20, "requeue")
    assert site.local_disk[-2:] == ["/local", "/tmp"]
    assert {"default_account", "local_disk_request", "partitions.gpu.hardware"} <= set(site.unknown)


def test_default_preset_fields_of_a_partition_without_our_hardware(tmp_path: Path) -> None:
    entry = site_of(discovered("shared"), tmp_path).partitions["gpu"]
    assert (entry.cpus_per_gpu, entry.memory_per_gpu_gib) == (16, 120)  # DefCpuPerGPU, DefMemPerGPU


def test_without_accounting(tmp_path: Path) -> None:
    site = site_of(discovered("bare"), tmp_path)
    assert (site.account, site.default_account, site.gpu_type, site.memory) == ("optional", None, "rtx3090", "none")
    entry = site.partitions["all"]
    assert (entry.max_time, entry.gpu, entry.hardware, entry.gpus_per_node) == (None, "rtx3090", None, 2)
    assert (entry.cpus_per_gpu, entry.memory_per_gpu_gib) == (8, 31)  # cores, not hardware threads; the smaller node
    assert (site.runs, site.build.on) == (None, "slurm") and "runs" in site.unknown


def test_whole_nodes_behind_a_submit_filter(tmp_path: Path) -> None:
    site = site_of(discovered("whole"), tmp_path)
    assert (site.gpu_request, site.memory, site.whole_nodes, site.continuation) == ("none", "none", True, "resubmit")
    assert (site.default_account, site.account, site.container.module) == ("TST24001", "optional", "tacc-apptainer")
    assert {"gpu_request", "partitions.gpu-a100.gpus_per_node"} <= set(site.unknown)
    assert [name for name, entry in site.partitions.items() if entry.test] == ["gpu-a100-dev"]
    assert "admin" not in site.partitions


def test_preemption_by_qos_and_memory_by_feature(tmp_path: Path) -> None:
    site = site_of(discovered("besteffort"), tmp_path)
    gpu = site.partitions["gpu"]
    assert (gpu.gpu, gpu.hardware, gpu.constraint, gpu.qos) == ("v100-32gb", "v100-32gb", "volta32", "regular")
    assert (site.gpu_type, site.account, site.default_account) == ("volta", "required", "ml")
    assert site.qos["besteffort"].preemptible and site.qos["besteffort"].grace_s == 0
    assert site.partitions["interactive"].qos == "debug" and site.partitions["interactive"].test
    assert not gpu.preemptible and "hopper" not in site.partitions


def test_untyped_gpus_and_preemption_by_partition(tmp_path: Path) -> None:
    site = site_of(discovered("modern"), tmp_path)
    assert (site.gpu_request, site.gpu_type, site.gpu_typed, site.whole_nodes) == ("gres", None, False, True)
    assert [(entry.preemptible, entry.grace_s) for entry in site.partitions.values()] == [(False, None), (True, 60)]
    assert site.partitions["booster"].hardware == "a100-40gb" and site.partitions["booster"].cpus_per_node == 48
    assert "the batch step hears of a preemption first" in discovered("modern")


def test_an_account_that_accounting_does_not_know() -> None:
    cluster = replace(cluster_of("modern"), associations=(), default_account=None)
    rights = rights_of(cluster, frozenset())
    assert rights.unknown_user and rights.account_required and rights.account is None


def test_preemption_switched_off_for_the_cluster() -> None:
    cluster = cluster_of("modern")
    off = replace(cluster, config={**cluster.config, "PreemptMode": "OFF"})
    assert preemptible(cluster.partitions[1], cluster) and not preemptible(cluster.partitions[1], off)


def test_hostile_names_do_not_reach_the_file(tmp_path: Path) -> None:
    text = (REPOSITORY / "tests" / "clusters" / "bare" / "partition.txt").read_text()
    odd = text.replace("PartitionName=all", "PartitionName=$(id)") + "\n" + text
    cluster = cluster_of("bare", partition=odd, config="ClusterName             = a b\x1b[31m:#{}\n")
    written = site_text(conclude(cluster, MACHINE, [], name=None, today=TODAY))
    site = site_of(written, tmp_path)
    assert (site.name, list(site.partitions)) == ("a-b-31m", ["all"])
    assert "\x1b" not in written


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fake_cluster("modern", tmp_path / "bin", monkeypatch)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    out = tmp_path / "sites" / "juno.yaml"
    done = CliRunner().invoke(app, ["site", "discover", "--name", "mine", "--out", str(out)])
    assert (done.exit_code, done.stdout) == (0, "") and "ftlaunch doctor --site" in done.stderr
    assert read_site(str(out)).value.name == "mine"
    again = CliRunner().invoke(app, ["site", "discover", "--out", str(out)])
    assert isinstance(again.exception, FtlaunchError) and again.exception.exit_code == 2
    assert CliRunner().invoke(app, ["site", "discover", "--out", str(out), "--force"]).exit_code == 0
    printed = json.loads(CliRunner().invoke(app, ["site", "discover", "--json"]).stdout)
    assert printed["site"]["partitions"]["booster"]["gpus_per_node"] == 4 and printed["text"].startswith("# Made by ftlaunch")


def test_a_discovered_site_is_usable_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fake_cluster("modern", tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    file = tmp_path / "juno.yaml"
    file.write_text(discovered("modern"))
    done = CliRunner().invoke(
        app, ["render", "presets/tiny.yaml", "--site", str(file), "--partition", "booster", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    script = (tmp_path / "out" / "job.sbatch").read_text()
    assert "#SBATCH --partition=booster\n" in script and "#SBATCH --account=training2601\n" in script and "--mem" not in script


if __name__ == "__main__":
    os.makedirs(GOLDEN, exist_ok=True)
    for one in NAMES:
        (GOLDEN / f"{one}.yaml").write_text(discovered(one))
