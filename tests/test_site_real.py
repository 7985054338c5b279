"""site discover and doctor on the real Slurm, in each of its configurations, as the unprivileged user: what its slurm.conf says is found,
and what was found is enough to have a job accepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cluster, Configuration

pytestmark = pytest.mark.slurm

EACH = ("bare", "default", "norequeue", "strict", "tacc", "untyped")

TINY_ON: dict[str, list[str]] = {
    "bare": [],
    "default": ["--partition=low"],
    "norequeue": ["--partition=scavenge"],
    "strict": ["--partition=batch"],
    "tacc": ["--partition=gpu-a100-dev"],
    "untyped": ["--partition=booster"],
}
"""What a user has to say beside the site: the partition, where Slurm has no default or tests want another one."""


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("configuration", names, indirect=True)


@pytest.fixture
def environ(cluster: Cluster) -> dict[str, str]:
    """The folders of the tests, as the user's environment names them."""
    names = {"FTLAUNCH_RUNS": "runs", "FTLAUNCH_IMAGES": "images", "FTLAUNCH_DATA": "data"}
    return {"SCRATCH": str(cluster.home), **{name: str(cluster.home / folder) for name, folder in names.items()}}


@pytest.fixture
def found(configuration: Configuration, cluster: Cluster, environ: dict[str, str]) -> dict[str, Any]:
    """What ``site discover --json`` prints."""
    done = cluster.run(cluster.ftlaunch, "site", "discover", "--json", env=environ)
    document: dict[str, Any] = json.loads(done.stdout)
    assert not any("failed" in note for note in document["notes"].get("", [])), done.stderr
    return document


@pytest.fixture
def site(found: dict[str, Any]) -> dict[str, Any]:
    return dict(found["site"])


@pytest.fixture
def site_file(configuration: Configuration, cluster: Cluster, environ: dict[str, str]) -> Path:
    file = cluster.home / f"discovered-{configuration.name}.yaml"
    cluster.run(cluster.ftlaunch, "site", "discover", "--force", "--out", file, env=environ)
    return file


def facts(site: dict[str, Any], *keys: str) -> tuple[object, ...]:
    return tuple(site.get(key) for key in keys)


@on("bare")
def test_bare(configuration: Configuration, site: dict[str, Any]) -> None:
    assert facts(site, "name", "gpu_request", "gpu_type", "memory", "whole_nodes") == ("bare", "gres", "rtx3090", "none", None)
    assert facts(site, "account", "default_account", "continuation") == ("optional", None, "requeue")
    (entry,) = site["partitions"].values()
    assert facts(entry, "max_time", "gpus_per_node", "max_nodes", "preemptible") == (None, 2, 2, None)


@on("default")
def test_default(configuration: Configuration, site: dict[str, Any]) -> None:
    assert facts(site, "gpu_request", "gpu_typed", "memory", "continuation") == ("gres", True, "mem", "requeue")
    assert facts(site, "account", "default_account", "submit_limit") == ("optional", "project", 100)
    low, high = site["partitions"]["low"], site["partitions"]["high"]
    assert facts(low, "max_time", "max_nodes", "gpus_per_node", "preemptible", "grace_s") == ("24h", 2, 4, True, 60)
    assert facts(high, "max_time", "preemptible") == ("24h", None)
    assert "partitions.low.hardware" in site["unknown"]  # nothing says which A100 it is


@on("norequeue")
def test_norequeue(configuration: Configuration, site: dict[str, Any]) -> None:
    assert facts(site, "continuation", "default_account", "gpu_type", "memory") == ("resubmit", "lab", "a100", "mem")
    scavenge, owner = site["partitions"]["scavenge"], site["partitions"]["owner"]
    assert facts(scavenge, "max_time", "preemptible", "grace_s") == ("168h", True, 120)
    assert facts(owner, "preemptible") == (None,)


@on("strict")
def test_strict(configuration: Configuration, site: dict[str, Any]) -> None:
    assert facts(site, "account", "default_account", "gpu_type", "continuation") == ("required", "ml", "volta", "requeue")
    gpu, interactive, batch = (site["partitions"][name] for name in ("gpu", "interactive", "batch"))
    assert facts(gpu, "max_time", "gpus_per_node", "gpu", "hardware") == ("48h", 4, "v100-32gb", "v100-32gb")
    assert facts(gpu, "constraint", "qos", "cpus_per_node") == ("volta32", "regular", 28)
    assert facts(interactive, "qos", "test", "max_time") == ("debug", True, "30m")
    assert facts(batch, "qos", "gpus_per_node") == ("regular", 0)
    assert site["qos"] == {"besteffort": {"preemptible": True, "grace_s": 0}}


