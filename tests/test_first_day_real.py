"""What stands between a submission and a run on the real Slurm: held jobs, a maintenance, nodes that do not reach each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from launcher.run import Run
from launcher.slurm.queue import look_up
from launcher.slurm.tools import find_tools
from launcher.slurm.waiting import Waiting, explain
from launcher.submit import last_job_id
from tests.conftest import Cluster, Configuration
from tests.toy_slurm import LONG, SlurmToys, story, wait_until

pytestmark = pytest.mark.slurm


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("configuration", names, indirect=True)


@pytest.fixture
def toy_on_slurm(cluster: Cluster, slurm_path: None) -> Iterator[Callable[..., Run]]:
    toys = SlurmToys(cluster, "runs")
    yield toys.run
    toys.take_away()


def status(cluster: Cluster, run: Run) -> dict[str, Any]:
    return dict(json.loads(cluster.run(cluster.ftlaunch, "status", run.root, "--json").stdout))


@on("default")
def test_a_held_requeue_goes_on_with_the_command_that_status_names(
    configuration: Configuration, cluster: Cluster, toy_on_slurm: Callable[..., Run]
) -> None:
    run = toy_on_slurm(LONG)
    job = last_job_id(run)
    wait_until(run.metrics_file.exists, run)
    cluster.run("scontrol", "requeuehold", job)
    wait_until(lambda: status(cluster, run)["stuck"], run)
    seen = status(cluster, run)
    assert (seen["state"], seen["next"]) == ("continuing", f"scontrol release {job}"), seen
    assert "held" in seen["waits"]
    cluster.run(*seen["next"].split())
    wait_until(lambda: run.events("finished"), run)
    assert status(cluster, run)["next"] is None


@pytest.fixture
def waiting(cluster: Cluster, slurm_path: None) -> Iterator[Callable[..., tuple[str, Callable[[], Waiting]]]]:
    """A plain job of the user, and what we say of it."""
    jobs: list[str] = []

    def submit(*options: str, wrap: str = "true") -> tuple[str, Callable[[], Waiting]]:
        words = ["sbatch", "--parsable", "--partition=low", "--time=5", "--output=/dev/null", *options, "--wrap", wrap]
        job = cluster.run(*words).stdout.strip()
        jobs.append(job)
        return job, lambda: explain(look_up([job], find_tools())[job].reason, job=job, run="RUN")

    yield submit
    cluster.run("scancel", *jobs)


@on("default")
def test_holds_and_limits_as_slurm_says_them(
    configuration: Configuration, cluster: Cluster, waiting: Callable[..., tuple[str, Callable[[], Waiting]]]
) -> None:
    mine, said = waiting("--hold")
    assert said() == Waiting("held, by you or for you", f"scontrol release {mine}", True)
    subprocess.run(["scontrol", "release", mine], check=True)
    theirs, said = waiting("--begin=now+1hour")
    subprocess.run(["scontrol", "hold", theirs], check=True)  # as root
    assert said().stuck and "held by an administrator" in said().text
    refused = cluster.run("scontrol", "release", theirs, check=False)
    assert refused.returncode != 0, "a user cannot release it, as we say"
    failed, _ = waiting(wrap="false")
    wait_until(lambda: look_up([failed], find_tools())[failed].state == "failed")
    child, said = waiting(f"--dependency=afterok:{failed}")
    wait_until(lambda: said().text != "waits for another job to end")
    assert said() == Waiting("the job that it waits for ended otherwise", f"scontrol update JobId={child} Dependency=", True)
    cluster.run(*str(said().command).split())
    wait_until(lambda: look_up([child], find_tools())[child].state == "completed")


@on("default")
def test_nodes_meet(configuration: Configuration, toy_on_slurm: Callable[..., Run]) -> None:
    """There is no torch in the host's Python: a rank that looks for it has passed the meeting."""
    run = toy_on_slurm({}, train=True, ranks=1)
    wait_until(lambda: run.events("failed"), run)
    assert "No module named 'torch'" in run.events("failed")[0]["cause"], story(run)


@on("default")
def test_a_wrong_host_suffix_is_named(configuration: Configuration, toy_on_slurm: Callable[..., Run]) -> None:
    run = toy_on_slurm({}, train=True, ranks=1, site={"network": {"host_suffix": "-nonsense"}})
    wait_until(lambda: run.events("failed"), run)
    cause = run.events("failed")[0]["cause"]
    assert re.search(r"network.host_suffix: node[12] cannot reach node1 at node1-nonsense:\d+: Name or service not known", cause), story(
        run
    )
    assert "network.host_suffix of site test is '-nonsense'" in cause
    assert len(run.events("started")) == 1, "another life would meet the same"


