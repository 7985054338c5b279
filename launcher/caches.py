"""Where libraries put what they compile, download and remember: one folder, since a home may be full, read-only or not there at all.

Standard library only (Python 3.9). A site may name one for all runs (``cache``), also on the nodes' own disks; else each run has its own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import GateError, UsageError
from launcher.plan import Plan

_FOLDERS = {
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_DIR": "wandb",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
    "PIP_CACHE_DIR": "pip",
    "XDG_CACHE_HOME": "xdg",
    "XDG_CONFIG_HOME": "xdg/config",
    "XDG_DATA_HOME": "xdg/data",
}

NARROWER = frozenset(
    [
        *("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_METRICS_CACHE"),
        *("HUGGINGFACE_HUB_CACHE", "HUGGINGFACE_ASSETS_CACHE", "TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"),
        *("PYTORCH_PRETRAINED_BERT_CACHE", "PYTORCH_KERNEL_CACHE_PATH", "WANDB_ARTIFACT_DIR"),
    ]
)
"""Variables that libraries believe more than those above: what a login sets of them must not reach a process with a cache of ours."""


def cache_environment(folder: Path) -> dict[str, str]:
    """The environment with which every library that a training uses keeps to ``folder``. The folders below are made by who needs them."""
    return {name: str(folder / below) for name, below in _FOLDERS.items()}


def cache_of_site(plan: Plan, environ: Mapping[str, str]) -> str | None:
    """The folder that the site names for the caches of all runs with this image, in it one of this user; None where it names none.

    ``environ`` is the node's. Errors: UsageError when a variable in it is not set, or it is no absolute path.
    """
    written = plan.site["cache"]
    if written is None:
        return None
    text = re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: environ.get(match[1] or match[2]) or match[0], str(written))
    if "$" in text or not text.startswith("/"):
        message = f"site {plan.site['name']}: cache: {written}: not an absolute path, or a variable that is not set on the node"
        raise UsageError(message, code="cache", key="cache")
    return f"{text}/ftlaunch-{os.getuid()}-{(plan.container.identity or 'host')[:12]}"


def make_cache(folder: Path) -> None:
    """Make a folder of ``cache_of_site`` where it is missing. Errors: GateError when it cannot be made, or is somebody else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise GateError(f"{folder} cannot be made for caches: {error.strerror}", code="cache", hint="cache of the site") from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise GateError(f"{folder} is for caches and is not this user's folder", code="cache", hint="have it removed")


MAKE_CACHE = (
    '{ mkdir -p -m 700 "$FTLAUNCH_CACHE" && [ -O "$FTLAUNCH_CACHE" ] && [ ! -L "$FTLAUNCH_CACHE" ]; } || '
    '{ echo "$FTLAUNCH_CACHE cannot be used for caches on $(hostname)" >&2; exit 93; }; '
)
"""``make_cache`` for the shell in which a task begins: on each node, before anything of ours runs there."""
