"""What ``check --explain`` says of a key: meaning, range, unit, default, value and every place that says it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.choose import Chosen
from launcher.preset.explain import Explanation, Said, explain
from launcher.preset.reading import read_preset
from tests.conftest import REPOSITORY

GOOD = str(REPOSITORY / "tests" / "broken" / "_good.yaml")


def of(key: str, tmp_path: Path, text: str = "", settings: tuple[str, ...] = (), **options: object) -> Explanation:
    (tmp_path / "base.yaml").write_text(f"extends: {GOOD}\ntraining: {{learning_rate: 2e-5}}\n")
    (tmp_path / "x.yaml").write_text(f"extends: base.yaml\n{text}\n")
    preset = read_preset(str(tmp_path / "x.yaml"), settings=settings, options=options)
    chosen = {"slurm.account": Chosen("mine", "$SBATCH_ACCOUNT"), "site": Chosen("delft", "--site")}
    planned = {"attention": "sdpa", "ranks_per_node": 2, "training.micro_batch": 1}
    return explain(key, preset, chosen=chosen, planned=planned)


def test_a_value_and_every_place_that_says_it(tmp_path: Path) -> None:
    found = of("training.learning_rate", tmp_path, "training:\n    learning_rate: 3e-5", settings=("training.learning_rate=1e-5",))
    assert found == Explanation(
        key="training.learning_rate",
        meaning="Highest learning rate, reached at the end of the warm-up.",
        type="a number above 0",
        unit=None,
        default="No default: it belongs to the model and the optimizer",
        value=1e-5,
        source="--set",
        said=(
            Said(3e-5, f"{GOOD}:8:3"),
            Said(2e-5, f"{tmp_path / 'base.yaml'}:2:12"),
            Said(3e-5, f"{tmp_path / 'x.yaml'}:3:5"),
            Said(1e-5, "--set"),
        ),
    )


@pytest.mark.parametrize(
    ("key", "value", "source"),
    [
        ("training.learning_rate", 2e-5, "{base}:2:12"),
        ("training.seed", 42, "default"),
        ("nodes", 3, "command line"),
        ("attention", "sdpa", "planned, {x}:2:1 leaves it open"),
        ("ranks_per_node", 2, "planned"),
        ("training.micro_batch", 1, "default"),
        ("slurm.account", "mine", "$SBATCH_ACCOUNT"),
        ("slurm.qos", None, "default"),
        ("site", "delft", "--site"),
        ("adapter.rank", None, "unused: adapter is none"),
    ],
)
def test_where_the_value_comes_from(tmp_path: Path, key: str, value: object, source: str) -> None:
    found = of(key, tmp_path, "attention: auto", nodes=3)
    assert (found.value, found.source) == (value, source.format(base=tmp_path / "base.yaml", x=tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("key", "kind", "unit", "default"),
    [
        ("training.sequence_length", "a whole number above 1", "tokens", "none: it must be given"),
        ("training.micro_batch", "a whole number above 0 or auto", "samples", "1"),
        ("training.adam_beta1", "a number at least 0 and below 1", None, "0.9 (that of torch's AdamW)"),
        ("training.dtype", "fp32 or bf16 or bf16_pure or fp16", None, "bf16"),
        ("training.tf32", "true or false", None, "false"),
        ("slurm.time", "a duration: 48h, 90m, '1-12:00:00'", None, "the limit of the partition where the site knows it, else 24 hours"),
        (
            "memory_per_node_gib",
            "a whole number above 0 or a size: 80GiB, 80GB, 1.5TiB",
            "GiB",
            "the hardware's share that the GPUs stand for",
        ),
        ("adapter", "none or a mapping with kind, rank, alpha, dropout, targets, modules_to_save", None, "none"),
        ("adapter.targets", "a list", None, "none"),
        ("model.config.hidden_size", "a mapping", None, "none"),
        ("limits", "a mapping with max_lives, max_gpu_hours", None, "those of its keys"),
    ],
)
def test_what_a_key_may_hold(tmp_path: Path, key: str, kind: str, unit: str | None, default: str) -> None:
    found = of(key, tmp_path)
    assert (found.type, found.unit, found.default) == (kind, unit, default)
    assert found.meaning and "Unit:" not in found.meaning and "Default:" not in found.meaning


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rat", "did you mean training.learning_rate?"),
        ("micro_batch", "did you mean training.micro_batch or evaluation.micro_batch?"),
        ("zzz.zzzzz", "ftlaunch schema prints them all"),
    ],
)
def test_an_unknown_key(tmp_path: Path, key: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        of(key, tmp_path)
    assert str(error.value) == f"{key}: no such key ({hint})"


def ftlaunch(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HOME": str(cwd), "PYTHONPATH": str(REPOSITORY), "FTLAUNCH_SITE": "local", "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "launcher.cli", *argv], cwd=cwd, env=environ, capture_output=True, text=True)


def test_on_the_screen(tmp_path: Path) -> None:
    done = ftlaunch("check", "tiny", "--explain", "training.seed", "--explain", "site", "--set", "training.seed=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line]
    assert [line[1].strip() for line in lines if line[0] == "value"] == ["7", "local"]
    assert [line[1].strip() for line in lines if line[0] == "from"] == ["--set", "$FTLAUNCH_SITE"]


def test_as_one_json_document(tmp_path: Path) -> None:
    done = ftlaunch("check", "tiny", "tiny-llama", "--explain", "name", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["ok"] and [one["explained"][0]["value"] for one in document["presets"]] == ["tiny", "tiny-llama"]
    (first, _) = document["presets"]
    assert set(first["explained"][0]) == {"key", "meaning", "type", "unit", "default", "value", "source", "said"}
    assert first["explained"][0]["said"] == [{"value": "tiny", "source": first["explained"][0]["source"]}]


def test_an_unknown_key_is_a_usage_error(tmp_path: Path) -> None:
    done = ftlaunch("check", "tiny", "--explain", "seed", "--json", cwd=tmp_path)
    (finding,) = json.loads(done.stdout)["findings"]
    assert (done.returncode, finding["hint"]) == (2, "did you mean training.seed?")


def test_a_gate_that_refuses_does_not_keep_from_explaining(tmp_path: Path) -> None:
    done = ftlaunch("check", "starcoder2-3b", "--explain", "gpus", "--set", "gpus=99", cwd=tmp_path)
    assert done.returncode == 0 and "GPUs of each node" in done.stdout
