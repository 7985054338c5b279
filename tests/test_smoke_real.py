"""The first day on a cluster that ftlaunch never saw, five times: discover its site, then a smoke run of ``tiny`` in the real image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cluster, Configuration

pytestmark = pytest.mark.slurm

WHERE = {
    "strict": ["--partition", "batch"],
    "tacc": ["--partition", "gpu-a100-dev"],
    "norequeue": ["--partition", "scavenge"],
    "bare": [],
    "untyped": ["--partition", "booster"],
}
"""What a user adds to what was discovered."""

ON_ONE_MACHINE = "network: {ifname: lo}\n"
"""The nodes of the test cluster are one machine."""


@pytest.mark.parametrize("configuration", list(WHERE), indirect=True)
def test_discovered_and_smoked(configuration: Configuration, cluster: Cluster) -> None:
    names = {"FTLAUNCH_RUNS": "runs", "FTLAUNCH_IMAGES": "images", "FTLAUNCH_DATA": "data"}
    environ = {"SCRATCH": str(cluster.home), **{name: str(cluster.home / folder) for name, folder in names.items()}}
    site = cluster.home / f"smoke-{configuration.name}.yaml"
    cluster.run(cluster.ftlaunch, "site", "discover", "--force", "--out", site, env=environ)
    site.write_text(site.read_text() + ON_ONE_MACHINE)
    options = ["--site", site, "--json", "--set", "ranks_per_node=2", *WHERE[configuration.name]]
    done = cluster.run(cluster.ftlaunch, "submit", "tiny", "--smoke", *options, env=environ, check=False, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    document = json.loads(done.stdout)
    assert [line["what"] for line in document["verdict"] if not line["ok"]] == []
    assert (Path(document["folder"]) / "model" / "config.json").is_file()
