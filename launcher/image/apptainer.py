"""Finding Apptainer, and running its commands with an environment of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.errors import ActionError, MissingError
from launcher.image.enter import clean_environment
from launcher.preset.site import SiteContainer


def find_apptainer(container: SiteContainer) -> str:
    """Absolute path of the site's command. Errors: MissingError that says what to install or load."""
    found = shutil.which(container.command)
    if found is None:
        hint = (
            f"module load {container.module}"
            if container.module
            else "install the package apptainer (1.2 or newer), or set container.command of the site"
        )
        raise MissingError(f"{container.command} is not on this machine", code="no-apptainer", key="container.command", hint=hint)
    return os.path.abspath(found)


def ask(command: Sequence[str], *, extra: Mapping[str, str] | None = None, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a short Apptainer command and keep what it says."""
    own = {**clean_environment(os.environ), **(extra or {})}
    return subprocess.run(command, input=text, capture_output=True, text=True, env=own, check=False)


def labels(command: str, image: Path) -> dict[str, str]:
    """The image's labels. Errors: ActionError when Apptainer cannot read the file as an image."""
    answer = ask([command, "inspect", "--json", "--labels", str(image)])
    if answer.returncode != 0:
        raise ActionError(f"{image} is not an image that {command} can read: {last_line(answer.stderr)}", code="not-an-image")
    found = json.loads(answer.stdout)["data"]["attributes"].get("labels") or {}
    return {str(name): str(value) for name, value in found.items()}


def last_line(text: str) -> str:
    """The last line that says something: where Apptainer says what went wrong."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
