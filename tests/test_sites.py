"""The clusters that ship: every fact has a source or is said to be unknown, every preset renders or is refused, the page is current."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import sites_report
from benchmarks.sites_report import NOT_FACTS, clusters, fixed_environment
from launcher.cli import app
from launcher.errors import UsageError
from launcher.preset.choose import choose_folders
from launcher.preset.reading import Loaded, read_hardware, read_site, shipped_presets
from launcher.preset.site import Site
from tests.make_golden_sites import GOLDEN, golden_files

ABOUT_SITES = [
    "container.use", "container.command", "container.module", "container.binds", "container.env", "gpu_request", "gpu_type", "memory",
    "whole_nodes", "cpus_per_gpu", "memory_per_gpu_gib", "account", "continuation", "build", "stage", "local_disk", "local_disk_request",
    "runs", "images", "data", "modules", "network", "mirrors", "submit_limit",
]  # fmt: skip
"""What a site's file can say and does say, or calls unknown. Not ``cache``: without it each run has its own."""

ABOUT_PARTITIONS = ["max_time", "max_nodes", "gpus_per_node", "preemptible", "internet", "cpus_per_node", "memory_per_node_gib", "cost"]
ABOUT_GPUS = ["gpu", "hardware", "driver"]

REFUSED = {
    "delftblue": r"--(gres|gpus|gpus-per-node|mem)=",
    "iris": r"--(gpus-per-task|mem-per-cpu|mem-per-gpu)=",
    "lonestar6": r"--(gres|gpus[a-z-]*|mem[a-z-]*|cpus-per-task)=",
    "mahti": r"--(gpus[a-z-]*|mem[a-z-]*)=",
}
"""What must stand in no batch script."""

NEEDED = {
    "delftblue": ["account", "partition", "time"],
    "iris": ["partition", "time"],
    "lonestar6": ["partition", "nodes", "ntasks-per-node", "time"],
    "mahti": ["account", "time"],
}


def at(name: str) -> Loaded[Site]:
    return read_site(f"presets/sites/{name}", environ={})


def facts(loaded: Loaded[Site]) -> list[str]:
    """Dotted keys of all values that the file says."""
    keys = [key for key in loaded.provenance if key.partition(".")[0] not in NOT_FACTS]
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def test_every_shipped_site_is_golden_somewhere() -> None:
    shipped = {file.stem for file in (Path(sites_report.__file__).parent.parent / "presets" / "sites").glob("*.yaml")}
    assert shipped == {*clusters(), "slurm", "local"}  # tests/golden/presets are for slurm; local has no batch script
    assert at("local").value.scheduler == "none"


@pytest.mark.parametrize("name", clusters())
def test_golden_scripts_and_refusals(name: str) -> None:
    expected = {f"{name}/{path.name}": path.read_text() for path in (GOLDEN / name).iterdir()}
    rendered = golden_files(name)
    assert {Path(file).stem for file in rendered} == set(shipped_presets())
    assert sorted(rendered) == sorted(expected), "make golden"
    for file, text in rendered.items():
        assert text == expected[file], f"{file} changed; if that is meant: make golden"


@pytest.mark.parametrize("name", clusters())
def test_no_script_asks_for_what_the_site_refuses(name: str) -> None:
    scripts = [path.read_text() for path in (GOLDEN / name).glob("*.sbatch")]
    assert scripts
    for script in scripts:
        asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
        assert not [line for line in asked if re.match(REFUSED[name], line)]
        assert {option for option in NEEDED[name] if not any(line.startswith(f"--{option}=") for line in asked)} == set()


@pytest.mark.parametrize("name", clusters())
def test_refusals_name_what_passes(name: str) -> None:
    for path in (GOLDEN / name).glob("*.refusal"):
        assert path.read_text().splitlines()[-1].startswith("passes: ftlaunch check "), path
    variant = r"passes here: ftlaunch check starcoder2-15b-fast .*--gpus \d( --nodes \d)?"
    assert re.search(variant, (GOLDEN / name / "starcoder2-15b.refusal").read_text())


@pytest.mark.parametrize("name", clusters())
def test_every_fact_has_a_source(name: str) -> None:
    loaded = at(name)
    without = [key for key in facts(loaded) if not loaded.value.source_of(key) and not loaded.value.is_unknown(key)]
    assert without == []
    dated = re.compile(r"20\d\d|undated|^as |^none: as ")
    assert [source for source in loaded.value.sources.values() if not dated.search(source) and not source.startswith("none: whole")] == []


@pytest.mark.parametrize("name", clusters())
def test_every_field_is_said_or_unknown(name: str) -> None:
    loaded = at(name)
    site, open_ones = loaded.value, []
    wanted = list(ABOUT_SITES)
    for partition, entry in site.partitions.items():
        wanted += [f"partitions.{partition}.{field}" for field in ABOUT_PARTITIONS]
        wanted += [f"partitions.{partition}.{field}" for field in ABOUT_GPUS if entry.gpus_per_node != 0]
        wanted += [f"partitions.{partition}.grace_s"] if entry.preemptible else []
    for key in wanted:
        said = key in loaded.provenance or key in site.sources or site.is_unknown(key)
        open_ones += [] if said else [key]
    assert open_ones == []


@pytest.mark.parametrize("name", clusters())
def test_sources_and_unknowns_are_about_fields(name: str) -> None:
    site = at(name).value
    for key in [*site.sources, *site.unknown]:
        assert _exists(site.model_dump(), key.split(".")), key


def _exists(value: Any, path: list[str]) -> bool:
    if not path:
        return True
    if path[0] == "*":
        return all(_exists(child, path[1:]) for child in value.values())
    return path[0] in value and _exists(value[path[0]], path[1:])


@pytest.mark.parametrize("name", clusters())
def test_partitions_have_the_gpu_of_their_hardware(name: str) -> None:
    for partition in at(name).value.partitions.values():
        if partition.hardware is not None:
            gpu = read_hardware(f"presets/hardware/{partition.hardware}").value.gpu
            assert gpu is not None and gpu.kind == partition.gpu


@pytest.mark.parametrize("name", clusters())
def test_folders_are_outside_home(name: str) -> None:
    site = at(name).value
    environ = {"USER": "ada", "SCRATCH": "/scratch/ada"}
    home = Path("/home/ada")
    if site.runs is None:
        with pytest.raises(UsageError, match=r"says no folder for runs, images, data .*runs: /FOLDER.*; images: /FOLDER.*; data: /FOLDER"):
            choose_folders(site, environ={}, home=home, cwd=home)
        return
    found = choose_folders(site, environ=environ, home=home, cwd=home)
    assert all(str(folder).startswith("/scratch/ada/") for folder in (found.runs, found.images, found.data))


@pytest.mark.parametrize("name", clusters())
def test_a_laptop_can_plan_for_it(name: str) -> None:
    """Without the site's variables, folders and programs."""
    with fixed_environment():
        for variable in ("SCRATCH", "USER", "SBATCH_ACCOUNT"):
            del os.environ[variable]
        done = CliRunner().invoke(app, ["check", "starcoder2-3b-fast", "--site", name, "--json", "--account", "x"])
    assert '"plan": {' in done.stdout and "disk-too-small" not in done.stdout and "no-variable" not in done.stdout


def test_the_page_is_current() -> None:
    assert sites_report.OUT.read_text() == sites_report.text() + "\n", "make sites-report"
