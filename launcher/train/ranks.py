"""The ranks as a group: starting it, checking it against the plan, and the few things that ranks tell each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from launcher.errors import GateError, UsageError
from launcher.plan import Plan
from launcher.supported import SHARDED
from launcher.train.place import Place, nvidia_driver
from launcher.train.precision import set_matmul_precision

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in a collective: longer than rank 0 takes to write a checkpoint while the others wait."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the ranks, in float64; every rank gets the same."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        return self.sum([flag])[0] > 0

    def all(self, flag: bool) -> bool:
        return not self.any(not flag)

    def raise_together(self, failure: Exception | None, what: str) -> None:
        """Collective, after something that a rank did alone: nobody goes on when one failed, so nobody waits for it in vain.

        Errors: ``failure`` on the rank that met it, RuntimeError on the others.
        """
        if not self.all(failure is None):
            raise failure if failure is not None else RuntimeError(f"another rank could not {what}: see its log")

    def from_first(self, value: int) -> int:
        """Rank 0's value on every rank."""
        return int(self.sum([value if self.is_first else 0])[0])


def connect(plan: Plan, place: Place) -> Ranks:
    """Start the process group, prove with an all-reduce that it is the one of the plan, and check the GPUs.

    Errors: GateError when GPUs or driver are not those of the plan, UsageError when the group is not.
    """
    on_gpu = plan.layout.gpus_per_node > 0
    if on_gpu:
        _require_gpus(plan, place)
        torch.cuda.set_device(place.local_rank)
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(plan.layout.threads_per_rank)
    set_matmul_precision(plan.preset["training"]["tf32"])
    ranks = Ranks(place.rank, place.world_size, device)
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu and plan.preset["offload"] != "none" and plan.preset["parallelism"] == "fsdp":
        backend = "cpu:gloo,cuda:nccl"  # gradients lie in RAM, where their norm is summed
    if place.world_size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(f"environment: {' and '.join(missing)} not set for {place.world_size} ranks", code="rank-environment")
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, rank=place.rank, world_size=place.world_size)
    elif plan.preset["parallelism"] in SHARDED:  # which is made of collectives, also on one rank
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, rank=0, world_size=1, store=store)
    counted, ranks_sum = ranks.sum([1, place.rank])
    if counted != plan.world_size or ranks_sum != plan.world_size * (plan.world_size - 1) / 2:
        raise UsageError(f"the process group has {counted:.0f} ranks, the plan has {plan.world_size}", code="world-size")
    return ranks


def gpu_problem(layout_gpus: int, gpu: Mapping[str, Any] | None, minimum_driver: str | None, seen: Mapping[str, Any]) -> str | None:
    """What is wrong with the GPUs that a rank sees, as one line, or None.

    ``seen``: ``count``, ``memory_gib`` of the smallest, ``driver`` (None when unknown). More GPUs than planned are left alone.
    """
    if seen["count"] < layout_gpus:
        return f"this rank sees {seen['count']} GPUs, the plan has {layout_gpus} on each node (driver {seen['driver'] or 'not found'})"
    if gpu is not None and seen["memory_gib"] < 0.9 * float(gpu["memory_gib"]):
        return f"the smallest GPU has {seen['memory_gib']:.0f} GiB, the plan was made for {gpu['memory_gib']:.0f} GiB ({gpu['kind']})"
    if minimum_driver is not None and seen["driver"] is not None and _numbers(seen["driver"]) < _numbers(minimum_driver):
        return f"NVIDIA driver {seen['driver']}, this stack needs {minimum_driver} or newer"
    return None


def _require_gpus(plan: Plan, place: Place) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory_gib = min((torch.cuda.get_device_properties(index).total_memory / 2**30 for index in range(count)), default=0.0)
    seen = {"count": count, "memory_gib": memory_gib, "driver": nvidia_driver()}
    problem = gpu_problem(plan.layout.gpus_per_node, plan.hardware.get("gpu"), plan.stack.get("minimum_driver"), seen)
    if problem is None and place.local_rank >= count:
        problem = f"local rank {place.local_rank} has no GPU of its own: this node shows {count}"
    if problem is not None:
        raise GateError(problem, code="gpu", hint=f"host {os.uname().nodename}")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
