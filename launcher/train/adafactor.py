"""Adafactor on parameters sharded by rows, factored as on one process: Shazeer and Stern, 2018 (arXiv 1804.04235), algorithms 4 and 5.

As transformers' Trainer builds it: no relative step, no scaling by the parameter, no first moment, update clipped at rms 1. State has the
names that transformers' has. Not for parameters of more than two dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor, Replicate

from launcher.errors import UsageError

DECAY_RATE = -0.8
"""The second moment's decay is 1 − step ** DECAY_RATE (section 7.2)."""
EPSILON = 1e-30
"""Added to squared gradients (section 3.2)."""
CLIP_RMS = 1.0
"""An update of a larger root mean square is scaled down to it (section 6)."""


class ShardedAdafactor(torch.optim.Optimizer):
    """Two all-reduces a step, whatever the number of parameters: column sums with row totals, then squares of updates.

    Updates are computed twice, the first time for their rms only, so that no more than one is held. Parameters: DTensors with
    ``Shard(0)`` on the mesh of ``group``.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], rate: float, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(groups, {"lr": rate, "weight_decay": 0.0})
        self._group = group
        for parameter in self._parameters():
            if parameter.dim() > 2:
                message = f"a parameter of shape {tuple(parameter.shape)}: only matrices and vectors are factored over ranks"
                raise UsageError(message, code="adafactor", key="training.optimizer", hint="optimizer: adamw, or parallelism: ddp")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is computed before"
        moved = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if not moved:
            return
        totals = self._sum_over_ranks([total for parameter in moved for total in self._second_moments(parameter)])
        for parameter in moved:
            if parameter.dim() == 2:
                state, columns, row_total = self.state[parameter], totals.pop(0), totals.pop(0)
                rows = parameter.shape[0]
                _local(state["exp_avg_sq_col"]).mul_(state["decay"]).add_(columns / rows, alpha=1 - state["decay"])
                state["row_mean"] = row_total / rows
        squares = self._sum_over_ranks([self._update(parameter).square().sum()[None] for parameter in moved])
        for parameter, square in zip(moved, squares):
            rms = (square / parameter.numel()).sqrt()
            self._apply(parameter, self._update(parameter).div_((rms / CLIP_RMS).clamp_(min=1.0)))
            for passing in ("decay", "row_mean"):
                self.state[parameter].pop(passing, None)

    def _parameters(self) -> list[DTensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _second_moments(self, parameter: DTensor) -> list[torch.Tensor]:
        """Take in the gradient as far as this rank can; what must be summed over the ranks for the rest: of a matrix its column sums of
        squares, and the sum of its row means.
        """
        state, gradient = self.state[parameter], _local(parameter.grad)
        if not state:
            state["step"] = 0
            if parameter.dim() == 2:
                state["exp_avg_sq_row"] = torch.zeros_like(parameter[:, 0])
                state["exp_avg_sq_col"] = _replicated(torch.zeros(parameter.shape[1], device=gradient.device), parameter)
            else:
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        decay = state["decay"] = 1.0 - math.pow(state["step"], DECAY_RATE)
        squares = gradient.square().add_(EPSILON)
        if parameter.dim() == 1:
            _local(state["exp_avg_sq"]).mul_(decay).add_(squares, alpha=1 - decay)
            return []
        row = _local(state["exp_avg_sq_row"]).mul_(decay).add_(squares.mean(dim=1), alpha=1 - decay)
        return [squares.sum(dim=0), row.sum()[None]]

    def _update(self, parameter: DTensor) -> torch.Tensor:
        """This rank's part of gradient ÷ root of the second moment."""
        state, gradient = self.state[parameter], _local(parameter.grad)
        if parameter.dim() == 1:
            return _local(state["exp_avg_sq"]).rsqrt().mul_(gradient)
        row = (_local(state["exp_avg_sq_row"]) / state["row_mean"]).rsqrt_()
        return torch.mul(row[:, None], _local(state["exp_avg_sq_col"]).rsqrt()[None, :]).mul_(gradient)

    def _apply(self, parameter: DTensor, update: torch.Tensor) -> None:
        group = next(group for group in self.param_groups if any(parameter is member for member in group["params"]))
        values = _local(parameter)
        if group["weight_decay"]:
            values.add_(values, alpha=-group["weight_decay"] * group["lr"])
        values.add_(update, alpha=-group["lr"])

    def _sum_over_ranks(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        if not parts:
            return []
        total = torch.cat(parts)
        torch.distributed.all_reduce(total, group=self._group)
        return list(torch.split(total, [len(part) for part in parts]))


def _local(tensor: Any) -> torch.Tensor:
    local = tensor.to_local()
    assert isinstance(local, torch.Tensor)
    return local


def _replicated(tensor: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
