"""Stack and lock → the text of the Apptainer definition, the files that it takes in, and the image's identity. Pure.

Nothing of a site or a machine is in them: mirrors come in while building, by a bind to ``/mnt`` and one build argument.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import UsageError
from launcher.files import digest
from launcher.image.lock import check_lock, read_lock
from launcher.preset.stack import Stack
from launcher.templating import render_template

TEMPLATE = "apptainer/image.def.j2"
_NO_IDENTITY = "0" * 64


def render_definition(stack: Stack, lock_text: str, *, base_sha256: str | None = None, own: Path | None = None) -> str:
    """The definition, with its identity in it. ``base_sha256``: content of a ``localimage`` base. ``own``: the user's template.

    Errors: UsageError when the lock does not fit the stack, or a value cannot stand in a definition.
    """
    return _render(stack, identity(stack, lock_text, base_sha256=base_sha256, own=own), base_sha256, own)


def identity(stack: Stack, lock_text: str, *, base_sha256: str | None = None, own: Path | None = None) -> str:
    """64 hex digits: SHA-256 of the definition (zeros in the place of the identity) and of every file that it takes in."""
    check_lock(stack, read_lock(lock_text))
    parts = {"image.def": _render(stack, _NO_IDENTITY, base_sha256, own), **image_files(stack, lock_text)}
    return digest(parts)


def image_files(stack: Stack, lock_text: str) -> dict[str, str]:
    """Name → text of the files that lie beside the definition while it is built."""
    facts = stack.model_dump(mode="json")
    if stack.base.kind == "localimage":
        facts["base"]["path"] = Path(stack.base.path).name
    check = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
    return {"requirements.lock": lock_text, "stack.json": json.dumps(facts, indent=2) + "\n", "check.py": check}


def build_arguments(stack: Stack, debian_mirror: str | None) -> Mapping[str, str]:
    """What the definition asks of ``apptainer build --build-arg``."""
    if stack.base.kind != "debootstrap":
        return {}
    assert debian_mirror is not None
    return {"debian_mirror": debian_mirror}


def _render(stack: Stack, identity: str, base_sha256: str | None, own: Path | None) -> str:
    assert (base_sha256 is not None) == (stack.base.kind == "localimage")
    if "{{" in stack.description:
        raise UsageError("{{ in the description of a stack: Apptainer would fill it in", code="template-braces", key="description")
    arguments = "".join(f" --build-arg {name}=URL" for name in build_arguments(stack, ""))
    return render_template(TEMPLATE, own=own, stack=stack, identity=identity, base_sha256=base_sha256, build_args=arguments)
