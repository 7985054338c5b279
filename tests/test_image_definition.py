"""The definition, the files beside it, and the identity."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.errors import UsageError
from launcher.image.definition import build_arguments, identity, image_files, render_definition
from launcher.preset.reading import read_stack
from launcher.preset.stack import Stack

LOCK = (
    "\n".join(f"{name} \\\n    --hash=sha256:{'0' * 64}" for name in ("torch==2.13.0+cpu", "transformers==5.23.0", "numpy==2.4.6")) + "\n"
)
DIGEST = "sha256:" + "ab" * 32
DOCKER = {"kind": "docker", "image": "example/cuda:12.1.1-devel", "digest": DIGEST}


def stack(**changes: Any) -> Stack:
    plain: dict[str, Any] = {
        "name": "small",
        "base": {"kind": "debootstrap", "suite": "bookworm"},
        "python": "3.11",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "debian_packages": ["python3.11", "python3.11-venv"],
    }
    return Stack.model_validate({**plain, **changes})


def header(text: str) -> list[str]:
    return [line for line in text.split("%files")[0].splitlines() if line and not line.startswith("#")]


def section(text: str, name: str) -> list[str]:
    body = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL)
    assert body
    return [line.strip() for line in body[1].splitlines() if line.strip()]


def test_debootstrap() -> None:
    text = render_definition(stack(), LOCK)
    assert header(text) == ["Bootstrap: debootstrap", "OSVersion: bookworm", "MirrorURL: {{ debian_mirror }}"]
    assert "apt-get install -y --no-install-recommends python3.11 python3.11-venv" in section(text, "post")
    assert build_arguments(stack(), "mirror") == {"debian_mirror": "mirror"}


def test_docker() -> None:
    text = render_definition(stack(base=DOCKER, debian_packages=[]), LOCK)
    assert header(text) == ["Bootstrap: docker", f"From: example/cuda:12.1.1-devel@{DIGEST}"]
    assert "apt-get" not in text
    assert "{{" not in text
    assert build_arguments(stack(base=DOCKER), None) == {}


def test_localimage_names_no_path_of_the_host() -> None:
    base = stack(base={"kind": "localimage", "path": "/somewhere/of mine/base.sif"})
    text = render_definition(base, LOCK, base_sha256="cd" * 32)
    assert header(text) == ["Bootstrap: localimage", "From: base.sif"]
    assert f"ftlaunch.base-sha256 {'cd' * 32}" in section(text, "labels")
    assert "somewhere" not in text + "".join(image_files(base, LOCK).values())


@pytest.mark.parametrize("name", ["cpu", "torch2.3-cu121", "torch2.10-cu128"])
def test_shipped(name: str) -> None:
    loaded = read_stack(name)
    text = render_definition(loaded.value, loaded.file.with_suffix(".lock").read_text())
    assert text.startswith(f"# Image of the stack {name} for ftlaunch. Rendered; do not edit.\n# Made by:    ftlaunch build {name}\n")
    assert f"ftlaunch.pin.torch {loaded.value.packages['torch']}" in section(text, "labels")
    assert "://" not in text


def test_the_identity_is_the_hash_of_what_goes_in() -> None:
    text = render_definition(stack(), LOCK)
    own = identity(stack(), LOCK)
    assert text.count(own) == 2
    parts = {**image_files(stack(), LOCK), "image.def": text.replace(own, "0" * 64)}
    assert hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == own


@pytest.mark.parametrize(
    "changes",
    [
        {"python": "3.12"},
        {"debian_packages": ["python3.11"]},
        {"packages": {"torch": "2.13.0+cpu", "transformers": "5.23.0"}},
        {"base": DOCKER},
    ],
    ids=["python", "debian", "pins", "base"],
)
def test_another_stack_is_another_image(changes: dict[str, Any]) -> None:
    assert identity(stack(**changes), LOCK) != identity(stack(), LOCK)


def test_another_lock_is_another_image() -> None:
    assert identity(stack(), LOCK.replace("0" * 64, "1" * 64)) != identity(stack(), LOCK)


def test_another_template_is_another_image(tmp_path: Path) -> None:
    own = tmp_path / "own.def.j2"
    own.write_text("Bootstrap: docker\nFrom: x\n# {{ identity | line }}\n")
    assert identity(stack(), LOCK, own=own) != identity(stack(), LOCK)
    assert render_definition(stack(), LOCK, own=own).endswith(f"# {identity(stack(), LOCK, own=own)}\n")


def test_another_base_image_is_another_image() -> None:
    base = stack(base={"kind": "localimage", "path": "/base.sif"})
    moved = stack(base={"kind": "localimage", "path": "/elsewhere/base.sif"})
    assert identity(base, LOCK, base_sha256="1" * 64) != identity(base, LOCK, base_sha256="2" * 64)
    assert identity(base, LOCK, base_sha256="1" * 64) == identity(moved, LOCK, base_sha256="1" * 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x\n%setup\n  id"},
        {"description": "x\n%setup\n  id"},
        {"packages": {"torch": "2.3.0\n%setup", "transformers": "5.23.0"}},
        {"packages": {"torch": "2.3.0", "transformers": ">=5"}},
        {"packages": {"torch": "2.3.0", "transformers": "5", "a b": "1"}},
        {"debian_packages": ["gcc; id"]},
        {"debian_packages": ["-o=APT::x"]},
        {"base": {"kind": "debootstrap", "suite": "bookworm\nInclude: x"}},
        {"base": {**DOCKER, "image": "docker://x y"}},
        {"base": {**DOCKER, "image": "x\n%setup"}},
        {"base": {"kind": "docker", "image": "example/cuda:12.1.1"}},
        {"base": {**DOCKER, "digest": "latest"}},
        {"base": {"kind": "localimage", "path": "a\nb"}},
        {"python": "3.11; id"},
        {"packages": {"transformers": "5.23.0"}},
    ],
    ids=lambda changes: ascii(next(iter(changes.values())))[:40],
)
def test_hostile_stacks_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        stack(**changes)


def test_braces_that_apptainer_would_fill_in_are_refused() -> None:
    with pytest.raises(UsageError, match="description"):
        render_definition(stack(description="{{ debian_mirror }}"), LOCK)


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ({"torch": "2.12.0"}, "the stack pins torch 2.12.0, which is 2.13.0+cpu in the lock"),
        ({"peft": "0.1"}, "peft 0.1, which is missing in the lock"),
    ],
    ids=["other-version", "missing"],
)
def test_a_lock_that_does_not_fit_is_refused(packages: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        render_definition(stack(packages={"torch": "2.13.0", "transformers": "5.23.0", **packages}), LOCK)
