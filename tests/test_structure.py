"""The structure of the house: who may import whom, what a start loads, what is in the wheel, what the README says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "launcher"

LAYERS = [
    {"caches", "errors", "files", "metrics", "plan", "run", "checkpoint", "shipped", "supported", "base_model", "serve"},
    {"templating", "preset", "hardware"},
    {"planner"},
    {"render", "image", "stage", "export", "ranks", "remedies", "advice"},
    {"slurm", "supervise", "continuation", "node", "processes", "runs", "state"},
    {"submit", "follow", "report", "observe", "site", "bench"},
    {"cli"},
]
TRAIN_MAY_IMPORT = {"errors", "files", "plan", "run", "metrics", "checkpoint", "supported", "base_model", "serve", "train"}
MEASURING = {"bench/inside.py", "bench/material.py", "bench/measure.py", "bench/rival.py"}
"""Started in the image, as the training is, which they measure; what is on the host never imports them."""
STANDARD_LIBRARY_ONLY = ["launcher.supervise", "launcher.run", "launcher.plan", "launcher.metrics", "launcher.checkpoint"]


def imports(path: Path) -> set[str]:
    """The rooms of ``launcher`` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "launcher" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("launcher.")}
    return found - {"__version__"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_a_layer() -> None:
    assert {room(path) for path in files()} <= set().union(*LAYERS) | {"train"}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if room(path) == "train":
        assert imports(path) <= TRAIN_MAY_IMPORT
        return
    if str(path.relative_to(PACKAGE)) in MEASURING:
        assert imports(path) <= TRAIN_MAY_IMPORT | {"bench", "stage"}
        return
    level = next(index for index, rooms in enumerate(LAYERS) if room(path) in rooms)
    allowed = set().union(*LAYERS[: level + 1])
    assert imports(path) <= allowed, f"{path} reaches up to {sorted(imports(path) - allowed)}"


def test_nobody_imports_what_measures() -> None:
    modules = {name.replace("/", ".").removesuffix(".py") for name in MEASURING}
    on_the_host = [path for path in files() if str(path.relative_to(PACKAGE)) not in MEASURING]
    assert [path for path in on_the_host if any(f"from launcher.{module} import" in path.read_text() for module in modules)] == []


def loaded_modules(code: str) -> set[str]:
    """Top-level modules after ``code`` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_modules("from launcher.cli import main\nsys.argv = ['ftlaunch', '--help']\ntry: main()\nexcept SystemExit: pass")
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "accelerate", "datasets", "submitit", "jinja2", "matplotlib", "pandas", "numpy"}


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_small_feet(module: str) -> None:
    bare = loaded_modules("pass")
    loaded = loaded_modules(f"import {module}") - bare - {"launcher"}
    assert {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")} == set()


def test_wheel_holds_what_it_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("presets", "*.yaml"), ("templates", "*.j2"), ("containers", "*")):
        for path in (path for path in (REPOSITORY / folder).rglob(pattern) if path.is_file()):
            assert f"launcher/{path.relative_to(REPOSITORY)}" in names
    assert not [name for name in names if name.startswith("tests/")]


def test_readme_commands_exist() -> None:
    """Every ``ftlaunch`` command and ``make`` target that the documents show is one."""
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    documents = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    text = "\n".join(re.sub(r"^ {4}", "", block, flags=re.M) for path in documents for block in _code(path.read_text()))
    commands = set(re.findall(r"ftlaunch ([a-z]+)", text))
    assert commands, "the README shows no command"
    help_text = subprocess.run([sys.executable, "-m", "launcher.cli", "--help"], capture_output=True, text=True).stdout
    assert {command for command in commands if not re.search(rf"\b{command}\b", help_text)} == set()
    assert {target for target in re.findall(r"\bmake ([a-z-]+)", text) if target not in targets} == set()


def test_readme_links_lead_somewhere() -> None:
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (REPOSITORY / link).exists(), f"{path.name} links to {link}"


def _code(text: str) -> list[str]:
    return re.findall(r"```[a-z]*\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)


def test_constraints_match_the_cpu_stack() -> None:
    from launcher.preset.reading import read_stack

    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    stack = read_stack("cpu").value.packages
    assert {name: version for name, version in pinned.items() if name in stack} == {name: stack[name] for name in stack if name in pinned}
    assert "torch" in stack
