"""What ``check`` shows: whole pages as golden files (``python -m tests.test_show`` writes them), bars, colour, poor terminals, JSON."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launcher.cli import app
from launcher.cli.bars import bar
from launcher.cli.plan_table import show_check
from launcher.errors import Finding
from launcher.hardware.gates import NOT_EXECUTED_YET
from launcher.plan import Container, Disk, Memory, Plan, Time
from launcher.slurm.forecast import Forecast
from tests.conftest import REPOSITORY
from tests.plans import hardware, plan_of, preset, site

GOLDEN = Path(__file__).parent / "golden" / "check"

NOW = datetime(2026, 11, 22, 18, 0)
STARTS = Forecast(datetime(2026, 11, 22, 20, 15), "node[1-2]", "gpu")
DISK = Disk(59.473, 475.761, 242)
IMAGE = Container("apptainer", "s-0123456789ab.sif")

PARTS = {"weights": 29.9, "gradients": 10.0, "optimizer": 0.02, "activations": 7.24, "logits": 3.0, "other": 1.1}
MEMORY = Memory(51.3, 76.8, True, 60.0, PARTS)
TIME = Time(
    step_s=21.4,
    steps=2400,
    total_h=15.1,
    gpu_hours=181.2,
    continuations=2,
    step_parts={"matmul": 16.2, "communication": 3.1, "optimizer": 1.0, "attention": 1.05, "launch": 0.05},
    evaluation_h=0.6,
    checkpoint_h=0.25,
    startup_h=0.08,
    mfu=0.41,
    peak_tflops=312.0,
    tokens_per_gpu_s=1890.0,
    useful_share=0.83,
    cut_share=0.042,
    checkpoint_stop_s=62.0,
    best_checkpoint_min=42.4,
    best_loss_share=0.031,
    expected_loss_share=0.04,
)

TIGHT = Finding(
    level="warning",
    code="gpu-memory-tight",
    message="74.1 GiB on the fullest GPU, where 76.8 can be used: weights 29.9, gradients 10.0, activations 7.2, logits 3.0",
    file="a/long/way/from/here/presets/my-first-preset.yaml",
    line=14,
    column=3,
    key="training.micro_batch",
    hint="the prediction is good to 5 %: watch the first steps",
)
TOO_MUCH = replace(TIGHT, level="error", code="gpu-memory", message="95.1 GiB on the fullest GPU, where 76.8 can be used", hint=None)
NO_FACTS = Finding(
    "advice", "model-facts-unknown", "no facts of this model: memory, time and disk are not checked", key="model", hint="a file"
)
NO_SAMPLES = Finding("advice", "samples-unknown", "how long the run takes is not predicted: data.num_samples is not known", key="data")
NOT_RUN = Finding("warning", NOT_EXECUTED_YET, "zero3 is planned, but the training does not run it yet", key="parallelism")
REFUSES = Forecast(refusal="allocation failure: Invalid account or account/partition combination specified")


def plan(wish: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """Everything in it that other modules predict is given, so that only what is shown is tested."""
    arguments = {name: changes.pop(name) for name in ("hardware", "site", "slurm", "container", "allowed") if name in changes}
    made = plan_of(preset(**(wish or {})), container=arguments.pop("container", IMAGE), **arguments)[0]
    return replace(made, **{"memory": MEMORY, "time": TIME, "disk": DISK, "signal_lead_s": 120, **changes})


TWO_NODES = {
    "description": "a description that is long enough for two lines, since people like to say what a preset is good for",
    "nodes": 2, "gpus": 6, "training": {"effective_batch": 25, "micro_batch": 2, "tf32": True, "activation_checkpointing": "full"},
    "checkpoint": {"every": "8%", "minutes": 30}, "limits": {"max_gpu_hours": 800},
    "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
}  # fmt: skip
ON_CPU = {"gpus": 0, "checkpoint": {"every": 30}, "training": {"dtype": "fp32", "effective_batch": 8, "micro_batch": 4}}

PAGES: dict[str, tuple[Plan, list[Finding], Forecast | None]] = {
    "fits": (plan(TWO_NODES, slurm={"partition": "gpu", "account": "nlp", "time": "6h"}), [TIGHT, NOT_RUN], STARTS),
    "does-not-fit": (
        plan(
            memory=Memory(95.1, 76.8, False, 500.4, {**PARTS, "activations": 51.0}), time=replace(TIME, continuations=0), allowed=["time"]
        ),
        [NO_SAMPLES, TOO_MUCH],
        None,
    ),
    "on-cpu": (
        plan(
            ON_CPU,
            hardware=hardware(gpus=0, gpu=None, cpus=2, memory_gib=4, driver=None),
            site=site(scheduler="none"),
            container=Container("none"),
            memory=Memory(
                0.9, 2.0, True, 1.2, {"weights": 0.1, "gradients": 0.1, "optimizer": 0.2, "activations": 0.4, "logits": 0.0, "other": 0.1}
            ),
            time=Time(0.21, 120, 0.01, 0.0, 0, tokens_per_gpu_s=4901.2),
            disk=Disk(0.023, 0.075, 218),
        ),
        [],
        None,
    ),
    "unknown": (
        plan(memory=None, time=None, disk=None),
        [NO_FACTS],
        Forecast(reason="sbatch did not answer within 5 s"),
    ),
    "samples-unknown": (plan(time=Time(21.4, None, None, None, None)), [NO_SAMPLES], STARTS),
    "slurm-refuses": (plan(slurm={"account": "nonsense"}), REFUSES.findings, REFUSES),
}


def page(name: str, width: int = 80, encoding: str = "utf-8", **console: Any) -> str:
    shown, findings, forecast = PAGES[name]
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    to = Console(file=written, width=width, highlight=False, soft_wrap=True, emoji=False, **console)
    show_check(shown, findings, to, forecast=forecast, now=NOW)
    written.seek(0)
    return written.read()


@pytest.mark.parametrize("name", PAGES)
def test_page_at_80_columns(name: str) -> None:
    shown = page(name)
    assert shown == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), "if that is meant: python -m tests.test_show"
    assert max(map(len, shown.splitlines())) <= 80


def test_golden_pages_are_these() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {*PAGES, "fits-ascii"}


def test_page_in_plain_ascii() -> None:
    shown = page("fits", encoding="ascii")
    assert shown == (GOLDEN / "fits-ascii.txt").read_text(encoding="ascii"), "if that is meant: python -m tests.test_show"


@pytest.mark.parametrize(("width", "widest"), [(60, 60), (100, 100), (250, 100)])
def test_page_at_other_widths(width: int, widest: int) -> None:
    lines = [line for line in page("fits", width).splitlines() if "/" not in line]
    assert max(map(len, lines)) == widest


def test_colour_adds_nothing_but_colour() -> None:
    shown = page("does-not-fit", force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;31mERROR" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == page("does-not-fit")


@pytest.mark.parametrize(
    ("value", "limit", "full", "blocks", "drawn"),
    [
        pytest.param(0, 8, 8, True, "········", id="nothing"),
        pytest.param(4, 8, 8, True, "████····", id="half"),
        pytest.param(4.125, 8, 8, True, "████▏···", id="an-eighth-more"),
        pytest.param(0.001, 8, 8, True, "▏·······", id="anything-is-visible"),
        pytest.param(8, 8, 8, True, "████████", id="exactly-full"),
        pytest.param(8, 4, 8, True, "████▒▒▒▒", id="twice-the-limit"),
        pytest.param(2, 4, 8, True, "██··    ", id="below-a-limit-below-the-scale"),
        pytest.param(5.01, 5, 8, True, "█████▒  ", id="just-above-the-limit"),
        pytest.param(3.4, 3.4, 8, True, "███     ", id="just-below-the-limit"),
        pytest.param(4, 0, 8, True, "▒▒▒▒    ", id="no-limit-at-all"),
        pytest.param(2.5, 4, 8, False, "###.    ", id="ascii"),
        pytest.param(8, 4, 8, False, "####!!!!", id="ascii-above"),
    ],
)
def test_bar(value: float, limit: float, full: float, blocks: bool, drawn: str) -> None:
    assert bar(value, limit, full, 8, blocks=blocks) == drawn


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without configuration, in an empty folder, at a terminal of 80 columns."""
    for name in [name for name in os.environ if name.startswith(("FTLAUNCH_", "SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_shows_a_page_for_each_preset(here: Path) -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "tiny-llama"])
    assert done.exit_code == 0 and done.stderr == ""
    assert re.findall(r"^── (\S+) ─", done.stdout, re.M) == ["tiny", "tiny-llama"]
    assert len(re.findall(r"^ok", done.stdout, re.M)) == 2
    assert "\n\n── tiny-llama" in done.stdout and "\x1b" not in done.stdout
    assert list(here.iterdir()) == []


def test_check_says_errors_of_a_plan_with_the_plan(here: Path) -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "--set", "training.sequence_length=4096"])
    assert done.exit_code == 2 and done.stderr == ""
    assert re.search(r"^ERROR    --set: training.sequence_length: 4096 tokens", done.stdout, re.M)
    assert done.stdout.splitlines()[-1].startswith("NOT OK: ")


def test_check_says_errors_of_reading_beside_the_other_pages(here: Path) -> None:
    done = CliRunner().invoke(app, ["check", "nowhere.yaml", "tiny"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error") and "nowhere.yaml" in done.stderr
    assert done.stdout.startswith("── tiny ")


def test_check_on_a_terminal_without_unicode(here: Path) -> None:
    argv = [sys.executable, "-m", "launcher.cli", "check", "tiny"]
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(argv, env=environ, capture_output=True, encoding="ascii", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-- tiny ---")


def test_json_is_what_programs_were_promised(here: Path) -> None:
    done = CliRunner().invoke(app, ["check", "tiny", "--json", "--set", "training.sequence_length=4096"])
    document = json.loads(done.stdout)
    assert done.exit_code == 2 and not document["ok"] and document["forecast"] is None and done.stderr == ""
    promised = """name model site stack nodes gpus_per_node world_size effective_batch micro_batch gradient_accumulation samples_per_rank
        sequence_length attention adapter parallelism dtype time_limit_min signal_lead_s memory time disk"""
    assert set(promised.split()) <= document["plan"].keys()
    finding = {"level", "code", "message", "file", "line", "key", "hint"}
    assert document["findings"] and all(finding <= entry.keys() for entry in document["findings"])


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        (GOLDEN / f"{name}.txt").write_text(page(name), encoding="utf-8")
    (GOLDEN / "fits-ascii.txt").write_text(page("fits", encoding="ascii"), encoding="ascii")


if __name__ == "__main__":
    main()