@on("default")
def test_network_of_the_site_reaches_ranks_in_the_container(
    configuration: Configuration, cluster: Cluster, toy_on_slurm: Callable[..., Run]
) -> None:
    images = sorted((cluster.home / "images").glob("cpu-*.sif"))
    if not images:
        pytest.skip("no image was built by the tests before this one")
    library = cluster.home / "fabric"
    library.write_text("libfabric\n")
    network = {
        "ifname": "l,ib",
        "binds": [f"{library}:/mnt/fabric:ro"],
        "env": {"NCCL_IB_HCA": "mlx5", "FI_CXI_ATS": "0", "LD_LIBRARY_PATH": "/mnt", "MY_SWITCH": "a b"},
    }
    container = {"use": "apptainer", "image": str(images[-1]), "identity": "0" * 64, "command": shutil.which("apptainer")}
    site = {"network": network, "container": {"use": "apptainer", "mount": "file"}}
    run = toy_on_slurm({"steps": 2, "shows": ["/mnt/fabric"]}, nodes=1, site=site, container=container)
    wait_until(lambda: run.events("finished", "failed"), run)
    assert run.events("finished"), story(run)
    for rank in range(2):
        seen = json.loads((run.life(0) / f"environment-{rank}.json").read_text())
        assert {**network["env"], "NCCL_SOCKET_IFNAME": "l,ib"}.items() <= seen.items()
        assert seen["/mnt/fabric"] == "libfabric\n"


@pytest.fixture
def dry_run(configuration: Configuration, cluster: Cluster) -> Callable[..., tuple[str, str]]:
    """``ftlaunch submit tiny --dry-run`` or ``render``, as the smallest site file has it: the batch script, and what was said."""
    site = cluster.home / "smallest.yaml"
    site.write_text("extends: slurm\nname: smallest\nsource: a test\ncontainer: {use: none}\n")
    names = {"FTLAUNCH_RUNS": "runs", "FTLAUNCH_IMAGES": "images", "FTLAUNCH_DATA": "data"}
    environ = {name: str(cluster.home / folder) for name, folder in names.items()}

    def ask(*words: object) -> tuple[str, str]:
        done = cluster.run(cluster.ftlaunch, *words, "--site", site, "--json", env=environ)
        return str(json.loads(done.stdout)["files"]["job.sbatch"]), done.stderr

    return ask


def starts(cluster: Cluster, script: str) -> datetime:
    """When Slurm would start it."""
    file = cluster.home / "would.sbatch"
    file.write_text(script)
    said = cluster.run("sbatch", "--test-only", file).stderr
    found = re.search(r"to start at (\S+)", said)
    assert found is not None, said
    return datetime.fromisoformat(found[1])


@on("untyped")
def test_a_job_before_the_maintenance(configuration: Configuration, cluster: Cluster, dry_run: Callable[..., tuple[str, str]]) -> None:
    """The maintenance of this configuration is six hours away, on all nodes."""
    memory = ["--set", "memory_per_node_gib=1"]
    script, said = dry_run("submit", "tiny", "--dry-run", *memory)
    asked = re.search(r"--time=0-(\d\d):(\d\d):00", script)
    assert asked is not None and timedelta(hours=5) < timedelta(hours=int(asked[1]), minutes=int(asked[2])) < timedelta(hours=6), script
    assert re.search(r"time limit 5h\d\d instead of 24h, to end before maintenance maintenance", said), said
    soon = datetime.now() + timedelta(hours=1)
    assert starts(cluster, script) < soon
    whole, said = dry_run("render", "tiny", *memory)
    assert "--time=1-00:00:00" in whole and "maintenance" not in said
    late = starts(cluster, whole)
    typed, said = dry_run("submit", "tiny", "--dry-run", "--time", "8h", *memory)
    assert "--time=0-08:00:00" in typed
    assert f"the job starts {late:%Y-%m-%d %H:%M}"[:-1] in said, "as Slurm has it, to ten minutes"


@on("strict")
def test_a_qos_allows_less(configuration: Configuration, cluster: Cluster, dry_run: Callable[..., tuple[str, str]]) -> None:
    options = ["--account", "ml", "--partition", "interactive", "--qos", "debug", "--set", "memory_per_node_gib=1"]
    script, said = dry_run("submit", "tiny", "--dry-run", *options)
    assert "--time=0-00:30:00" in script, said
    assert "time limit 30m instead of 24h: QoS debug allows no more" in said
    starts(cluster, script)
