"""The lock: every distribution of a stack with its version and hashes, as ``pip install --require-hashes`` takes it.

``python -m launcher.image.lock STACK`` writes ``<stack>.lock`` beside the stack's file: pip resolves the pins with the indexes it is
configured with; hashes are those of every file of that version that fits the platform, so that any mirror of the index will do. No
address gets in. It runs on the stack's Python version, since pip evaluates markers for the Python that it runs on.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ActionError, FtlaunchError, UsageError
from launcher.files import write_text
from launcher.image.wheels import files_of_index, fits_platform
from launcher.preset.reading import read_stack
from launcher.preset.stack import Stack

_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)$")
_HASH = re.compile(r"^--hash=sha256:(?P<hash>[0-9a-f]{64})$")


@dataclass(frozen=True)
class Pin:
    name: str
    """Normalised: lower case, single dashes."""
    version: str
    hashes: tuple[str, ...]
    """SHA-256 of the files that may be installed, sorted."""


def read_lock(text: str, file: str = "the lock") -> dict[str, Pin]:
    """The pins by name.

    Errors: UsageError at the first line that is not ``name==version`` with SHA-256 hashes (an option, an address), or names a pin twice.
    """
    pins: dict[str, Pin] = {}
    for number, line in _logical_lines(text):
        requirement, *hashes = line.split()
        pin = _PIN.match(requirement)
        found = [_HASH.match(word) for word in hashes]
        if pin is None or not found or not all(found):
            raise UsageError(f"not a pin with hashes: {line[:80]!r}", code="lock", file=file, line=number, hint="write the lock anew")
        name = normalised(pin["name"])
        if name in pins:
            raise UsageError(f"{name} is pinned twice", code="lock", file=file, line=number)
        pins[name] = Pin(name, pin["version"], tuple(match["hash"] for match in found if match))
    return pins


def check_lock(stack: Stack, pins: dict[str, Pin], file: str = "the lock") -> None:
    """Errors: UsageError where the lock does not hold a pin of the stack, in that version."""
    for name, version in stack.packages.items():
        locked = pins.get(normalised(name))
        if locked is None or not same_version(version, locked.version):
            has = "is missing" if locked is None else f"is {locked.version}"
            hint = f"python -m launcher.image.lock {stack.name}"
            raise UsageError(f"the stack pins {name} {version}, which {has} in the lock", code="lock-outdated", file=file, hint=hint)


def same_version(pin: str, installed: str) -> bool:
    """Whether ``installed`` is what was pinned: a pin without local part (``+cpu``) takes any."""
    return installed == pin or installed.partition("+")[0] == pin


def make_lock(stack: Stack) -> str:
    """Resolve the stack's pins; the lock's text. Errors: UsageError on another Python, ActionError when pip or an index fails."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != stack.python:
        raise UsageError(f"the stack has Python {stack.python}, this is {here}", code="lock", hint=f"run it with python{stack.python}")
    installs = _resolve([f"{name}=={version}" for name, version in stack.packages.items()])
    torch = next(item for item in installs if item["metadata"]["name"] == "torch")
    if stack.cuda is None and not torch["metadata"]["version"].endswith("+cpu"):
        raise ActionError(
            f"pip found torch {torch['metadata']['version']}, which brings CUDA, for a stack without CUDA",
            code="lock",
            hint="give pip a find-links folder or an index with torch's CPU builds",
        )
    indexes = _configured_indexes()
    pins = sorted((_pin(item, indexes) for item in installs), key=lambda pin: pin.name)
    return _write(stack, pins)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """Lines with their first line's number, continuation lines joined, without comments and empty lines."""
    start, held = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        line = "" if line.lstrip().startswith("#") else line.strip()
        start = start or number
        held += line.removesuffix("\\") + " "
        if not line.endswith("\\"):
            if held.strip():
                yield start, held.strip()
            start, held = 0, ""


def _write(stack: Stack, pins: Sequence[Pin]) -> str:
    lines = [
        f"# Lock of the stack {stack.name}: Python {stack.python}, linux {platform.machine()}. Do not edit.",
        f"# Made by, and made again by: python -m launcher.image.lock {stack.name}",
    ]
    for pin in pins:
        lines += [f"{pin.name}=={pin.version} \\", *(f"    --hash=sha256:{value} \\" for value in pin.hashes)]
        lines[-1] = lines[-1].removesuffix(" \\")
    return "\n".join(lines) + "\n"


def _resolve(requirements: Sequence[str]) -> list[dict[str, Any]]:
    """pip's installation report: what it would install, with where each file is and its hash."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report), *requirements]
        _pip(command)
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    assert isinstance(installs, list)
    return installs


def _pin(item: dict[str, Any], indexes: Sequence[str]) -> Pin:
    name, version, download = normalised(item["metadata"]["name"]), item["metadata"]["version"], item["download_info"]
    hashes = {download["archive_info"]["hashes"]["sha256"]}
    wheel = download["url"].endswith(".whl")
    for index in indexes:
        for file, sha256 in files_of_index(index, name).items():
            if fits_platform(file, name, version, wheel=wheel):
                hashes.add(sha256)
    return Pin(name, version, tuple(sorted(hashes)))


def _configured_indexes() -> list[str]:
    """Addresses of pip's indexes: as configured (files, then the environment, which wins), else pip's own default."""
    said = _pip(["config", "list"])
    found = dict(re.findall(r"^(?:\w+|:env:)\.(index-url|extra-index-url)='(.*)'$", said, re.MULTILINE))
    if "index-url" not in found:
        from pip._internal.models.index import PyPI  # pip's own default, which no file of ours names

        found["index-url"] = PyPI.simple_url
    return [found["index-url"], *found.get("extra-index-url", "").split()]


def _pip(arguments: Sequence[str]) -> str:
    run = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise ActionError(f"pip {arguments[0]} ended with {run.returncode}: {run.stderr.strip()[-1500:]}", code="pip")
    return run.stdout


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m launcher.image.lock STACK\n")
        return 2
    try:
        loaded = read_stack(arguments[0])
        path = loaded.file.with_suffix(".lock")
        write_text(path, make_lock(loaded.value), mode=0o644)
    except FtlaunchError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
