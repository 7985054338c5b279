"""``device_map``: which layer lives on which GPU of the only node. Computed from a config, without weights and without GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from transformers import AutoModelForCausalLM

from launcher.errors import GateError

_STATE_PER_WEIGHT = {"adamw": 4.0, "adamw_fused": 4.0, "adamw_8bit": 2.5, "adafactor": 2.0}
"""Bytes on a GPU for each byte of trained weights: weights, gradients and AdamW's two moments (Adafactor's are
factored)."""
_FOR_ACTIVATIONS = 0.1


def weight_budget(gpu_bytes: float, optimizer: str, adapter: bool) -> int:
    """How many bytes of weights a GPU of ``gpu_bytes`` may hold, so that gradients and optimizer state find room."""
    return int(gpu_bytes * (1 - _FOR_ACTIVATIONS) / (1.0 if adapter else _STATE_PER_WEIGHT[optimizer]))


def device_split(config: Any, budgets: Mapping[int, int]) -> dict[str, int | str]:
    """Module name → GPU, balanced over the GPUs as transformers' ``device_map="auto"`` is, in fp32; layers are never cut.

    ``budgets``: bytes of weights that each GPU may hold. Errors: GateError when they do not fit.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    whole = list(model._no_split_modules or [])
    balanced = get_balanced_memory(model, dict(budgets), no_split_module_classes=whole, dtype=torch.float32)
    split = infer_auto_device_map(model, balanced, no_split_module_classes=whole, dtype=torch.float32)
    outside = sorted(name for name, device in split.items() if not isinstance(device, int))
    if outside:
        message = f"{len(outside)} modules find no room on {len(budgets)} GPUs (the first is {outside[0]})"
        raise GateError(message, code="device-map", key="parallelism", hint="more GPUs, another optimizer, or an adapter")
    return dict(split)
