"""How decoder layers are computed: what is kept of them for the backward pass, and whether they are compiled. Not what they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from launcher.errors import UsageError
from launcher.train.attention import attention_dropout

RECOMPILE_LIMIT = 64
"""Shapes of a run: rows of a micro batch (two sizes, and two in the last step), dummies, evaluation; with and without gradients."""


def checkpoint_activations(model: Any, kind: str) -> None:
    """none; full: a layer's input is kept and the layer is computed again in the backward pass; selective: also the results of its matrix
    products and of sdpa's kernels are kept, so that only what is cheap is computed again.
    """
    if kind == "none":
        return
    # transformers 5 renames it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    arguments: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts  # torch 2.4, which the planner sees to

        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operations(model.config))
    enable(arguments)


def compile_layers(model: Any, packing: str) -> None:
    """Compile each decoder layer in place; they share their code. An error instead of a part that silently runs uncompiled.

    Rows of one length give one compilation for each number of rows; flattened ones, which have any length, one for all. Either way what a
    shape is computed with does not depend on the shapes before it, so that a resumed run is the uninterrupted one.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in decoder_layers(model):
        layer.compile(dynamic=packing == "flatten", fullgraph=True)


def require_compiled() -> int:
    """Graphs that this process has compiled, after its first step. Errors: RuntimeError when there are none."""
    from torch._dynamo.utils import counters

    graphs = int(counters["stats"]["unique_graphs"])
    if graphs == 0:
        raise RuntimeError("compile: layers was planned, and torch compiled nothing")
    return graphs


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The modules that are gathered, compiled and recomputed as one. Errors: UsageError for a model that names none."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    whole = set(base._no_split_modules or [])
    layers = [module for module in base.modules() if type(module).__name__ in whole]
    if not layers:
        message = f"{type(base).__name__} does not say what its layers are"
        raise UsageError(message, code="engine", key="parallelism", hint="parallelism: ddp, and compile: none")
    return layers


def _kept_operations(config: Any) -> list[Any]:
    """Attention that draws random numbers is computed again: left out, it would shift those of the dropout after it."""
    aten = torch.ops.aten
    kept: list[Any] = [aten.mm.default, aten.addmm.default]
    if attention_dropout(config) == 0:
        kept += [
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
        ]
    return kept
