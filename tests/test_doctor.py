"""doctor: a line for every finding and the exit code; its probe on a pretended cluster whose sbatch runs the job here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from launcher.cli import app
from launcher.cli.site import known_gpus
from launcher.errors import ActionError
from launcher.preset.choose import Folders
from launcher.preset.reading import read_site
from launcher.site import checks, probe
from launcher.site.checks import Check
from launcher.site.machine_facts import Apptainer
from launcher.site.node_report import Tried, disk_facts, folder_facts, index_reachable, interfaces, kernel_driver, submits
from launcher.site.probe import Probe, learned, probe_checks, wait_for
from tests.fake_cluster import FakeCluster, cluster_of, make_fake_cluster
from tests.plans import site as a_site

JOB = {"SLURM_JOB_PARTITION": "booster", "SLURMD_NODENAME": "jn1"}

SMI = """#!/bin/sh
case $1 in
--query-gpu=driver_version) echo 555.42.02 ;;
--query-gpu=*) echo "NVIDIA A100-SXM4-40GB, 40960, 555.42.02"; echo "NVIDIA A100-SXM4-40GB, 40960, 555.42.02" ;;
*) echo "| NVIDIA-SMI 555.42.02  Driver Version: 555.42.02  CUDA Version: 12.5 |" ;;
esac
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own, no package index and no hub."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ours = ("FTLAUNCH_SITE", "FTLAUNCH_RUNS", "FTLAUNCH_IMAGES", "FTLAUNCH_DATA", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS")
    for name in (*ours, "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    """A site for the pretended cluster ``modern``, without a container."""
    file = tmp_path / "juno.yaml"
    file.write_text(
        f"""# mine
extends: slurm
name: juno
source: a test
container: {{use: none}}
whole_nodes: true
memory: none
default_account: training2601
partitions:
  booster: {{max_time: 24h, gpus_per_node: 4, gpu: a100-40gb, hardware: a100-40gb}}
local_disk: [$NOWHERE, {tmp_path}]
runs: {tmp_path}/runs
images: {tmp_path}/images
data: {tmp_path}/data
unknown: ["partitions.booster.driver"]
"""
    )
    return file


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    fake = make_fake_cluster("modern", tmp_path / "bin", monkeypatch, job=JOB)
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    yield fake


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def levels(document: dict[str, Any], code: str) -> list[str]:
    return [finding["level"] for finding in document["findings"] if finding["code"] == code]


def test_this_machine() -> None:
    done = run("--site", "local", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == (0 if document["ok"] else 4)
    assert {"python", "packages", "apptainer", "home", "tmp", "driver", "terminal"} <= {found["code"] for found in document["findings"]}
    assert all(set(finding) == {"level", "code", "message", "hint"} for finding in document["findings"])


def test_one_line_for_each_finding(site_file: Path, nodes: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LITTLE_BYTES", 0)  # whatever this machine has left
    done = run("--site", site_file)
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warning", "error") for line in lines), done.stdout
    assert "accounts: training2601; default: training2601" in done.stdout
    assert any(line.startswith("warning") and "not a shared file system by its type" in line for line in lines)


def test_no_slurm_here(site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("--site", site_file, "--json")
    assert done.exit_code == 4 and levels(json.loads(done.stdout), "slurm-tools") == ["error"]


def test_the_controller_does_not_answer(site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fake_cluster("modern", tmp_path / "bin", monkeypatch, broken={"ping": {"err": "connect failure\n"}})
    done = run("--site", site_file, "--json")
    assert done.exit_code == 4 and levels(json.loads(done.stdout), "controller") == ["error"]


def test_no_folders(tmp_path: Path, nodes: FakeCluster) -> None:
    done = run("--site", "slurm", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 4 and levels(document, "no-folders") == ["error"]
    assert any("runs: /FOLDER" in (found["hint"] or "") for found in document["findings"])


def found(checks_: Iterator[Check], code: str) -> list[tuple[str, str]]:
    return [(check.level, check.message) for check in checks_ if check.code == code]


def test_rights_of_the_user() -> None:
    cluster = cluster_of("besteffort")
    strict = a_site(account="required", partitions={"gpu": {"max_time": "96h"}, "gone": {}, "hopper": {}})
    told = list(checks.cluster_checks(strict, cluster, frozenset(), None))
    assert [check.level for check in told if check.code == "account"] == ["warning"]
    messages = [check.message for check in told if check.code == "partition"]
    assert messages[0] == "partition gpu: the site says max_time 96h, Slurm 2880 min"
    assert "Slurm knows no partition gone" in messages[1] and "AllowAccounts=h100project" in messages[2]
    assert found(checks.cluster_checks(strict, cluster, frozenset(), "other"), "account") == [("error", "account other is not yours")]
    nobody = replace(cluster, associations=(), default_account=None)
    assert found(checks.cluster_checks(strict, nobody, frozenset(), None), "accounting")[0][0] == "error"
    assert found(checks.cluster_checks(a_site(), cluster_of("bare"), frozenset(), None), "accounting")[0][0] == "ok"


FUSE = Apptainer("/usr/bin/apptainer", "apptainer", "1.4.5", None, False, True, True, True)


@pytest.mark.parametrize(
    ("facts", "site", "code", "level"),
    [
        (FUSE, {}, "apptainer-mount", "ok"),
        (replace(FUSE, setuid=None), {}, "apptainer-mount", "warning"),
        (replace(FUSE, version="1.0.3"), {}, "apptainer-version", "warning"),
        (replace(FUSE, user_namespaces=False), {}, "user-namespaces", "error"),
        (replace(FUSE, subordinate_ids=False), {}, "fakeroot", "warning"),
        (replace(FUSE, fuse=False), {}, "fuse", "warning"),
        (replace(FUSE, path=None), {}, "apptainer", "error"),
        (replace(FUSE, path=None), {"build": {"on": "slurm"}}, "apptainer", "warning"),
        (FUSE, {"container": {"use": "none"}}, "apptainer", "ok"),
    ],
)
def test_apptainer(facts: Apptainer, site: dict[str, Any], code: str, level: str) -> None:
    assert [one for one, _ in found(checks.apptainer_checks(a_site(**site), facts), code)] == [level]


def test_setuid_needs_neither_fuse_nor_namespaces() -> None:
    facts = replace(FUSE, setuid=True, user_namespaces=False, fuse=False)
    assert {check.level for check in checks.apptainer_checks(a_site(), facts)} == {"ok"}


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(tmp_path / "a" / "runs", tmp_path / "home" / "images", tmp_path / "file" / "data")
    (tmp_path / "file").touch()
    mounts = [("/", "ext4"), (str(tmp_path), "lustre")]
    monkeypatch.setattr(checks, "LITTLE_BYTES", 0)
    monkeypatch.setattr(checks, "FULL_BYTES", 0)
    told = list(checks.folder_checks(a_site(), folders, tmp_path / "home", mounts))
    assert [(check.level, check.code) for check in told] == [
        ("ok", "folder"),
        ("warning", "folder-home"),
        ("error", "folder"),
    ]
    monkeypatch.setattr(checks, "FULL_BYTES", 2**70)
    assert [check.level for check in checks.folder_checks(a_site(), folders, tmp_path, mounts)] == ["error"] * 3
    assert not (tmp_path / "a").exists()


def test_clock(tmp_path: Path) -> None:
    assert [check.level for check in checks.clock_checks(tmp_path)] == ["ok"]
    assert found(checks.clock_checks(tmp_path / "not" / "yet", now=0.0), "clock")[0][0] == "warning"
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]


def test_caches_in_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    told = checks.home_checks(home, {"HF_HOME": str(home / ".cache"), "TORCH_HOME": str(tmp_path)})
    assert found(told, "caches") == [("warning", "HF_HOME: in home")]


def test_probe(site_file: Path, nodes: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job really runs: its script, our code on its path, the report, what the site file learns."""
    monkeypatch.setattr(checks, "FULL_BYTES", 0)
    done = run("--site", site_file, "--probe", "--out", site_file, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    document = json.loads(done.stdout)
    report = document["probe"]
    assert (report["node"], report["partition"], report["driver"], report["cuda"]) == ("jn1", "booster", "555.42.02", "12.5")
    assert [gpu["memory_mib"] for gpu in report["gpus"]] == [40960, 40960]
    assert report["folders"]["runs"]["writable"] and report["home"]["writable"] and report["sbatch"]["works"]
    assert report["local_disk"][0]["why"] == "is not set" and report["local_disk"][1]["free_bytes"] > 0
    assert levels(document, "node-gpus") == ["warning"]  # whole nodes: four were asked for
    assert document["learned"]["partitions.booster.internet"] is False
    site = read_site(str(site_file)).value
    assert (site.partitions["booster"].driver, site.partitions["booster"].cuda, site.local_disk) == ("555.42.02", "12.5", [str(tmp_path)])
    assert site_file.read_text().startswith("# mine\n") and "partitions.booster.driver" not in site.unknown
    assert list((tmp_path / "runs").iterdir()) == []
    (submission,) = [call for call in nodes.calls("sbatch") if "--test-only" not in call]
    assert submission[0] == "--parsable"


def test_what_was_learned_can_go_into_a_file_of_its_own(
    site_file: Path, nodes: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "FULL_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sites").mkdir()
    done = run("--site", site_file.name, "--probe", "--out", "sites/learned.yaml")
    assert done.exit_code == 0, (done.output, done.exception)
    site = read_site("sites/learned.yaml").value
    assert (site.name, site.partitions["booster"].driver, site.default_account) == ("learned", "555.42.02", "training2601")


def test_the_probe_asks_as_a_run_does(site_file: Path, tmp_path: Path) -> None:
    from launcher.cli.probe_plan import probe_plan

    plan, _ = probe_plan(str(site_file), read_site(str(site_file)).value, {"partition": None, "qos": "normal"})
    asked = dict(probe.probe_directives(plan, Probe(tmp_path)))
    assert asked == {
        "job-name": "ftlaunch-probe",
        "output": f"{tmp_path}/probe.log",
        "open-mode": "append",
        "propagate": "NONE",
        "nodes": "1",
        "ntasks-per-node": "1",
        "gres": "gpu:4",
        "time": "0-00:02:00",
        "account": "training2601",
        "partition": "booster",
        "qos": "normal",
    }


def test_the_interpreter_does_not_run_there(site_file: Path, nodes: FakeCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "FULL_BYTES", 0)
    monkeypatch.setattr("sys.executable", str(tmp_path / "gone"))
    done = run("--site", site_file, "--probe", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 4 and levels(document, "node-python") == ["error"]
    assert document["probe"]["driver"] == "555.42.02" and document["learned"] == {}


def test_a_refused_probe_leaves_nothing(site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FULL_BYTES", 0)
    make_fake_cluster("modern", tmp_path / "bin", monkeypatch, broken={"sbatch": {"err": "sbatch: error: Invalid account\n"}})
    done = run("--site", site_file, "--probe")
    assert isinstance(done.exception, ActionError) and "Invalid account" in str(done.exception)
    assert list((tmp_path / "runs").iterdir()) == []


def test_ctrl_c_cancels_the_probe(site_file: Path, nodes: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "FULL_BYTES", 0)
    monkeypatch.setattr(probe, "wait_for", interrupted)
    done = run("--site", site_file, "--probe")
    assert done.exit_code == 130 and nodes.calls("scancel") == [["4711"]]
    assert "job 4711 is cancelled" in done.stderr and list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("arguments", [["--site", "local", "--probe"], ["--site", "local", "--out", "x.yaml"]])
def test_wrong_use(arguments: list[str]) -> None:
    done = run(*arguments)
    assert getattr(done.exception, "exit_code", None) == 2


class Clock:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def waiting(slurm: Any, folder: Path, *answers: dict[str, object]) -> Callable[[], tuple[dict[str, Any], list[str], Clock]]:
    slurm.answer("squeue", *answers)
    clock, said = Clock(), list[str]()
    return lambda: (wait_for(Probe(folder), "4711", slurm.tools, progress=said.append, sleep=clock.sleep, clock=clock), said, clock)


def test_waiting_asks_slurm_rarely(slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = waiting(slurm, tmp_path, {"out": "4711|PENDING|Priority\n"})
    real = probe.look_up

    def third_time(*arguments: Any) -> Any:
        if len(slurm.calls("squeue")) == 2:
            Probe(tmp_path).report.write_text('{"node": "n1"}')
        return real(*arguments)

    monkeypatch.setattr(probe, "look_up", third_time)
    report, said, clock = begin()
    assert (report, said) == ({"node": "n1"}, ["job 4711 is pending: Priority"])
    assert clock.now == 182 and len(slurm.calls("squeue")) == 3


def test_a_job_that_ends_without_a_report(slurm: Any, tmp_path: Path) -> None:
    (tmp_path / "probe.log").write_text("slurmstepd: error: execve(): no such file\n")
    begin = waiting(slurm, tmp_path, {"out": "4711|FAILED|NonZeroExitCode\n"})
    with pytest.raises(ActionError, match="ended without a report: slurmstepd: error: execve"):
        begin()


REPORT: dict[str, Any] = {
    "node": "n1", "partition": "gpu", "python": {"executable": "/p", "version": "3.11"}, "gpus": [], "driver": None, "cuda": None,
    "home": {"visible": False, "writable": False}, "folders": {"runs": {"path": "/r", "writable": False, "free_bytes": None}},
    "local_disk": [{"written": "/tmp", "path": "/tmp", "why": None, "free_bytes": 2**30, "ram_backed": True}],
    "network": {"index": {"works": True, "why": ""}, "hub": {"works": None, "why": "no address"}},
    "user_namespaces": False, "interfaces": [{"name": "ib0", "kind": "ib"}],
    "container": {"path": "/a", "version": "1.3", "setuid": False}, "sbatch": {"works": False, "why": "NOTIFICATION: not on compute nodes"},
}  # fmt: skip


def test_what_a_poor_node_means() -> None:
    told = probe_checks(REPORT, wants_gpus=1)
    assert [(check.level, check.code) for check in told if check.level != "ok"] == [
        ("warning", "node-gpus"),
        ("error", "node-folder"),
        ("warning", "node-home"),
        ("warning", "node-disk"),
        ("error", "node-userns"),
        ("warning", "node-sbatch"),
    ]
    assert f"{REPORT['node']}: the hub was not asked: no address" in [check.message for check in told]
    disks = [{"written": "$X", "path": None, "why": "is not set"}]
    assert ("error", "node-disk") in [(check.level, check.code) for check in probe_checks({**REPORT, "local_disk": disks}, wants_gpus=0)]


def test_what_a_site_learns() -> None:
    site = a_site(partitions={"gpu": {}}, continuation="resubmit")
    gpu = {"name": "NVIDIA A100-SXM4-80GB", "memory_mib": 81920, "driver": "580.1"}
    facts = learned({**REPORT, "gpus": [gpu], "driver": "580.1", "cuda": "13.0"}, site, "gpu", known_gpus())
    assert {".".join(key): value for key, value in facts.items()} == {
        "partitions.gpu.driver": "580.1",
        "partitions.gpu.cuda": "13.0",
        "partitions.gpu.internet": True,
        "partitions.gpu.gpu": "a100-80gb",
        "partitions.gpu.hardware": "a100-80gb",
        "local_disk": ["/tmp"],
        "continuation": "manual",
    }
    assert learned({"node": "n1", "python": None, "driver": ""}, site, "gpu", known_gpus()) == {}


def test_node_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk_facts("$A/x", {})["why"] == "is not set" and disk_facts("/nowhere/at/all", {})["why"] == "is not there"
    assert disk_facts("$A", {"A": str(tmp_path)})["why"] is None
    assert folder_facts(str(tmp_path / "new")) | {"free_bytes": 0} == {
        "path": str(tmp_path / "new"), "visible": False, "nearest": str(tmp_path), "writable": True, "free_bytes": 0,
    }  # fmt: skip
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  555.42.02  Mon Jun 24\n")
    assert (kernel_driver(str(tmp_path / "version")), kernel_driver(str(tmp_path / "none"))) == ("555.42.02", None)
    for name, kind, state in (("lo", "772", "unknown"), ("ib0", "32", "up"), ("eth1", "1", "down"), ("eth0", "1", "up")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "type").write_text(kind)
        (tmp_path / "net" / name / "operstate").write_text(state)
    assert interfaces(str(tmp_path / "net")) == [{"name": "eth0", "kind": "ether"}, {"name": "ib0", "kind": "ib"}]


def test_a_node_that_cannot_submit(tmp_path: Path) -> None:
    refusing = tmp_path / "sbatch"
    refusing.write_text(
        '#!/bin/sh\n[ -z "$SLURM_JOB_ID" ] || exit 0\necho NOTIFICATION: not here\necho sbatch: error: filter failed >&2\nexit 1\n'
    )
    refusing.chmod(0o755)
    assert submits(str(refusing), "x", {"SLURM_JOB_ID": "1", "PATH": "/usr/bin:/bin"}) == Tried(
        False, "filter failed; NOTIFICATION: not here"
    )


def test_no_package_index() -> None:
    import sys

    tried = index_reachable(sys.executable, "http://user:word@127.0.0.1:9/simple")
    assert tried.works is False and tried.why and "word" not in tried.why
