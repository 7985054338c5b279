"""``check`` on several sites: a table for people, one document for programs."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.sites_report import fixed_environment
from launcher.cli import app
from launcher.cli.compare import compare
from launcher.cli.line import Wish, planned, read
from launcher.remedies import refusals


@pytest.fixture(autouse=True)
def _nobody() -> Iterator[None]:
    with fixed_environment():
        os.environ["COLUMNS"] = "80"
        yield


def test_the_table() -> None:
    done = CliRunner().invoke(app, ["check", "starcoder2-15b", "tiny", "--site", "delftblue,iris,lonestar6,local"])
    assert done.exit_code == 2 and done.stderr == ""
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert [line for line in lines if line.startswith("──")] == ["── starcoder2-15b ──", "── tiny ──"]
    assert re.split("  +", lines[1]) == ["site", "partition", "runs", "step", "total", "lives", "GPU-hours", "cost"]
    rows = {line.split()[0]: re.split("  +", line) for line in lines[2:6]}
    assert rows["delftblue"][1:3] == ["gpu-a100", "changed"] and rows["delftblue"][-1] == "–"
    assert rows["iris"][1:3] == ["gpu", "variant"] and rows["iris"][-1].endswith(" SU")
    assert rows["lonestar6"][1:3] == ["gpu-h100", "variant"]
    assert rows["local"][2] == "as it is"
    assert max(map(len, lines[1:6])) <= 80
    told = lines.index("delftblue: 6 GPUs, but a node of delftblue-gpu-a100 has 4")
    assert lines[told + 1] == "  → ftlaunch check starcoder2-15b --gpus 4 --time 48h --site delftblue"
    told = lines.index("lonestar6: 6 GPUs, but a node of lonestar6-gpu-h100 has 2")
    assert lines[told + 1] == "  → ftlaunch check starcoder2-15b-fast --gpus 2 --site lonestar6"


def test_one_document() -> None:
    done = CliRunner().invoke(app, ["check", "starcoder2-3b", "tiny", "--site", "lonestar6,slurm", "--json", "--set", "training.epochs=1"])
    document = json.loads(done.stdout)
    assert done.exit_code == 2 and not document["ok"]
    found = {(entry["preset"], entry["site"]): entry for entry in document["compared"]}
    fits, refused = found["starcoder2-3b", "lonestar6"], found["tiny", "lonestar6"]
    assert fits["ok"] and fits["fits"] and fits["refusal"] is None and fits["partition"] == "gpu-h100"
    runs = fits["runs"]
    assert (runs["nodes"], runs["gpus_per_node"], runs["gpu"], runs["lives"], runs["cost_unit"]) == (1, 2, "h100-pcie-80gb", 1, "SU")
    assert runs["cost"] == pytest.approx(3 * runs["gpu_hours"], rel=1e-4)
    assert (refused["ok"], refused["refusal"]["code"], refused["runs"]["change"]) == (
        False,
        "partition-missing",
        {"slurm.partition": "gpu-a100"},
    )
    assert found["tiny", "slurm"]["ok"] and found["tiny", "slurm"]["runs"]["cost"] is None


def test_everything_fits() -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "--site", "iris,delftblue,"])
    assert done.exit_code == 0 and "→" not in done.stdout


def test_a_site_that_does_not_exist() -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "--site", "iris,nowhere"])
    assert done.exit_code == 2
    assert done.stdout.count("no site of the name 'nowhere'") == 1 and re.search(r"^nowhere +– +no", done.stdout, re.M)


def test_what_was_typed_is_typed_again() -> None:
    wish = Wish("", settings=("training.epochs=1",), options={"qos": "long", "time": None, "gpus": 8})
    (row,) = compare(["starcoder2-7b"], ["lonestar6"], wish)
    assert row.way is not None
    assert row.way.arguments == "starcoder2-7b --set training.epochs=1 --qos long --gpus 8 --gpus 2 --time 48h"


def test_whole_nodes_are_paid() -> None:
    (row,) = compare(["santacoder-a100-40gb-default"], ["lonestar6"], Wish("", settings=("data.packing=none", "data.num_samples=100000")))
    assert row.way is not None and row.way.plan.time is not None and row.way.plan.time.gpu_hours is not None
    plan = row.way.plan
    assert (plan.layout.gpus_per_node, plan.hardware["gpus"], plan.slurm["partition"]) == (2, 3, "gpu-a100")
    assert row.cost == pytest.approx(plan.time.gpu_hours * 3 / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        (name, site)
        for name in ("starcoder2-15b", "starcoder2-7b-fast", "codellama-7b-flash")
        for site in ("delftblue", "iris", "lonestar6", "mahti")
    ],
)
def test_what_would_run_passes(name: str, site: str) -> None:
    (row,) = compare([name], [site], Wish(""))
    assert row.way is not None
    preset, *options = shlex.split(row.way.arguments)
    assert bool(options) is not row.fits
    settings = tuple(value for option, value in zip(options[::2], options[1::2], strict=True) if option == "--set")
    typed = {option[2:]: value for option, value in zip(options[::2], options[1::2], strict=True) if option != "--set"}
    asked = {key: int(value) if key in ("nodes", "gpus") else value for key, value in typed.items()}
    assert refusals(planned(read(Wish(preset, site, settings, asked)))[1]) == []


def test_a_closed_site_is_said() -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "--site", "mahti,iris"])
    assert "site mahti is closed since 2026-08-31: nothing runs there any more" in done.stdout


def test_one_site_is_as_before(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "--site", "iris"])
    assert done.stdout.startswith("── tiny ─") and "site        iris, partition batch" in done.stdout
