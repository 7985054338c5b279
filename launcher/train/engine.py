"""The model, its optimizer and accelerate's wrapping of both, as the loop uses them: a loss, a backward pass, an update.

DDP averages gradients over the ranks. Losses here are shares of the step's sum, so each is multiplied by the world size first, and
the average becomes the sum. accelerate is given accumulation 1 and no loader: it would rescale and even out ranks.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.train.batches import NO_TARGET, MicroBatch, dummy
from launcher.train.borders import Form, borders, form_for, require_borders
from launcher.train.model import input_device, load_model
from launcher.train.optimizer import build_optimizer
from launcher.train.ranks import Ranks


@dataclass(frozen=True)
class Engine:
    accelerator: Accelerator
    model: Any
    """The model itself: names, weights, saving."""
    wrapped: Any
    """What is called: the model in DDP where there are several ranks."""
    optimizer: Any
    """accelerate's wrapping of the optimizer."""
    form: Form
    world_size: int

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Cross-entropy summed over the batch's targets, a scalar in fp32."""
        device = input_device(self.model)
        arguments: dict[str, Any] = {"input_ids": batch.input_ids_BS.to(device), "use_cache": False}
        if batch.attention_mask_BS is not None:
            arguments["attention_mask"] = batch.attention_mask_BS.to(device)
        if batch.position_ids_BS is not None:
            arguments["position_ids"] = batch.position_ids_BS.to(device)
        with borders(self.model, self.form, batch.documents_BS) as kept_apart:
            logits_BSV = self.wrapped(**arguments, **kept_apart).logits
        targets_BS = batch.targets_BS.to(logits_BSV.device)
        return torch.nn.functional.cross_entropy(
            logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="sum", ignore_index=NO_TARGET
        )

    def backward(self, batch: MicroBatch, step_targets: int, *, last: bool) -> torch.Tensor:
        """Add this micro batch's share of the step's gradient; ranks exchange it in the ``last`` micro step.

        Returns the micro batch's loss sum, float64, on the input's device, not waited for.
        """
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            loss_sum = self.loss_sum(batch)
            self.accelerator.backward(loss_sum * (self.world_size / step_targets))
        return loss_sum.detach().to(input_device(self.model), torch.float64)

    def update(self, rate: float, max_grad_norm: float) -> float:
        """One optimizer step. Returns the 2-norm of the whole gradient before clipping; 0 for ``max_grad_norm`` clips nothing."""
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(grad_norm)

    def settle(self) -> None:
        """A throw-away backward pass. DDP rebuilds its buckets after the first one of a process, which changes the order of
        summation: without this the first step of a resumed life would differ in the last bit.
        """
        self.backward(dummy(), 1, last=True)
        self.optimizer.zero_grad(set_to_none=True)


def build_engine(plan: Plan, folder: str, ranks: Ranks) -> Engine:
    """Errors: UsageError when accelerate made something else of the plan; what loading the model raises."""
    training = plan.preset["training"]
    model = load_model(plan, folder, ranks)
    accelerator = Accelerator(
        cpu=plan.layout.gpus_per_node == 0,
        mixed_precision={"fp32": "no"}.get(training["dtype"], training["dtype"]),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    split = plan.preset["parallelism"] == "device_map"
    with warnings.catch_warnings():  # torch 2.13 renames an argument that accelerate knows by its old name only
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = accelerator.prepare_model(model, device_placement=not split)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, training))
    _require_as_planned(plan, accelerator, wrapped)
    form = form_for(model.config.model_type, plan.attention)
    if plan.preset["data"]["packing"] == "flatten":
        require_borders(model, form, input_device(model))
    return Engine(accelerator, model, wrapped, optimizer, form, ranks.world_size)


def reseed(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Randomness (dropout) as a function of where we are, so that a resume needs no saved state."""
    state = np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)  # torch takes 63 bits on every version


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
