"""site discover: what Slurm prints → facts → a whole site file, for clusters that differ; and the machine's own facts.

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
from launcher.cli.site import known_gpus
from launcher.errors import ActionError, FtlaunchError, MissingError
from launcher.preset.reading import read_site
from launcher.preset.site import Site
from launcher.site import slurm_facts
from launcher.site.ask import ask_cluster
from launcher.site.conclude import conclude, preemptible
from launcher.site.kinds import kind_of
from launcher.site.machine_facts import (
    Apptainer,
    Machine,
    Room,
    container_module,
    filesystem_of,
    find_rooms,
    look_for_apptainer,
    module_names,
    read_mounts,
    subordinate_ids,
)
from launcher.site.rights import rights_of
from launcher.site.site_file import add_facts, flow, scalar, site_text
from launcher.site.slurm_facts import Gres
from launcher.site.trial import try_requests
from tests.conftest import REPOSITORY
from tests.fake_cluster import NAMES, cluster_of, make_fake_cluster

GOLDEN = REPOSITORY / "tests" / "golden" / "discovered"
TODAY = "2026-11-22"

MACHINE = Machine(
    host="login1",
    user="student",
    groups=frozenset(["student", "users"]),
    rooms=(Room("$SCRATCH", "/scratch/student", "lustre", 9 * 2**40), Room("$WORK", "/project/student", "nfs4", 2**40)),
    small_rooms=(),
    has_modules=True,
    apptainer=Apptainer("/usr/bin/apptainer", "apptainer", "1.4.5", None, True, True, True, True),
)
POOR = replace(
    MACHINE,
    rooms=(),
    small_rooms=(Room("$WORK", "/project/student", "nfs4", 3 * 2**30),),
    has_modules=False,
    apptainer=Apptainer(None),
)
MODULE = replace(MACHINE, apptainer=Apptainer("/opt/apptainer/bin/apptainer", "apptainer", "1.3.3", "tacc-apptainer", False, True))
MACHINES = {"bare": POOR, "whole": MODULE}


def discovered(name: str) -> str:
    return site_text(conclude(cluster_of(name), MACHINES.get(name, MACHINE), known_gpus(), name=None, today=TODAY))


def site_of(text: str, folder: Path) -> Site:
    file = folder / "found.yaml"
    file.write_text(text)
    return read_site(str(file)).value


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


@pytest.mark.parametrize(
    ("gres_type", "features", "kind"),
    [
        ("a100", (), None),
        ("a100", ("rome", "mem_80"), None),
        ("a100", ("a100_80",), "a100-80gb"),
        ("nvidia_a100-sxm4-40gb", (), "a100-40gb"),
        ("nvidia_a100-pcie-40gb", (), "a100-pcie-40gb"),
        ("volta", ("volta16",), "v100-16gb"),
        ("h100", (), "h100"),
        ("gh200", (), "gh200"),
        (None, ("GPU_SKU:A100_SXM4", "GPU_MEM:80GB"), "a100-80gb"),
    ],
)
def test_kind(gres_type: str | None, features: tuple[str, ...], kind: str | None) -> None:
    found = kind_of(gres_type, features, known_gpus())
    assert found is not None and found.name == kind


@pytest.mark.parametrize(("gres_type", "features"), [("a100_1g.10gb", ()), (None, ("skylake", "ib"))])
def test_no_kind(gres_type: str | None, features: tuple[str, ...]) -> None:
    assert kind_of(gres_type, features, known_gpus()) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu:a100:4(S:0-1),nvme:1", (Gres("gpu", "a100", 4), Gres("nvme", None, 1))),
        ("gpu:4", (Gres("gpu", None, 4),)),
        ("gpu:1g.10gb:7(S:0,1)", (Gres("gpu", "1g.10gb", 7),)),
        ("localtmp:2G", (Gres("localtmp", None, 2**31),)),
        ("gpu:4090:8", (Gres("gpu", "4090", 8),)),
        ("(null)", ()),
    ],
)
def test_gres(text: str, found: tuple[Gres, ...]) -> None:
    assert slurm_facts.gres(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("1-00:00:00", 1440), ("02:00:00", 120), ("00:00:30", 1), ("30", 30), ("10:30", 11), ("2-12", 3600), ("UNLIMITED", None), ("", None)],
)
def test_minutes(text: str, found: int | None) -> None:
    assert slurm_facts.minutes(text) == found


def test_values_with_spaces_and_equals_signs() -> None:
    (record,) = slurm_facts.records(
        "NodeName=n1 OS=Linux 5.14 #1 SMP RealMemory=10 Reason=a=b c d [root@2026] Partitions=x,y\n   State=DOWN*"
    )
    assert (record["OS"], record["RealMemory"], record["Partitions"], record["State"]) == ("Linux 5.14 #1 SMP", "10", "x,y", "DOWN*")


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


@pytest.mark.parametrize(
    "value", ["on", "null", "24h", "1e5", "0x1", "a: b", "#x", "*", "it's", "", "~", "12", "é", "- a", "a #b", True, 7]
)
def test_scalars_are_read_back(value: object, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    assert YAML(typ="safe").load(f"x: {scalar(value)}")["x"] == value
    assert YAML(typ="safe").load(flow({"a": [value, {str(value): value}]})) == {"a": [value, {str(value): value}]}


def test_learned_facts_keep_the_comments(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(discovered("besteffort"))
    add_facts(file, "strict", {("partitions", "gpu", "driver"): "580.1", ("local_disk",): ["/tmp"]}, "probe")
    site = read_site(str(file)).value
    assert (site.partitions["gpu"].driver, site.partitions["gpu"].qos, site.local_disk) == ("580.1", "regular", ["/tmp"])
    assert site.sources["partitions.gpu.driver"] == "probe" and "local_disk" not in site.unknown
    assert "# without --time a job gets 2h" in file.read_text()


def test_learned_facts_in_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    add_facts(file, "slurm", {("partitions", "a.b", "internet"): False}, "probe")
    site = read_site(str(file)).value
    assert (site.name, site.partitions["a.b"].internet, site.container.use) == ("mine", False, "apptainer")


MOUNTS = "rootfs / ext4 rw 0 0\nsrv:/home /home nfs4 rw 0 0\nfs@tcp:/x /scratch lustre rw 0 0\nx /mnt/with\\040space beegfs_nodev rw 0 0\n"


def test_mounts(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    mounts = read_mounts(tmp_path / "mounts")
    assert [filesystem_of(path, mounts) for path in ("/home/a", "/scratch", "/scratchy", "/mnt/with space/x")] == [
        "nfs4",
        "lustre",
        "ext4",
        "beegfs_nodev",
    ]


def test_rooms(tmp_path: Path) -> None:
    home, scratch, closed = tmp_path / "home", tmp_path / "scratch", tmp_path / "closed"
    for folder in (home / "work", scratch, closed):
        folder.mkdir(parents=True)
    environ = {"USER": "x", "SCRATCH": str(scratch), "WORK": str(home / "work"), "PROJECT": str(scratch), "LUSTRE": str(tmp_path / "gone")}
    rooms = find_rooms(environ, home, [("/", "ext4"), (str(scratch), "lustre")])
    assert [(room.written, room.shared) for room in rooms] == [("$SCRATCH", True)]


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (["gcc/12", "tacc-apptainer/1.3.3", "tacc-apptainer/1.4.1(default)"], "tacc-apptainer"),
        (["/opt/modules:", "tools/Apptainer/1.2.4"], "tools/Apptainer"),
        (["singularity-ce/4.1.0"], "singularity-ce"),
        (["apptainer-extras-docs"], None),
        ([], None),
    ],
)
def test_container_module(names: list[str], module: str | None) -> None:
    assert container_module(names) == module


def test_apptainer_by_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``module`` is a function of the login shell, and only what it loads brings the command."""
    (tmp_path / "brought").mkdir()
    command = tmp_path / "brought" / "singularity"
    command.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "singularity-ce version 3.11.4"\nexit 0\n')
    command.chmod(0o755)
    (tmp_path / ".bash_profile").write_text(
        f'module() {{ if [ "$2" = avail ]; then echo site/singularity/3.11; else PATH=$PATH:{tmp_path}/brought; fi; }}\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    names = module_names()
    assert names == ["site/singularity/3.11"]
    found = look_for_apptainer(None, names)
    assert (found.path, found.command, found.module, found.version, found.setuid) == (
        str(command),
        "singularity",
        "site/singularity",
        "3.11.4",
        False,
    )


def test_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".bash_profile").write_text("unset -f module\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module_names() is None


def test_subordinate_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("newuidmap", "newgidmap"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "subuid").write_text("anna:100000:65536\n")
    (tmp_path / "empty").write_text("")
    assert subordinate_ids("anna", [str(tmp_path / "subuid")] * 2)
    assert not subordinate_ids("anna", [str(tmp_path / "subuid"), str(tmp_path / "empty")])
    assert not subordinate_ids("ann", [str(tmp_path / "subuid")] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_programs_are_asked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the programs print is what the golden files were made of."""
    fake = make_fake_cluster(name, tmp_path / "bin", monkeypatch)
    asked, known = ask_cluster("student"), cluster_of(name)
    assert (asked.config, asked.partitions, asked.nodes) == (known.config, known.partitions, known.nodes)
    assert (asked.associations, asked.qualities, asked.default_account) == (known.associations, known.qualities, known.default_account)
    assert asked.failed == {} and bool(fake.calls("sacctmgr")) == known.has_accounting


def test_programs_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "node": {"err": "slurm_load_node error: Unable to contact\n"},
        "qos": {"err": "sacctmgr: error: slurm_persist_conn_open: Connection refused\n"},
    }
    make_fake_cluster("besteffort", tmp_path / "bin", monkeypatch, broken=broken)
    cluster = ask_cluster("student")
    assert cluster.nodes == () and cluster.qualities == ()
    assert set(cluster.failed) == {"scontrol -o show node", "sacctmgr -n -P show qos"}
    text = site_text(conclude(cluster, MACHINE, known_gpus(), name=None, today=TODAY))
    site = site_of(text, tmp_path)
    assert site.partitions["gpu"].gpus_per_node == 4  # by the partition's TRES
    assert "scontrol -o show node failed: slurm_load_node error: Unable to contact" in text


@pytest.mark.parametrize(
    ("name", "refused", "request_", "memory", "asked"),
    [
        ("besteffort", [], "gres", "mem", 1),
        ("besteffort", ["--gres=gpu:volta:1"], "gpus_per_node", "mem", 2),
        ("besteffort", ["--gres=gpu:volta:1", "--gpus-per-node=volta:1", "--mem=1G"], "gpus_per_task", "none", 7),
        ("whole", [], "none", "none", 1),
        ("bare", ["--partition=all"], "gres", "none", 4),
    ],
)
def test_slurm_is_asked_whether_it_would_take_a_job(
    name: str, refused: list[str], request_: str, memory: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: dict[str, dict[str, object]] = {word: {"err": f"sbatch: error: no {word[2:5]} here\n"} for word in refused}
    fake = make_fake_cluster(name, tmp_path / "bin", monkeypatch, broken=broken)
    draft = conclude(cluster_of(name), MACHINE, known_gpus(), name=None, today=TODAY)
    try_requests(draft, str(tmp_path / "bin" / "sbatch"), today=TODAY)
    assert (draft.values["gpu_request"], draft.values["memory"]) == (request_, memory)
    assert len(fake.calls("sbatch")) == asked and all(call[0] == "--test-only" for call in fake.calls("sbatch"))
    assert ("gpu_request" in draft.unknown) == (name == "bare")
    assert draft.notes[""][-1].startswith("Slurm refuses" if name == "bare" else "Slurm takes a job asked for by")
    site_of(site_text(draft), tmp_path)


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="scontrol"):
        ask_cluster("student")


def test_no_answer_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"scontrol": {"err": "Unable to contact slurm controller (connect failure)\n"}}
    make_fake_cluster("besteffort", tmp_path / "bin", monkeypatch, broken=broken)
    with pytest.raises(ActionError, match="Unable to contact"):
        ask_cluster("student")


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
