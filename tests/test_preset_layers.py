"""Layers of a preset: files that extend others, --set and options; who wins, and where a value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.reading import (
    read_preset,
)
from launcher.preset.tree import Where
from tests.preset_files import GOOD, write


def test_provenance_across_extends_and_command_line(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", f"extends: {GOOD}\n\ntraining:\n  epochs: 3\n  warmup: 50\n")
    path = write(tmp_path, "x.yaml", "extends: base.yaml\nname: x\ntraining:\n  warmup: 10\n")
    loaded = read_preset(str(path), settings=["training.seed=7"], options={"slurm.time": "2h", "nodes": 2, "gpus": None})
    assert loaded.where("name") == Where(str(path), 2, 1)
    assert loaded.where("training.warmup") == Where(str(path), 4, 3)
    assert loaded.where("training.epochs") == Where(str(base), 4, 3)
    assert loaded.where("training.learning_rate") == Where(GOOD, 8, 3)
    assert loaded.where("training.seed") == Where("--set")
    assert loaded.where("slurm.time") == Where("command line")
    assert loaded.where("slurm.account") == Where("command line"), "the mapping around it"
    assert loaded.where("attention") == Where(str(path)), "a default"
    assert (loaded.value.training.warmup, loaded.value.training.epochs, loaded.value.training.seed) == (10, 3, 7)
    assert (loaded.value.nodes, loaded.value.gpus) == (2, 2)


def test_set_reads_yaml_and_the_last_one_wins() -> None:
    settings = ["training.learning_rate=1e-5", "training.epochs=1", "training.epochs=2", "adapter={kind: lora, targets: [q_proj, v_proj]}"]
    preset = read_preset(GOOD, settings=[*settings, "description=a = b"]).value
    assert (preset.training.learning_rate, preset.training.epochs, preset.description) == (1e-5, 2, "a = b")
    assert preset.adapter != "none" and preset.adapter.targets == ["q_proj", "v_proj"]


def test_options_win_over_set() -> None:
    assert read_preset(GOOD, settings=["gpus=1"], options={"gpus": 4}).value.gpus == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.learning_rat=1", "--set: training.learning_rat: unknown key (did you mean learning_rate?)"),
        ("training", "--set: 'training' is not KEY=VALUE (training.learning_rate=1e-5)"),
        ("gpus=[1", "--set: gpus: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("gpus=two", "--set: gpus: a whole number is needed, not the text 'two'"),
    ],
    ids=["unknown", "no-value", "syntax", "type"],
)
def test_set_wrong(setting: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_preset(GOOD, settings=[setting])
    assert str(error.value) == message


def test_option_wrong() -> None:
    with pytest.raises(UsageError) as error:
        read_preset(GOOD, options={"slurm.time": "90"})
    assert str(error.value) == "command line: slurm.time: '90' is not a duration: write 48h, 90m, 2d or 'days-hours:minutes:seconds'"


@pytest.mark.parametrize(
    ("over", "model"),
    [
        ("model: {name: a/b}", {"name": "a/b", "revision": "main"}),
        ("model: {name: bigcode/starcoder2-3b}", {"name": "bigcode/starcoder2-3b", "revision": "v1"}),
        ("model: {revision: v2}", {"name": "bigcode/starcoder2-3b", "revision": "v2"}),
        ("model: {revision: null}", {"name": "bigcode/starcoder2-3b", "revision": "main"}),
        ("model: {path: .}", {"name": None, "revision": "main"}),
        ("model: {tokenizer: train, config: {model_type: llama, x: null}}", {"name": None, "config": {"model_type": "llama", "x": None}}),
        ("model: {name: null, path: .}", {"name": None}),
    ],
    ids=["other-name", "same-name", "revision", "null", "path", "config", "null-and-path"],
)
def test_the_last_source_replaces_the_others(tmp_path: Path, over: str, model: dict[str, object]) -> None:
    found = read_preset(str(write(tmp_path, "x.yaml", f"extends: {GOOD}\n{over}\n"))).value.model.model_dump()
    assert {key: found[key] for key in model} == model


def test_other_choices_replace_too(tmp_path: Path) -> None:
    model = "model: {tokenizer: train, config: {model_type: llama, a: 1}}"
    write(tmp_path, "base.yaml", f"extends: {GOOD}\nadapter: {{kind: lora, rank: 4, dropout: 0.1}}\n{model}\n")
    more = "extends: base.yaml\nadapter: {rank: 16}\nmodel: {config: {b: 2}}\ndata: {path: stdlib}\n"
    preset = read_preset(str(write(tmp_path, "more.yaml", more))).value
    assert preset.adapter != "none" and (preset.adapter.rank, preset.adapter.dropout) == (16, 0.1)
    assert preset.model.config == {"model_type": "llama", "a": 1, "b": 2}
    assert (preset.data.name, preset.data.subset, preset.data.path) == (None, None, "stdlib")
    less = "extends: base.yaml\nadapter: none\nmodel: {config: {model_type: starcoder2}}\nstack: {image: base.yaml}\n"
    preset = read_preset(str(write(tmp_path, "less.yaml", less))).value
    assert preset.adapter == "none" and preset.model.config == {"model_type": "starcoder2"}
    assert not isinstance(preset.stack, str) and preset.stack.image == str(tmp_path / "base.yaml")
