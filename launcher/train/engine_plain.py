"""One process, DDP, or one process whose layers are split over GPUs: every rank holds the whole state. On accelerate.

DDP averages gradients over the ranks. Losses here are shares of the step's sum, so each is multiplied by the world size first, and
the average becomes the sum. accelerate is given accumulation 1 and no loader: it would rescale and even out ranks.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.train.attention import by_blocks
from launcher.train.batches import MicroBatch, dummy
from launcher.train.borders import form_for
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.engine import Engine
from launcher.train.model import input_device, load_model
from launcher.train.optimizer import build_optimizer
from launcher.train.ranks import Ranks


@dataclass(frozen=True)
class PlainEngine(Engine):
    """``wrapped``: the model in DDP where there are several ranks. ``optimizer``: accelerate's wrapping of it."""

    accelerator: Accelerator

    @property
    def scaler(self) -> Any:
        return self.accelerator.scaler

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def backward(self, batch: MicroBatch, step_targets: int, *, last: bool) -> torch.Tensor:
        """Ranks exchange gradients in the ``last`` micro step."""
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            loss_sum = self.loss_sum(batch)
            self.accelerator.backward(loss_sum * (self.world_size / step_targets))
        return loss_sum.detach().to(input_device(self.model), torch.float64)

    def update(self, rate: float, max_grad_norm: float) -> float:
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm or float("inf"))
        self.set_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(grad_norm)

    def settle(self) -> None:
        """A throw-away backward pass. DDP rebuilds its buckets after the first one of a process, which changes the order of
        summation: without this the first step of a resumed life would differ in the last bit.
        """
        self.backward(dummy(), 1, last=True)
        self.optimizer.zero_grad(set_to_none=True)


def build_plain(plan: Plan, folder: str, ranks: Ranks) -> PlainEngine:
    """Errors: UsageError when accelerate made something else of the plan; what loading the model raises."""
    training = plan.preset["training"]
    model = load_model(plan, folder, ranks)
    accelerator = Accelerator(
        cpu=plan.layout.gpus_per_node == 0,
        mixed_precision=training["dtype"] if training["dtype"] in ("bf16", "fp16") else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    split = plan.preset["parallelism"] == "device_map"
    with warnings.catch_warnings():  # torch 2.13 renames an argument that accelerate knows by its old name only
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = accelerator.prepare_model(model, device_placement=not split)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, training))
    _require_as_planned(plan, accelerator, wrapped)
    form = form_for(model.config.model_type, plan.attention, by_blocks=by_blocks(plan))
    loss = CrossEntropy(model, training["cross_entropy"])
    return PlainEngine(model, wrapped, optimizer, form, loss, ranks.rank, ranks.world_size, accelerator)


def _require_as_planned(plan: Plan, accelerator: Accelerator, wrapped: Any) -> None:
    """accelerate falls back in silence (two separate jobs, plain DDP): say so instead of training something else."""
    on_gpu = plan.layout.gpus_per_node > 0
    several = plan.world_size > 1
    expected = (DistributedType.MULTI_GPU if on_gpu else DistributedType.MULTI_CPU) if several else DistributedType.NO
    found: str | None = None
    if accelerator.num_processes != plan.world_size:
        found = f"{accelerator.num_processes} processes, the plan has {plan.world_size}"
    elif accelerator.distributed_type != expected:
        found = f"distributed type {accelerator.distributed_type}, the plan means {expected}"
    elif isinstance(wrapped, DistributedDataParallel) != several:
        found = f"engine {type(wrapped).__name__} for {plan.world_size} ranks"
    elif accelerator.device.type != ("cuda" if on_gpu else "cpu"):
        found = f"device {accelerator.device}"
    elif accelerator.gradient_accumulation_steps != 1:
        found = f"gradient accumulation {accelerator.gradient_accumulation_steps} of its own"
    if found is not None:
        raise UsageError(f"accelerate set up {found}", code="engine", key="parallelism")
