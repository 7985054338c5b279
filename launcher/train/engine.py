"""An engine: the model, its optimizer and how ranks share them, as the loop uses it: a loss, a backward pass, an update.

Losses are shares of the step's sum and never means, whatever the ranks or libraries would make of them. One module for each kind:
``engine_plain`` (one process, DDP, split over GPUs), ``engine_fsdp``, ``engine_zero``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.plan import Plan
from launcher.train.batches import MicroBatch
from launcher.train.borders import Form, borders
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.model import input_device
from launcher.train.pieces import Piece, Read, whole_piece
from launcher.train.ranks import Ranks

Numbers = dict[str, dict[str, float]]
"""Parameter → plain numbers of its optimizer state, such as Adafactor's step."""

_DERIVED = frozenset({"RMS", "qmap1", "qmap2"})
"""Optimizer state that is computed anew before it is used (transformers' Adafactor), or constant and shared (bitsandbytes' tables)."""


@dataclass(frozen=True)
class Engine(ABC):
    model: Any
    """The model itself: names, weights, saving."""
    wrapped: Any
    """What is called: the model, or what the library put around it."""
    optimizer: Any
    """A torch optimizer, or what the library put around it."""
    form: Form
    loss: CrossEntropy
    rank: int
    world_size: int

    @property
    def scaler(self) -> Any:
        """The loss scaler of fp16; None without."""
        return None

    @property
    def sharded(self) -> bool:
        """Whether ranks hold different parts of weights or optimizer state."""
        return False

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Cross-entropy summed over the batch's targets, a scalar in fp32."""
        device = input_device(self.model)
        arguments: dict[str, Any] = {"input_ids": batch.input_ids_BS.to(device), "use_cache": False}
        if batch.position_ids_BS is not None:
            arguments["position_ids"] = batch.position_ids_BS.to(device)
        rows, length = batch.input_ids_BS.shape
        with borders(self.model, self.form, batch.documents_BS, batch.attention_mask_BS, (rows, length)) as kept_apart:
            return self.loss.sum(lambda: self.wrapped(**arguments, **kept_apart).logits, batch.targets_BS)

    @abstractmethod
    def backward(self, batch: MicroBatch, step_targets: int, *, last: bool) -> torch.Tensor:
        """Add this micro batch's share of the step's gradient; every rank calls it equally often. ``last``: the step's last.

        Returns the micro batch's loss sum, float64, on the input's device, not waited for.
        """

    @abstractmethod
    def update(self, rate: float, max_grad_norm: float) -> float:
        """One optimizer step. Returns the 2-norm of the whole gradient before clipping; 0 for ``max_grad_norm`` clips nothing."""

    @abstractmethod
    def settle(self) -> None:
        """Whatever the first step of a life would do otherwise than a later one is done now."""

    @property
    @abstractmethod
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what is put around it."""

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name → parameter; tied ones once."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def piece(self, tensor: torch.Tensor) -> Piece:
        """What this rank holds of one of its tensors."""
        return whole_piece(tensor, written=self.rank == 0)

    def weights(self) -> dict[str, Piece]:
        """The trained parameters, live: writing into a piece changes the model (call ``weights_changed`` then)."""
        return {name: self.piece(parameter.detach()) for name, parameter in self.trained_parameters().items()}

    def weights_changed(self) -> None:
        """After pieces of weights were written into."""
        return

    def optimizer_state(self) -> tuple[dict[str, Piece], Numbers]:
        """``parameter/entry`` → tensor of the optimizer's state, live as weights are; and its plain numbers."""
        pieces: dict[str, Piece] = {}
        numbers: Numbers = {}
        for name, parameter in self.trained_parameters().items():
            for key, value in self.torch_optimizer.state.get(parameter, {}).items():
                if key in _DERIVED:
                    continue
                if isinstance(value, torch.Tensor):
                    pieces[f"{name}/{key}"] = self.piece(value)
                else:
                    numbers.setdefault(name, {})[key] = value
        return pieces, numbers

    def create_optimizer_state(self) -> None:
        """An update that changes nothing, since optimizers create their state in the first one."""
        optimizer = self.torch_optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate

    def set_numbers(self, numbers: Mapping[str, Mapping[str, float]]) -> None:
        """Plain numbers of the optimizer's state, as ``optimizer_state`` gave them."""
        for name, parameter in self.trained_parameters().items():
            self.torch_optimizer.state[parameter].update(numbers.get(name, {}))

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def build_engine(plan: Plan, folder: str, ranks: Ranks, deepspeed_file: Path) -> Engine:
    """``folder``: the staged model. ``deepspeed_file``: its configuration, read for ZeRO only.

    Errors: UsageError when a library made something else of the plan; what loading the model raises."""
    parallelism = plan.preset["parallelism"]
    if parallelism == "fsdp":
        from launcher.train.engine_fsdp import build_fsdp  # here, because not every stack can import it

        return build_fsdp(plan, folder, ranks)
    if parallelism.startswith("zero"):
        from launcher.train.engine_zero import build_zero  # here, because not every stack has DeepSpeed

        return build_zero(plan, folder, ranks, deepspeed_file)
    from launcher.train.engine_plain import build_plain

    return build_plain(plan, folder, ranks)


def fill(pieces: Mapping[str, Piece], read: Read) -> None:
    """Write what ``read`` gives into live pieces."""
    with torch.no_grad():
        for name, piece in pieces.items():
            if piece.tensor.numel():
                piece.tensor.copy_(read(name, piece.start, piece.tensor.numel()).view(piece.tensor.shape))


def reseed(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Randomness (dropout) as a function of where we are, so that a resume needs no saved state."""
    state = np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)  # torch takes 63 bits on every version
