"""Which rank this process is, on which driver, and the environment that the libraries below must see. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.train.network import gloo_interface

_FOREIGN = ("ACCELERATE_", "FSDP_", "DS_", "DEEPSPEED_", "PMI_", "PMIX_", "OMPI_COMM_", "MV2_COMM_")
"""Variables that accelerate and DeepSpeed obey more than its arguments; the plan decides, so they go."""


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local_rank: int


def find_place(environ: Mapping[str, str]) -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK (the supervisor, torchrun, accelerate launch), else Slurm's task variables, else one process.

    Errors: UsageError when the variables are incomplete or no numbers.
    """
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if names[0] in environ:
            try:
                return Place(*(int(environ[name]) for name in names))
            except (KeyError, ValueError) as error:
                raise UsageError(f"environment: {', '.join(names)} must all be numbers: {error}", code="rank-environment") from error
    return Place(0, 1, 0)


def prepare_environment(environ: MutableMapping[str, str], plan: Plan, place: Place) -> None:
    """Make ``environ`` say what the plan says, before torch and accelerate read it.

    Errors: UsageError when this node has no interface of the name that the site gives.
    """
    for name in [name for name in environ if name.startswith(_FOREIGN)]:
        del environ[name]
    environ["OMP_NUM_THREADS"] = environ["MKL_NUM_THREADS"] = str(plan.layout.threads_per_rank)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environ.setdefault(name, "1")
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if plan.layout.gpus_per_node == 0:
        environ["ACCELERATE_USE_CPU"] = "true"
    deepspeed = plan.preset["parallelism"].startswith("zero")
    if deepspeed:
        environ["DS_ACCELERATOR"] = "cuda" if plan.layout.gpus_per_node else "cpu"
    values = {"RANK": place.rank, "WORLD_SIZE": place.world_size, "LOCAL_RANK": place.local_rank}
    if place.world_size > 1 or deepspeed:
        environ.update({name: str(value) for name, value in values.items()})
        interface = gloo_interface(plan.site["network"], plan.site["name"], plan.layout.nodes, environ)
        if interface is not None:
            environ["GLOO_SOCKET_IFNAME"] = interface
    else:  # with LOCAL_RANK set, accelerate would start a process group of one
        for name in values:
            environ.pop(name, None)


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver of this node; None without one."""
    try:
        match = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return None
    return None if match is None else match[1]
