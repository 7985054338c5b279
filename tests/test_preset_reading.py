"""Reading: what comes out, where it came from, and the whole message for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import Finding, UsageError
from launcher.preset.reading import (
    locate,
    model_facts,
    read_config,
    read_hardware,
    read_preset,
    read_site,
    read_stack,
    shipped_presets,
    user_folder,
)
from launcher.preset.tree import Where
from tests.conftest import REPOSITORY

BROKEN = REPOSITORY / "tests" / "broken"
GOOD = str(BROKEN / "_good.yaml")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("expected", sorted(BROKEN.glob("*.expected")), ids=lambda path: path.stem)
def test_broken_preset_says_all_that_is_wrong(expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BROKEN)
    with pytest.raises(UsageError) as error:
        read_preset(f"{expected.stem}.yaml")
    assert f"{error.value}\n" == expected.read_text()
    assert error.value.exit_code == 2


def test_every_broken_preset_has_its_message() -> None:
    presets = {path.stem for path in BROKEN.glob("[!_]*.yaml")} - {f"deep-{number}" for number in range(2, 11)}
    assert {path.stem for path in BROKEN.glob("*.expected")} == presets


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "presets/tiny", "presets/tiny.yaml"])
def test_shipped_preset_by_name_or_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = read_preset(name)
    assert loaded.value.name == "tiny"
    assert loaded.text == loaded.file.read_text()


def test_existing_path_wins_over_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "tiny.yaml", "extends: starcoder2-3b\nname: mine\n")
    assert read_preset("tiny.yaml").value.name == "mine"


def test_extends_finds_shipped_names_and_not_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "here/tiny", "name: wrong\n")
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, "tiny.yaml", "extends: tiny\nname: mine\n")
    assert read_preset(str(path)).value.data.path == "stdlib"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("starcodr2-15b", "no preset of the name 'starcodr2-15b' (did you mean starcoder2-15b?)"),
        ("../no/such", "no such file, and no shipped preset of that name: '../no/such' (see: ftlaunch presets list)"),
        ("no\0name", "no preset of the name 'no\\x00name' (see: ftlaunch presets list)"),
    ],
    ids=["near", "path", "nul"],
)
def test_unknown_preset(name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_preset(name)
    assert str(error.value) == message


def test_too_large(tmp_path: Path) -> None:
    path = write(tmp_path, "large.yaml", f"name: x # {'x' * 1_000_000}\n")
    with pytest.raises(UsageError, match="larger than 1 MB"):
        read_preset(str(path))


def test_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]" for name in "bcdefghij"]
    with pytest.raises(UsageError, match="an alias"):
        read_preset(str(write(tmp_path, "bomb.yaml", "\n".join(lines))))


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nested deeper than 32 levels"):
        read_preset(str(write(tmp_path, "deep.yaml", f"a: {'[' * 5000}{']' * 5000}\n")))


@pytest.mark.parametrize("wrap", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["bom", "crlf"])
def test_other_editors(tmp_path: Path, wrap: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(wrap(f"extends: {GOOD}\nname: other\n").encode())  # type: ignore[operator]
    assert read_preset(str(path)).value.name == "other"


def test_yaml_1_2_values(tmp_path: Path) -> None:
    text = f"extends: {GOOD}\ntraining: {{learning_rate: 1e-5}}\ndescription: no\nslurm: {{time: 24:00:00}}\nevaluation: {{every: 50}}\n"
    preset = read_preset(str(write(tmp_path, "x.yaml", text))).value
    assert (preset.training.learning_rate, preset.description, preset.slurm.time, preset.evaluation.every) == (1e-5, "no", "24h", "50")


def test_provenance_across_extends_and_command_line(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", f"extends: {GOOD}\n\ntraining:\n  epochs: 3\n  warmup: 50\n")
    path = write(tmp_path, "x.yaml", "extends: base.yaml\nname: x\ntraining:\n  warmup: 10\n")
    loaded = read_preset(str(path), settings=["training.seed=7"], options={"slurm.time": "2h", "nodes": 2, "gpus": None})
    assert loaded.where("name") == Where(str(path), 2)
    assert loaded.where("training.warmup") == Where(str(path), 4)
    assert loaded.where("training.epochs") == Where(str(base), 4)
    assert loaded.where("training.learning_rate") == Where(GOOD, 8)
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


def test_relative_paths_count_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "there/data.jsonl", "")
    write(tmp_path, "there/base.yaml", f"extends: {GOOD}\ndata: {{path: data.jsonl}}\n")
    path = write(tmp_path, "here/x.yaml", "extends: ../there/base.yaml\nname: x\n")
    assert read_preset(str(path)).value.data.path == str(tmp_path / "there" / "data.jsonl")
    write(tmp_path, "mine.jsonl", "")
    monkeypatch.chdir(tmp_path)
    assert read_preset(str(path), settings=["data.path=mine.jsonl"]).value.data.path == str(tmp_path / "mine.jsonl")


def test_own_files_come_before_shipped_ones(tmp_path: Path) -> None:
    text = 'extends: slurm\nname: delft\nsource: "asked them, 2026-11"\naccount: required\npartitions: {gpu: {max_time: 48h}}\n'
    write(user_folder(tmp_path), "sites/delft.yaml", text)
    site = read_site("delft", home=tmp_path)
    assert (site.value.name, site.value.scheduler, site.value.account) == ("delft", "slurm", "required")
    assert site.where("account") == Where(str(user_folder(tmp_path) / "sites" / "delft.yaml"), 4)
    write(user_folder(tmp_path), "hardware/cpu.yaml", "name: cpu\nsource: mine\ncpus: 64\nmemory_gib: 8\n")
    assert read_hardware("cpu", home=tmp_path).value.cpus == 64
    assert read_hardware("cpu", home=tmp_path / "other").value.cpus == 2


def test_unknown_hardware_points_at_the_preset(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_hardware("a100-80g", home=tmp_path, at=Where("x.yaml", 7))
    assert str(error.value) == "x.yaml:7: hardware: no hardware of the name 'a100-80g' (did you mean a100-80gb?)"


def test_site_by_path_says_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, "site.yaml", "name: x\nsource: y\nscheduler: pbs\ncontainer: {use: docker}\n")
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path)
    expected = f"{path}:3: scheduler: 'pbs' is not none or slurm\n{path}:4: container.use: 'docker' is not apptainer or none"
    assert str(error.value) == expected


SITE = "name: x\nsource: y\nscheduler: slurm\n"


def test_variables_of_a_site_are_replaced(tmp_path: Path) -> None:
    binds = "['$SCRATCH/ada:/scratch:ro', '/a\\$b']"
    text = f"{SITE}container: {{binds: {binds}, env: {{CACHE: '${{SCRATCH}}/c'}}}}\nnetwork: {{binds: [$SCRATCH]}}\n"
    found = read_site(str(write(tmp_path, "site.yaml", text)), home=tmp_path, environ={"SCRATCH": "/x:y"}).value
    assert found.container.binds == ["/x\\:y/ada:/scratch:ro", "/a\\$b"]
    assert (found.container.env, found.network.binds) == ({"CACHE": "/x:y/c"}, ["/x\\:y"])


def test_what_is_wrong_with_a_sites_binds(tmp_path: Path) -> None:
    path = write(tmp_path, "site.yaml", f"{SITE}container:\n  binds:\n    - /ok:/ok:ro\n    - data:/data\nnetwork: {{binds: ['/a:b']}}\n")
    said = "is no bind; write source[:target[:options]], paths absolute or beginning with $VARIABLE"
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path, environ={})
    assert str(error.value) == f"{path}:7: container.binds.1: 'data:/data' {said}\n{path}:8: network.binds.0: '/a:b' {said}"
    write(tmp_path, "site.yaml", f"{SITE}container: {{binds: [$A], env: {{B: $B}}}}\nnetwork: {{binds: [$C]}}\n")
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path, environ={"C": "relative"})
    assert str(error.value) == (
        f"{path}:4: container.env.B: $B: $B is not set\n"
        f"{path}:4: container.binds.0: $A: $A is not set\n"
        f"{path}:5: network.binds.0: $C: relative has a path that is not absolute"
    )


def test_stack_with_unknown_base(tmp_path: Path) -> None:
    text = "name: x\nbase: {kind: dockr, image: a}\npython: 3.11\npackages: {torch: 2.3.0, transformers: 4.41.1}\n"
    path = write(tmp_path, "s.yaml", text)
    with pytest.raises(UsageError) as error:
        read_stack(str(path), home=tmp_path)
    assert str(error.value) == (
        f"{path}:2: base: 'dockr' is not one of debootstrap, docker, localimage (did you mean docker?)\n"
        f"{path}:3: python: a text is needed, not 3.11 (in quotes: '3.11')"
    )


def test_user_config(tmp_path: Path) -> None:
    assert read_config(home=tmp_path) is None
    path = write(user_folder(tmp_path), "config.yaml", "site: slurm\nslurm: {account: me}\n")
    config = read_config(home=tmp_path)
    assert config is not None
    assert (config.value.site, config.value.slurm.account, config.where("slurm.account")) == ("slurm", "me", Where(str(path), 2))


def test_findings_get_their_place() -> None:
    loaded = read_preset(GOOD)
    found = locate([Finding("error", "x", "y", key="training.sequence_length"), Finding("advice", "z", "no key")], loaded)
    assert [str(finding) for finding in found] == [f"{GOOD}:6: training.sequence_length: y", "no key"]


def test_facts_of_a_model_folder(tmp_path: Path) -> None:
    config = '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}'
    write(tmp_path, "m/config.json", config)
    facts = model_facts(read_preset(GOOD, settings=[f"model.path={tmp_path / 'm'}"]).value, home=tmp_path)
    assert facts is not None and (facts.layers, facts.kv_heads, facts.vocab) == (2, 4, 32000)


def test_facts_of_an_unknown_model(tmp_path: Path) -> None:
    assert model_facts(read_preset(GOOD, settings=["model.name=other/starcoder2-3b"]).value, home=tmp_path) is None
    assert model_facts(read_preset(GOOD, settings=["model.name=other/thing"]).value, home=tmp_path) is None


def test_names_of_shipped_presets() -> None:
    assert {"tiny", "starcoder2-15b", "santacoder-v100"} <= set(shipped_presets())
