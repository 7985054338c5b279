"""Reading: what comes out, where it came from, and the whole message for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import Finding, UsageError
from launcher.preset.complaints import shown
from launcher.preset.reading import (
    locate,
    model_facts,
    read_config,
    read_hardware,
    read_preset,
    read_site,
    read_stack,
    shipped_presets,
)
from launcher.preset.search import user_folder
from launcher.preset.tree import Where
from tests.conftest import REPOSITORY

GOOD = str(REPOSITORY / "tests" / "broken" / "_good.yaml")


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


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
    path = write(tmp_path, "large.yaml", "name: x\n")
    with path.open("r+b") as file:
        file.truncate(50_000_000)
    with pytest.raises(UsageError) as error:
        read_preset(str(path))
    assert str(error.value) == f"{path}: larger than 1 MB: this is no file that a person wrote"


def test_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]" for name in "bcdefghij"]
    with pytest.raises(UsageError, match="an alias"):
        read_preset(str(write(tmp_path, "bomb.yaml", "\n".join(lines))))


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nested deeper than 32 levels"):
        read_preset(str(write(tmp_path, "deep.yaml", f"a: {'[' * 400_000}\n")))


@pytest.mark.parametrize("wrap", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["bom", "crlf"])
def test_other_editors(tmp_path: Path, wrap: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(wrap(f"extends: {GOOD}\nname: other\n").encode())  # type: ignore[operator]
    assert read_preset(str(path)).value.name == "other"


def test_yaml_1_2_values(tmp_path: Path) -> None:
    text = f"extends: {GOOD}\ntraining: {{learning_rate: 1e-5}}\ndescription: no\nslurm: {{time: 24:00:00}}\nevaluation: {{every: 50}}\n"
    preset = read_preset(str(write(tmp_path, "x.yaml", text))).value
    assert (preset.training.learning_rate, preset.description, preset.slurm.time, preset.evaluation.every) == (1e-5, "no", "24h", "50")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), (".5", 0.5), ("+5", 5), ("0x10", 16), ("0o10", 8), ("-0", 0), ("1.", 1.0)],
)
def test_numbers_of_yaml_1_2(text: str, value: float) -> None:
    setting = f"model={{tokenizer: train, config: {{model_type: llama, x: {text}}}}}"
    config = read_preset(GOOD, settings=[setting]).value.model.config
    assert config is not None and config["x"] == value and type(config["x"]) is type(value)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("24:00:00", "24h"), ("1-00:00:00", "24h"), ("1-12:30", "2190m"), ("90m", "90m"), ("1.5h", "90m"), ("2d", "48h"), ("61s", "2m")],
)
def test_durations(text: str, kept: str) -> None:
    assert read_preset(GOOD, settings=[f"slurm.time={text}"]).value.slurm.time == kept


UNIT = "write 48h, 90m, 2d or 'days-hours:minutes:seconds'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("90", "90 has no unit: write 90m or 90h, or 'days-hours:minutes:seconds'"),
        ("0", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("-5", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("1e2", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("true", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("-5m", f"'-5m' is not a duration: {UNIT}"),
        ("1:60:00", f"'1:60:00' is not a duration: {UNIT}"),
        ("1h30", f"'1h30' is not a duration: {UNIT}"),
        ("0h", "a duration must be above zero"),
        ("400d", "a duration must be at most 366d"),
        ("9" * 400 + "h", f"'{'9' * 60}' is not a duration: {UNIT}"),
    ],
    ids=lambda text: text[:12],
)
def test_durations_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_preset(GOOD, settings=[f"slurm.time={text}"])
    assert str(error.value) == f"--set: slurm.time: {message}"


@pytest.mark.parametrize(("text", "gib"), [("80", 80), ("80GiB", 80), ("80GB", 75), ("1.5 TiB", 1536), ("512MiB", 1)])
def test_sizes(text: str, gib: int) -> None:
    assert read_preset(GOOD, settings=[f"memory_per_node_gib={text}"]).value.memory_per_node_gib == gib


HOSTILE = {
    "directive": "x\n#SBATCH --uid=0",
    "command": "x\nrm -rf ~",
    "substitution": "$(id)",
    "backticks": "`id`",
    "quotes": "a'\"b",
    "pattern": "%j",
    "option": "-x",
    "empty": "",
    "long": "x" * 65,
    "nul": "a\0b",
    "escape": "a\x1bb",
    "line-separator": "a\u2028b",
    "direction": "a\u202eb",
    "right-to-left-mark": "a\u200fb",
}
NAME = "letters, digits, '.', '_' and '-', first a letter or digit, at most 64"
PARTITION = "a partition, or several with commas between: letters, digits, '.', '_' and '-', at most 64 each"


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    ("key", "rule"),
    [("name", NAME), ("hardware", NAME), ("slurm.account", NAME), ("slurm.qos", NAME), ("slurm.partition", PARTITION)],
    ids=lambda text: text if " " not in text else "",
)
def test_nothing_hostile_is_a_name(key: str, rule: str, value: str, tmp_path: Path) -> None:
    room, _, name = key.rpartition(".")
    written = f"{name}: {json.dumps(value)}"
    path = write(tmp_path, "x.yaml", f"extends: {GOOD}\n{f'{room}: {{{written}}}' if room else written}\n")
    with pytest.raises(UsageError) as error:
        read_preset(str(path))
    (finding,) = error.value.findings
    assert (finding.line, finding.column, finding.key, finding.hint) == (2, len(room) + 4 if room else 1, key, rule)
    assert finding.message == f"{shown(value)} is not allowed" and finding.message.isprintable()


@pytest.mark.parametrize("value", [HOSTILE[name] for name in HOSTILE if name not in ("pattern", "long")])
@pytest.mark.parametrize("key", ["constraint", "exclude", "mail"])
def test_nothing_hostile_is_an_argument(key: str, value: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        read_preset(GOOD, settings=[f"slurm.{key}={json.dumps(value)}"])


@pytest.mark.parametrize("name", ["with space", "it's", 'say "hi"', "a,b", "a:b", "a$b", "a`b", "#a", "ünï"])
def test_paths_of_any_shape_come_out_as_they_are(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{name}/data.jsonl", "")
    path = write(tmp_path, "x.yaml", f"extends: {GOOD}\ndata: {{path: {json.dumps(f'{name}/data.jsonl')}}}\n")
    assert read_preset(str(path)).value.data.path == str(tmp_path / name / "data.jsonl")


def test_home_of_the_user_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "data.jsonl", "")
    assert read_preset(GOOD, settings=["data.path=~/data.jsonl"]).value.data.path == str(tmp_path / "data.jsonl")


def test_links_are_followed_and_count_from_where_they_lead(tmp_path: Path) -> None:
    write(tmp_path, "there/data.jsonl", "")
    write(tmp_path, "there/base.yaml", f"extends: {GOOD}\n")
    write(tmp_path, "there/x.yaml", "extends: base.yaml\nname: linked\ndata: {path: data.jsonl}\n").chmod(0o400)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "x.yaml").symlink_to("../there/x.yaml")
    preset = read_preset(str(tmp_path / "here" / "x.yaml")).value
    assert (preset.name, preset.data.path) == ("linked", str(tmp_path / "there" / "data.jsonl"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 300, f"'{'x' * 58}…: File name too long"),
        ("d/" * 2100, f"'{'d/' * 29}…: File name too long"),
        ("data.jsonl/x", "'data.jsonl/x' does not exist"),
    ],
    ids=["name", "path", "not-a-folder"],
)
def test_paths_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    write(tmp_path, "data.jsonl", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        read_preset(GOOD, settings=[f"data.path={path}"])
    assert f"--set: data.path: {message}" in str(error.value)


def test_a_very_long_name_of_a_preset_is_no_preset() -> None:
    with pytest.raises(UsageError, match="no preset of the name"):
        read_preset("x" * 5000)


def test_what_everybody_can_write_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", f"extends: {GOOD}\n")
    path.chmod(0o666)
    with pytest.raises(UsageError) as error:
        read_preset(str(path))
    assert str(error.value) == f"{path}: everybody can write {path} (chmod o-w {path})"
    path.chmod(0o600)
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="everybody can write"):
        read_preset(str(path))
    tmp_path.chmod(0o1777)
    assert read_preset(str(path)).value.name == "good", "a sticky folder: nobody else can put another file there"


def test_a_path_that_everybody_can_write_is_not_used(tmp_path: Path) -> None:
    data = write(tmp_path, "data.jsonl", "")
    data.chmod(0o666)
    with pytest.raises(UsageError) as error:
        read_preset(GOOD, settings=[f"data.path={data}"])
    assert str(error.value) == f"--set: data.path: everybody can write {data} (chmod o-w {data}, or a copy of your own)"


def test_a_preset_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "x.yaml", f"extends: {GOOD}\n")

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UsageError) as error:
        read_preset(str(path))
    assert str(error.value) == f"{path}: cannot be read: Permission denied"


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
    assert site.where("account") == Where(str(user_folder(tmp_path) / "sites" / "delft.yaml"), 4, 1)
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
    expected = f"{path}:3:1: scheduler: 'pbs' is not none or slurm\n{path}:4:13: container.use: 'docker' is not apptainer or none"
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
    assert str(error.value) == f"{path}:7:7: container.binds.1: 'data:/data' {said}\n{path}:8:19: network.binds.0: '/a:b' {said}"
    write(tmp_path, "site.yaml", f"{SITE}container: {{binds: [$A], env: {{B: $B}}}}\nnetwork: {{binds: [$C]}}\n")
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path, environ={"C": "relative"})
    assert str(error.value) == (
        f"{path}:4:32: container.env.B: $B: $B is not set\n"
        f"{path}:4:21: container.binds.0: $A: $A is not set\n"
        f"{path}:5:19: network.binds.0: $C: relative has a path that is not absolute"
    )


def test_stack_with_unknown_base(tmp_path: Path) -> None:
    text = "name: x\nbase: {kind: dockr, image: a}\npython: 3.11\npackages: {torch: 2.3.0, transformers: 4.41.1}\n"
    path = write(tmp_path, "s.yaml", text)
    with pytest.raises(UsageError) as error:
        read_stack(str(path), home=tmp_path)
    assert str(error.value) == (
        f"{path}:2:1: base: 'dockr' is not one of debootstrap, docker, localimage (did you mean docker?)\n"
        f"{path}:3:1: python: a text is needed, not 3.11 (in quotes: '3.11')"
    )


def test_user_config(tmp_path: Path) -> None:
    assert read_config(home=tmp_path) is None
    path = write(user_folder(tmp_path), "config.yaml", "site: slurm\nslurm: {account: me}\n")
    config = read_config(home=tmp_path)
    assert config is not None
    assert (config.value.site, config.value.slurm.account, config.where("slurm.account")) == ("slurm", "me", Where(str(path), 2, 9))


def test_findings_get_their_place() -> None:
    loaded = read_preset(GOOD)
    found = locate([Finding("error", "x", "y", key="training.sequence_length"), Finding("advice", "z", "no key")], loaded)
    assert [str(finding) for finding in found] == [f"{GOOD}:6:3: training.sequence_length: y", "no key"]


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
