"""Reading a preset: which file is meant, what is refused before it is read, and where findings and model facts come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import Finding, UsageError
from launcher.preset.reading import (
    locate,
    model_facts,
    read_preset,
    shipped_presets,
)
from tests.preset_files import GOOD, write


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


def test_a_very_long_name_of_a_preset_is_no_preset() -> None:
    with pytest.raises(UsageError, match="no preset of the name"):
        read_preset("x" * 5000)


def test_a_preset_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "x.yaml", f"extends: {GOOD}\n")

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UsageError) as error:
        read_preset(str(path))
    assert str(error.value) == f"{path}: cannot be read: Permission denied"


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
