"""docs/your-cluster.md says what can be typed: each of its commands exists with these options, each key of its site files is one."""

from __future__ import annotations

import re
import shlex

import click
import pytest
import typer
import yaml

from launcher.cli import app
from launcher.preset.site import Site
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "your-cluster.md").read_text()

BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.S)

TYPED = [
    *(line for kind, text in BLOCKS if not kind for line in text.splitlines()),
    *(text for text in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))),
]


@pytest.mark.parametrize("line", sorted({line for line in TYPED if line.startswith("ftlaunch ")}))
def test_the_command_is_one(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        assert found is not None, f"there is no command {words[0]}"
        command, words = found, words[1:]
    command.make_context(line, words)


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_the_keys_are_those_of_a_site(text: str) -> None:
    Site.model_validate({"name": "mine", "source": "the page", "scheduler": "slurm", **yaml.safe_load(text)})


def test_there_is_something_to_type() -> None:
    assert sum(line.startswith("ftlaunch ") for line in TYPED) > 15


def test_the_readme_leads_there() -> None:
    assert "(docs/your-cluster.md)" in (REPOSITORY / "README.md").read_text()
