"""Optimizers with their parameter groups, and the learning rate as a function of the step. Formulas are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from launcher.errors import UsageError
from launcher.train.rounding import StochasticRounding


def build_optimizer(model: torch.nn.Module, training: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW, or Adafactor exactly as transformers' Trainer builds it. Weight decay on everything but biases and norms.

    Weights in bf16 are rounded stochastically. Errors: UsageError when bitsandbytes is missing.
    """
    groups = parameter_groups(model, training)
    optimizer = _optimizer(groups, training)
    if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
        return StochasticRounding(optimizer, training["seed"])
    return optimizer


def parameter_groups(model: torch.nn.Module, training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trained parameters: those that decay, and the biases and norms, which do not. Groups without any are left out."""
    undecayed = set(_undecayed(model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if name not in undecayed], "weight_decay": training["weight_decay"]},
        {"params": [parameter for name, parameter in named if name in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _optimizer(groups: list[dict[str, Any]], training: Mapping[str, Any]) -> torch.optim.Optimizer:
    kind, rate = training["optimizer"], training["learning_rate"]
    if kind == "adafactor":
        from transformers.optimization import Adafactor  # here, because it imports the Trainer and peft: 2 s

        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    arguments: dict[str, Any] = {"lr": rate, "betas": (training["adam_beta1"], training["adam_beta2"]), "eps": training["adam_epsilon"]}
    if kind == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # slow to import, and not every stack has it
        except ImportError as error:
            message = f"adamw_8bit needs bitsandbytes: {error}"
            raise UsageError(message, code="library-missing", key="training.optimizer", hint="optimizer: adamw") from error
        eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **arguments)
        return eight_bit
    if kind == "adamw_fused":
        arguments["fused"] = True  # torch raises where the device has no such kernel
    return torch.optim.AdamW(groups, **arguments)


def learning_rate(step: int, total_steps: int, training: Mapping[str, Any]) -> float:
    """The rate of ``step`` (from 1). As transformers' ``get_*_schedule_with_warmup``, whose multiplier of step s is that of s − 1."""
    done, warmup = step - 1, warmup_steps(training["warmup"], total_steps)
    peak = float(training["learning_rate"])
    if done < warmup:
        return peak * (done / max(1, warmup))
    if training["schedule"] == "constant":
        return peak
    if training["schedule"] == "linear":
        return peak * max(0.0, (total_steps - done) / max(1, total_steps - warmup))
    progress = (done - warmup) / max(1, total_steps - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps when 1 or more, a share of all steps (rounded up) when below 1."""
    return int(warmup) if warmup >= 1 else math.ceil(total_steps * warmup)


def _undecayed(model: torch.nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if "bias" in name or type(module).__name__.endswith("Norm"):
                yield f"{prefix}.{name}" if prefix else name
