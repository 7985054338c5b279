"""The data folder and the processes that fill it: a folder for each key, made once. Standard library only, on the host."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import MissingError, UsageError
from launcher.files import digest
from launcher.plan import Container
from launcher.stage.child import Where
from launcher.stage.shelf import make, read_facts
from launcher.stage.sources import Local, content_sha, known_sha, leaves

if TYPE_CHECKING:
    from launcher.preset.stack import Stack

LAYOUT_VERSION = 1
"""Part of every key: raised when what is written changes its meaning."""

PROBE = """
import json, platform, sysconfig
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version(), "stdlib": sysconfig.get_paths()["stdlib"]}
for name in ("torch", "transformers", "tokenizers", "datasets", "pyarrow"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


class NotThereError(Exception):
    """Something would have to be made."""


@dataclass(frozen=True)
class Shop:
    """The data folder and the processes that fill it."""

    where: Where
    data: Path
    look_only: bool = False
    """What is not there is not made: ``NotThereError``."""

    def sha(self, local: Local, key: str = "data.path") -> str:
        """Hash of the content of something local."""
        cache = self.data / "hashes"
        if not self.look_only:
            return content_sha(local, cache, key=key)
        known = known_sha(local, cache, key=key)
        if known is None:
            raise NotThereError(key)
        return known

    def make(
        self,
        shelf: Literal["models", "datasets", "raw", "refs"],
        label: str,
        module: Literal["fetch", "prepare"],
        request: Mapping[str, Any],
        *,
        key: Mapping[str, Any],
        reads: Sequence[Path] = (),
    ) -> tuple[Path, dict[str, Any]]:
        """The finished folder for a key, made by a process from the request unless it is there, and its facts."""
        name = f"{_slug(label)}-{digest({'layout': LAYOUT_VERSION, **key})[:16]}"

        def build(folder: Path) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".tmp-{name}-") as scratch:
                full = {**request, "folder": str(folder), "scratch": scratch}
                facts = self.where.run(f"stage.{module}", full, scratch=Path(scratch), log=self.data / "logs" / f"{name}.log", reads=reads)
            return {**facts, "key": dict(key)}

        folder = self.data / shelf / name
        if self.look_only:
            facts = read_facts(folder)
            if facts is None:
                raise NotThereError(name)
            return folder, facts
        return folder, make(folder, build, self.where.say, resumable=request["task"] == "model" and module == "fetch")

    def commit(self, kind: Literal["model", "dataset"], name: str, revision: str) -> str:
        """The commit of a hub name: the one that was found first, so that a branch that moves does not move what is staged.

        Removing its folder in ``refs/`` looks again.
        """
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            return revision
        request = {"task": "resolve", "kind": kind, "name": name, "revision": revision}
        _, facts = self.make("refs", name, "fetch", request, key=request)
        return str(facts["commit"])


def software_of(stack: Stack | None, container: Container, python: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """What tokenises and draws weights: the image, or what the interpreter has installed. Errors: MissingError."""
    if container.use == "apptainer":
        if container.identity is not None:
            return {"image": container.identity}
        if stack is not None:
            return {"stack": dict(stack.packages)}
        assert container.image is not None, "apptainer needs an image"
        state = Path(container.image).stat()
        return {"image": container.image, "bytes": state.st_size, "changed_ns": state.st_mtime_ns}
    environ = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [python, "-s", "-c", PROBE], env=environ, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(
            f"{python} does not run: {error}", code="no-interpreter", hint="give a Python with the stack's packages"
        ) from error
    found: dict[str, Any] = json.loads(done.stdout)
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise MissingError(
            f"{python} has no {', '.join(missing)}", code="missing-package", hint="pip install 'ftlaunch[train]', or stage in a container"
        )
    return found


def refuse_outside(local: Local, key: str = "data.path") -> None:
    for name in local.files:
        if leaves(Path(local.root), name):
            raise UsageError(
                f"{name} is a link out of {local.root}, which the container would not see", key=key, hint="copy the folder with cp -rL"
            )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "data"
