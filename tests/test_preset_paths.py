"""Paths in and of presets: what they count from, odd names, and files that others could change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.reading import (
    read_preset,
)
from tests.preset_files import GOOD, write


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


def test_relative_paths_count_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "there/data.jsonl", "")
    write(tmp_path, "there/base.yaml", f"extends: {GOOD}\ndata: {{path: data.jsonl}}\n")
    path = write(tmp_path, "here/x.yaml", "extends: ../there/base.yaml\nname: x\n")
    assert read_preset(str(path)).value.data.path == str(tmp_path / "there" / "data.jsonl")
    write(tmp_path, "mine.jsonl", "")
    monkeypatch.chdir(tmp_path)
    assert read_preset(str(path), settings=["data.path=mine.jsonl"]).value.data.path == str(tmp_path / "mine.jsonl")
