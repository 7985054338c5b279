"""Runs in an image, on its Python (3.9 or newer, standard library only): says which versions are there, or compares them with the lock.

``check.py LOCK STACK`` ends with 1 and one line for each difference; without arguments it prints one JSON line. It is a file of its own in
the image and imports nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

NEEDED = ("torch", "transformers", "accelerate")
USED = (*NEEDED, "peft", "datasets", "safetensors", "numpy", "xformers", "deepspeed", "flash-attn")


def differences(pins: Mapping[str, str], stack: Mapping[str, Any]) -> list[str]:
    """What is not as pinned, one line each. ``pins``: name → version of the lock; ``stack``: the stack as plain data."""
    wrong = []
    python = platform.python_version()
    if python.split(".")[:2] != stack["python"].split("."):
        wrong.append(f"Python is {python}, the stack pins {stack['python']}")
    for name, version in sorted(pins.items()):
        found = installed(name)
        if found != version:
            wrong.append(f"{name} is {found or 'missing'}, the lock pins {version}")
    for name, version in sorted(stack["packages"].items()):
        found = installed(name)
        if found is None or version not in (found, found.partition("+")[0]):
            wrong.append(f"{name} is {found or 'missing'}, the stack pins {version}")
            continue
        error = import_error(name)
        if error:
            wrong.append(f"{name} {found} cannot be imported: {error}")
    if "torch" in sys.modules and cuda_of_torch() != stack["cuda"]:
        wrong.append(f"torch is built with CUDA {cuda_of_torch()}, the stack has {stack['cuda']}")
    return wrong


def report() -> dict[str, Any]:
    """Versions and, for what a training cannot do without, why it cannot be imported."""
    errors = {name: import_error(name) for name in NEEDED}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version for name in USED for version in [installed(name)] if version},
        "cuda": None if errors["torch"] else cuda_of_torch(),
        "problems": {name: error for name, error in errors.items() if error},
    }


def installed(name: str) -> str | None:
    """Version of a distribution, None when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_error(name: str) -> str:
    """Why the distribution's module cannot be imported, in one line; empty when it can."""
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # whatever a package raises at import is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""


def cuda_of_torch() -> str | None:
    cuda = sys.modules["torch"].version.cuda
    return None if cuda is None else str(cuda)


def read_pins(text: str) -> dict[str, str]:
    """Name → version of the lines ``name==version``."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", text, re.MULTILINE))


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        sys.stdout.write(json.dumps(report()) + "\n")
        return 0
    with open(arguments[0], encoding="utf-8") as lock, open(arguments[1], encoding="utf-8") as stack:
        pins, pinned = read_pins(lock.read()), json.load(stack)
    wrong = differences(pins, pinned)
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    if not wrong:
        named = " ".join(f"{name} {installed(name)}" for name in sorted(pinned["packages"]) if name != "torch")
        sys.stdout.write(f"torch {sys.modules['torch'].__version__} CUDA {cuda_of_torch()} {named}; {len(pins)} pins as locked\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
