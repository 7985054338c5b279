"""Training without a container: what is installed here against what the stack pins. Nothing heavy is imported for it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from launcher.errors import Finding, MissingError
from launcher.preset.stack import Stack

NEEDED = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors")


def check_host(stack: Stack) -> list[Finding]:
    """A warning for each package whose version differs from the stack's pin (a build tag as in ``+cpu`` does not count).

    Errors: MissingError when what every training needs is not installed.
    """
    installed = {name: _version(name) for name in {*NEEDED, *stack.packages}}
    missing = sorted(name for name in NEEDED if installed[name] is None)
    if missing:
        hint = "pip install 'ftlaunch[train]', or use a site with a container (Apptainer)"
        raise MissingError(
            f"{', '.join(missing)}: not installed beside ftlaunch, and the site uses no container", code="no-torch", hint=hint
        )
    findings = []
    for name, pinned in stack.packages.items():
        found = installed[name]
        if found is not None and found.partition("+")[0] != pinned.partition("+")[0]:
            message = f"{name} {found} is installed here, the stack {stack.name} pins {pinned}"
            findings.append(Finding("warning", "version-differs", message, key="stack", hint="a container of the stack has what it pins"))
    return findings


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
