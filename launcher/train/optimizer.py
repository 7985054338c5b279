"""Optimizers with their parameter groups, and the learning rate as a function of the step. Formulas are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def build_optimizer(model: torch.nn.Module, training: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW, or Adafactor exactly as transformers' Trainer builds it. Weight decay on everything but biases and norms."""
    undecayed = set(_undecayed(model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if name not in undecayed], "weight_decay": training["weight_decay"]},
        {"params": [parameter for name, parameter in named if name in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training["optimizer"] == "adafactor":
        from transformers.optimization import Adafactor  # here, because it imports the Trainer and peft: 2 s

        return Adafactor(groups, lr=training["learning_rate"], scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(
        groups, lr=training["learning_rate"], betas=(training["adam_beta1"], training["adam_beta2"]), eps=training["adam_epsilon"]
    )


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