@on("tacc")
def test_tacc(configuration: Configuration, site: dict[str, Any]) -> None:
    assert facts(site, "gpu_request", "memory", "whole_nodes", "continuation") == ("none", "none", True, "resubmit")
    assert facts(site, "default_account") == ("tst24001",)
    assert {name: facts(entry, "max_time", "test") for name, entry in site["partitions"].items()} == {
        "gpu-a100": ("48h", None),
        "gpu-a100-dev": ("2h", True),
        "gpu-a100-small": ("48h", None),
    }
    assert "gpu_request" not in site["unknown"]  # sbatch --test-only took a job without any


@on("untyped")
def test_untyped(configuration: Configuration, found: dict[str, Any]) -> None:
    site = found["site"]
    assert facts(site, "gpu_request", "gpu_type", "gpu_typed", "whole_nodes", "memory") == ("gres", None, None, True, "none")
    assert facts(site["partitions"]["preemptible"], "preemptible", "grace_s", "gpus_per_node") == (True, 60, 4)
    assert facts(site["partitions"]["booster"], "preemptible") == (None,)
    assert any(note.startswith("maintenance maintenance:") for note in found["notes"][""])
    assert any("the batch step hears of a preemption first" in note for note in found["notes"]["continuation"])


@on(*EACH)
def test_slurm_takes_what_was_found(configuration: Configuration, found: dict[str, Any]) -> None:
    assert found["notes"][""][-1].startswith("Slurm takes a job asked for by"), found["notes"]


@on(*EACH)
def test_apptainer_is_found(configuration: Configuration, found: dict[str, Any]) -> None:
    notes = found["notes"]["container"]
    assert any("no setuid: images are mounted by FUSE" in note for note in notes), notes
    assert any("subuid and subgid yes" in note for note in notes), notes


@on(*EACH)
def test_slurm_takes_a_job_as_the_site_has_it(
    configuration: Configuration, cluster: Cluster, site_file: Path, environ: dict[str, str]
) -> None:
    folder = cluster.home / f"rendered-{configuration.name}"
    options = ["--site", site_file, "--time", "2m", *TINY_ON[configuration.name], "--out", folder]
    cluster.run(cluster.ftlaunch, "render", "presets/tiny.yaml", *options, env=environ)
    cluster.run("sbatch", "--test-only", folder / "job.sbatch")


@on(*EACH)
def test_doctor_finds_nothing_missing(configuration: Configuration, cluster: Cluster, site_file: Path, environ: dict[str, str]) -> None:
    done = cluster.run(cluster.ftlaunch, "doctor", "--site", site_file, "--json", env=environ, check=False)
    document = json.loads(done.stdout)
    errors = [finding for finding in document["findings"] if finding["level"] == "error"]
    assert (done.returncode, errors) == (0, []), done.stderr
    assert {"controller", "apptainer-mount", "fakeroot"} <= {finding["code"] for finding in document["findings"]}


@pytest.fixture
def probe(configuration: Configuration, cluster: Cluster, site_file: Path, environ: dict[str, str]) -> Callable[..., dict[str, Any]]:
    def send(*options: str) -> dict[str, Any]:
        words = ["doctor", "--site", site_file, "--probe", "--out", site_file, "--json", *options]
        done = cluster.run(cluster.ftlaunch, *words, env=environ, check=False, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout))

    return send


@on("default")
def test_the_probe(configuration: Configuration, probe: Callable[..., dict[str, Any]]) -> None:
    report = probe("--partition", "high")["probe"]
    assert report["node"] in ("node1", "node2") and report["partition"] == "high"
    assert report["gpus"] == [] and report["container"]["setuid"] is False and report["sbatch"] == {"works": True, "why": ""}
    assert all(folder["writable"] for folder in report["folders"].values())


@on("tacc")
def test_the_probe_learns_that_no_job_can_submit_another(
    configuration: Configuration, probe: Callable[..., dict[str, Any]], site_file: Path
) -> None:
    document = probe("--partition", "gpu-a100-dev")
    sbatch = document["probe"]["sbatch"]
    assert sbatch["works"] is False and "not available on compute nodes" in sbatch["why"]
    assert document["learned"]["continuation"] == "manual"
    assert "continuation: manual" in site_file.read_text()
