"""What an image can do: one that the user brings, or one of the cache. It is opened and asked; nothing is believed from its name."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ActionError, Finding, UsageError
from launcher.files import hash_file
from launcher.image.apptainer import ask, find_apptainer, labels, last_line
from launcher.image.enter import enter
from launcher.plan import Container
from launcher.preset.site import Site

_GO_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "ppc64le"}
MINIMUM_PYTHON = (3, 9)


@dataclass(frozen=True)
class Verified:
    """An image that can train."""

    container: Container
    python: str
    versions: dict[str, str]
    """Distribution → version, of those that a training uses and the image has."""
    cuda: str | None
    """CUDA version that its torch was built with."""
    findings: tuple[Finding, ...]


def verify_image(image: Path, site: Site, *, file: str | None = None, line: int | None = None) -> Verified:
    """Open an image that the user brings. ``file`` and ``line``: where the preset names it, for the message.

    Errors: MissingError without Apptainer; UsageError when it is not there, no image, for other machines, or without torch, transformers
    and accelerate that can be imported.
    """
    command = find_apptainer(site.container)

    def refuse(message: str, hint: str | None = None) -> UsageError:
        return UsageError(f"{image}: {message}", code="image", file=file, line=line, key="stack.image", hint=hint)

    if not image.exists():
        raise refuse("there is no such file")
    try:
        named = labels(command, image)
    except ActionError as error:
        raise refuse("not an Apptainer image", str(error)) from error
    machine = _GO_MACHINES.get(named.get("org.label-schema.build-arch", ""), platform.machine())
    if machine != platform.machine():
        raise refuse(f"is for {machine}, this machine is {platform.machine()}")
    content = hash_file(image)  # its path may name another image tomorrow
    container = Container("apptainer", str(image.absolute()), content, command, tuple(site.container.binds), dict(site.container.env))
    source = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
    answer = ask(enter(container, str(image.absolute()), ["python3", "-c", source]))
    try:
        found = json.loads(answer.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise refuse(f"its python3 does not answer: {last_line(answer.stderr)}", "a Python of 3.9 or newer has to be on its PATH") from None
    if tuple(int(part) for part in found["python"].split(".")[:2]) < MINIMUM_PYTHON:
        raise refuse(f"has Python {found['python']}, 3.9 is the oldest that works")
    if found["problems"]:
        raise refuse("; ".join(f"{name} cannot be imported ({error})" for name, error in found["problems"].items()))
    findings = []
    if "ftlaunch.stack" not in named:
        findings.append(
            Finding("advice", "own-image", f"{image} is used as it is: its packages are recorded, not pinned", file, line, "stack.image")
        )
    return Verified(container, found["python"], found["versions"], found["cuda"], tuple(findings))
