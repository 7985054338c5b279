"""Training in pure bf16: an optimizer's arithmetic in fp32, its results rounded to bf16 at random, up or down in proportion.

Rounded to nearest, most updates vanish: a bf16 weight has 8 bits, and at a rate of 3e-5 two thirds of them stay where they are in a step.
Rounded stochastically they arrive on average, and no second copy of the weights is needed. Which bits: Gupta et al., arXiv 1502.02551.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

ROUNDINGS = "roundings"
"""Entry of a parameter's optimizer state: how often it was rounded, so that a resumed run draws the same noise."""


class StochasticRounding(torch.optim.Optimizer):
    """``inner`` as it is for fp32 parameters; of bf16 ones weights and moments are computed in fp32 and kept in bf16.

    One parameter after the other, so that fp32 copies of no more than one are there. The noise is a function of seed, update and parameter,
    the same on every rank.
    """

    def __init__(self, inner: torch.optim.Optimizer, seed: int) -> None:
        self.inner, self.seed = inner, seed
        self.defaults = inner.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop gives none"
        members = [list(group["params"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = []
            number = 0
            for group, parameters in zip(self.param_groups, members):
                for parameter in parameters:
                    number += 1
                    group["params"] = [parameter]
                    if parameter.grad is not None:
                        self._update(parameter, number)
                group["params"] = []
        finally:
            for group, parameters in zip(self.param_groups, members):
                group["params"] = parameters

    def _update(self, parameter: torch.nn.Parameter, number: int) -> None:
        if parameter.dtype != torch.bfloat16:
            self.inner.step()
            return
        kept, gradient, state = parameter.data, parameter.grad, self.state[parameter]
        assert gradient is not None
        rounded_before = int(state.pop(ROUNDINGS, 0))
        moments = [name for name, value in state.items() if _is_moment(value, kept)]
        for name in moments:
            state[name] = state[name].float()
        parameter.grad = None
        parameter.data = kept.float()
        parameter.grad = gradient.float()
        self.inner.step()
        noise = torch.Generator(kept.device)
        noise.manual_seed(int(np.random.SeedSequence([self.seed, rounded_before, number]).generate_state(1, np.uint64)[0]) >> 1)
        state = self.state[parameter]
        for name in [name for name, value in state.items() if _is_moment(value, kept)]:
            state[name] = rounded(state[name], noise)
        state[ROUNDINGS] = rounded_before + 1
        kept.copy_(rounded(parameter.data, noise))
        parameter.grad = None
        parameter.data = kept
        parameter.grad = gradient


def rounded(values: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """fp32 → bf16, up with the probability of the part that is cut off. What bf16 can hold stays, and so do infinities and NaN."""
    bits = values.contiguous().view(torch.int32)
    dither = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=noise)
    up = bits.add(dither).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), up, values.to(torch.bfloat16))


def _is_moment(value: Any, weights: torch.Tensor) -> bool:
    """A tensor as large as the weights, of matrices only: factored moments, vectors and 8-bit ones are small as they are."""
    if not isinstance(value, torch.Tensor) or weights.dim() < 2:
        return False
    return value.shape == weights.shape and value.dtype in (torch.float32, torch.bfloat16)
