"""The kinds of attention as transformers knows them: a plan's kind → what the model is loaded with, or a refusal. Not their masks
(``borders``) and not the proof that a model computes with the kind it was loaded for (``watch``).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers

from launcher.errors import GateError
from launcher.plan import Plan
from launcher.train.blocks import attend_each
from launcher.train.xformers_attention import attend_blocks, take_blocks

TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5
"""Models bring a class for each kind instead of looking a function up, and read masks in ways of their own."""

_LIBRARIES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "xformers": "xformers"}
_IN_TRANSFORMERS_5 = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash2": "flash_attention_2",
    "flash3": "flash_attention_3",
    "xformers": "launcher_xformers",
    "flex": "launcher_flex_attention",
}
_EACH_BLOCK = "launcher_sdpa"
_IN_TRANSFORMERS_4 = {"eager": "eager", "sdpa": "sdpa", "flash2": "flash_attention_2", "xformers": "sdpa"}
"""xformers: loaded as sdpa, whose classes are replaced by ours afterwards (``fit_attention``)."""


def by_blocks(plan: Plan) -> bool:
    """Whether sdpa goes over the documents of a row one by one. Compiled layers cannot: each row's borders would be code of their own."""
    packing, training = plan.preset["data"]["packing"], plan.preset["training"]
    return plan.attention == "sdpa" and packing in ("flatten", "documents") and training["compile"] == "none" and not TRANSFORMERS_4


def attention_name(kind: str, config: Any, *, by_blocks: bool = False) -> str:
    """``attn_implementation`` for ``from_pretrained``. Errors: GateError where model, library or version cannot do the kind.

    The planner has refused all of it already; this is for images that nobody looked into, and for libraries that would go on in silence
    with something else (transformers takes a kernel from the hub where flash-attn is missing).
    """
    problem = _problem(kind, config)
    if problem is not None:
        raise GateError(problem, code="attention", key="attention", hint="attention: sdpa")
    if TRANSFORMERS_4:
        return _IN_TRANSFORMERS_4[kind]
    from transformers import AttentionInterface

    # They get their masks as arguments, made in ``borders``. No mask function is registered for them, so that transformers makes none.
    AttentionInterface.register(_IN_TRANSFORMERS_5["xformers"], attend_blocks)
    AttentionInterface.register(_IN_TRANSFORMERS_5["flex"], attend_flex)
    AttentionInterface.register(_EACH_BLOCK, attend_each)
    return _EACH_BLOCK if by_blocks else _IN_TRANSFORMERS_5[kind]


def fit_attention(model: torch.nn.Module, kind: str) -> None:
    """What is left to do after loading: xformers in transformers 4, which has no entry for it."""
    if TRANSFORMERS_4 and kind == "xformers":
        take_blocks(model)


def attend_flex(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **arguments: Any
) -> tuple[torch.Tensor, Any]:
    """transformers' flex attention (B H S D → B S H D) with a block mask of ours, without which it would look everywhere."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward

    assert isinstance(attention_mask, BlockMask), "every forward pass goes through borders()"
    # under autocast the rotary tables, which are fp32, leave queries and keys in fp32 beside half values
    query, key = query.to(value.dtype), key.to(value.dtype)
    output, rest = flex_attention_forward(module, query, key, value, attention_mask, **arguments)
    return output, rest


def attention_dropout(config: Any) -> float:
    return float(getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0)


def _problem(kind: str, config: Any) -> str | None:
    known = _IN_TRANSFORMERS_4 if TRANSFORMERS_4 else _IN_TRANSFORMERS_5
    if kind not in known:
        return f"transformers {transformers.__version__} has no {kind}"
    library = _LIBRARIES.get(kind)
    if library is not None and importlib.util.find_spec(library) is None:
        return f"{kind} needs the Python package {library}, which is not installed here"
    if kind == "flex" and config.model_type == "gpt_bigcode":
        return "gpt_bigcode has no flex attention in transformers"
    if kind in ("flex", "flash3") and attention_dropout(config) > 0:
        return f"{kind} has no dropout, this model's attention has {attention_dropout(config)}"
    return None
