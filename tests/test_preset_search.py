"""Where a name leads: the project's folder, the user's, what ships; and what is not trusted there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.reading import known_presets, read_preset
from launcher.preset.search import user_folder
from tests.conftest import REPOSITORY


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; the home is beside it."""
    folder = tmp_path / "project"
    (folder / "presets").mkdir(parents=True)
    (user_folder(tmp_path / "home") / "presets").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, name: str, description: str, extends: str = "tiny") -> None:
    (folder / "presets" / name).write_text(f"extends: {extends}\nname: mine\ndescription: {description}\n")


def described(name: str, project: Path) -> str:
    return read_preset(name, home=project.parent / "home").value.description


def test_the_project_comes_before_the_user_and_both_before_what_ships(project: Path) -> None:
    user = user_folder(project.parent / "home")
    shipped = described("tiny", project)
    write(user, "tiny.yaml", "of the user")
    assert described("tiny", project) == "of the user"
    write(project, "tiny.yaml", "of the project")
    assert described("tiny", project) == "of the project"
    (project / "presets" / "tiny.yaml").unlink()
    assert described("presets/tiny.yaml", project) == described("presets/tiny", project) == shipped, "a shipped one by its path"


def test_a_preset_may_extend_the_one_that_it_shadows(project: Path) -> None:
    user = user_folder(project.parent / "home")
    write(user, "tiny.yml", "of the user", extends="tiny.yaml")
    write(project, "tiny.yaml", "of the project")
    assert described("tiny", project) == "of the project"
    loaded = read_preset("tiny", home=project.parent / "home")
    assert [layer.where.file for layer in loaded.layers] == [
        str(REPOSITORY / "presets" / "tiny.yaml"),
        str(user / "presets" / "tiny.yml"),
        "presets/tiny.yaml",
    ]


def test_what_is_extended_does_not_depend_on_the_working_folder(project: Path) -> None:
    write(user_folder(project.parent / "home"), "mine.yaml", "of the user", extends="base")
    write(user_folder(project.parent / "home"), "base.yaml", "base of the user")
    write(project, "base.yaml", "base of the project")
    loaded = read_preset("mine", home=project.parent / "home")
    assert [Path(layer.where.file).parent.parent.name for layer in loaded.layers][1:] == ["ftlaunch", "ftlaunch"]


def test_a_preset_that_extends_only_itself(project: Path) -> None:
    write(project, "alone.yaml", "x", extends="alone")
    with pytest.raises(UsageError) as error:
        read_preset("alone", home=project.parent / "home")
    assert str(error.value) == "presets/alone.yaml:1:1: extends: goes in a circle: alone.yaml → alone.yaml"


def test_a_file_of_somebody_else_is_only_read_by_its_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "mine.yaml", "of the project")
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    owner = (project / "presets" / "mine.yaml").stat().st_uid
    if owner == 0:  # root's files are everybody's
        os.chown(project / "presets" / "mine.yaml", 4712, -1)
        owner = 4712
    with pytest.raises(UsageError) as error:
        described("mine", project)
    assert (
        str(error.value) == f"presets/mine.yaml: belongs to another user (uid {owner}) (if you trust it, say its path: presets/mine.yaml)"
    )
    assert described("presets/mine.yaml", project) == "of the project"


def test_near_names_count_the_own_ones(project: Path) -> None:
    write(project, "my-model.yaml", "x")
    with pytest.raises(UsageError) as error:
        described("my-modle", project)
    assert str(error.value) == "no preset of the name 'my-modle' (did you mean my-model?)"


def test_the_folder_of_a_checkout_is_what_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert {found.source for found in known_presets(home=tmp_path)} == {"shipped"}


def test_list_says_where_each_comes_from_and_what_is_shadowed(project: Path) -> None:
    write(project, "tiny.yaml", "of the project")
    write(user_folder(project.parent / "home"), "broken.yaml", "[", extends="tiny")
    documents = {(one["name"], one["source"]): one for one in json.loads(ftlaunch(project, "presets", "--json"))["presets"]}
    assert documents["tiny", "project"]["shadowed_by"] is None
    assert documents["tiny", "shipped"]["shadowed_by"] == "presets/tiny.yaml"
    assert documents["starcoder2-3b", "shipped"]["shadowed_by"] is None
    assert "not YAML" in documents["broken", "user"]["wrong"]
    table = ftlaunch(project, "presets")
    assert "shadowed by presets/tiny.yaml" in table and "cannot be read" in table


def test_check_says_that_a_shipped_preset_is_shadowed(project: Path) -> None:
    write(project, "tiny.yaml", "of the project")
    document = json.loads(ftlaunch(project, "check", "tiny", "--json"))
    (said,) = [finding for finding in document["findings"] if finding["code"] == "shadows-shipped"]
    assert said["message"] == "presets/tiny.yaml is taken, not the shipped preset of that name"
    assert "shadows-shipped" not in ftlaunch(project, "check", "presets/tiny.yaml", "--json"), "its path was typed"


def ftlaunch(project: Path, *argv: str) -> str:
    environ = {
        **os.environ,
        "HOME": str(project.parent / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "FTLAUNCH_SITE": "local",
        "COLUMNS": "300",
    }
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *argv], cwd=project, env=environ, capture_output=True, text=True, check=True
    ).stdout
