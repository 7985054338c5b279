"""Where the data folders are: beside the package in a wheel, one level up in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """The folder ``templates``, ``containers`` or ``presets``. Errors: FileNotFoundError when the installation is broken."""
    for root in (PACKAGE, PACKAGE.parent):
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(f"{folder}/ is neither in {PACKAGE} nor in {PACKAGE.parent}: reinstall ftlaunch")
