"""The proof that a model computes with the attention of the plan: which operators a forward pass really calls, whatever configs say.

Done at the start of every life in the shape of a micro batch's row, so that libraries choose as they will in training. Wrapped operators
are put back before training begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.errors import GateError
from launcher.plan import Plan
from launcher.train import xformers_attention
from launcher.train.attention import TRANSFORMERS_4
from launcher.train.borders import Form, borders, require_borders
from launcher.train.model import input_device

BACKENDS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "overrideable",
}
"""torch's operators behind ``scaled_dot_product_attention`` → backend; none of them: math."""


@dataclass(frozen=True)
class Ran:
    """What a forward pass computed attention with."""

    layers: int
    """Each has called the plan's kind, and nothing else."""
    operators: tuple[str, ...]
    """Below it: sdpa's backend (flash, efficient, cudnn, math), or the names of a library's operators."""


def prove(plan: Plan, model: Any, form: Form) -> Ran:
    """Collective; before layers are compiled, whose code would have the wrapped operators in it.

    Errors: GateError when the model computes with something else than planned, or does not keep documents apart.
    """
    training, packing = plan.preset["training"], plan.preset["data"]["packing"]
    length = training["sequence_length"]
    ran = require_attention(model, plan.attention, form, length, packing)
    if packing in ("flatten", "documents"):
        require_borders(model, form, input_device(model), length)
    return ran


@torch.no_grad()
def require_attention(model: Any, kind: str, form: Form, length: int, packing: str) -> Ran:
    """Run one row and see that every layer computes with ``kind`` and nothing else. Errors: GateError."""
    device = input_device(model)
    tokens_BS = torch.ones(1, length, dtype=torch.int64, device=device)
    arguments: dict[str, Any] = {"input_ids": tokens_BS, "use_cache": False}
    documents_BS = attention_mask_BS = None
    half = length // 2
    if packing in ("flatten", "documents"):
        documents_BS = (torch.arange(length) >= half).long()[None]
        arguments["position_ids"] = (torch.arange(length) - half * documents_BS).to(device)
    elif packing == "none":
        attention_mask_BS = (torch.arange(length) < max(half, 1)).long()[None]
    with watching(model) as (calls, operators), borders(model, form, documents_BS, attention_mask_BS, (1, length)) as kept_apart:
        model(**arguments, **kept_apart)
    layers = model.config.num_hidden_layers
    if calls != {kind: layers}:
        found = ", ".join(f"{name} in {number} layers" for name, number in sorted(calls.items())) or "none that is known"
        message = f"the plan says {kind} in all {layers} layers, the model computes with {found}"
        raise GateError(message, code="attention", key="attention", hint="another attention, or another stack")
    return Ran(layers, tuple(sorted(operators)))


@contextmanager
def watching(model: torch.nn.Module) -> Iterator[tuple[Counter[str], set[str]]]:
    """Counts layers by kind, and names what they called. A layer that calls none of the operators that are known is eager."""
    calls: Counter[str] = Counter()
    operators: set[str] = set()
    within: list[set[str]] = []
    layers = [module for module in model.modules() if "Attention" in type(module).__name__]
    with ExitStack() as stack:
        for kind, owner, name in _operators(layers):
            stack.enter_context(_replaced(owner, name, _counted(getattr(owner, name), kind, within, operators)))
        for layer in layers:
            handle = layer.register_forward_pre_hook(lambda *_: within.append(set()))
            stack.callback(handle.remove)
        yield calls, operators
    for kinds in within:
        calls.update(kinds or {"eager"})


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _operators(layers: list[torch.nn.Module]) -> Iterator[tuple[str, Any, str]]:
    """Kind, and where its operator is looked up at each call."""
    yield "sdpa", torch.nn.functional, "scaled_dot_product_attention"
    yield "xformers", xformers_attention, "operator"
    if TRANSFORMERS_4:
        for owner in {type(layer) for layer in layers if hasattr(layer, "_flash_attention_forward")}:
            yield "flash2", owner, "_flash_attention_forward"
        return
    import transformers.integrations.flash_attention as flash
    import transformers.integrations.flex_attention as flex

    yield "flash", flash, "_flash_attention_forward"
    yield "flex", flex, "compile_friendly_flex_attention"


def _counted(operator: Any, kind: str, within: list[set[str]], operators: set[str]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if kind == "flex" else names:  # flex is compiled: a dispatch mode would make it run uncompiled
            result = operator(*args, **kwargs)
        # flash attention's version is the library that transformers has loaded, not what was asked for
        within[-1].add(_flash_version() if kind == "flash" else kind)
        found = {name for name in names.seen if "attention" in name or "flash" in name or "fmha" in name}
        if kind == "sdpa":
            found = {BACKENDS[name] for name in found if name in BACKENDS} or {"math"}
        operators.update(found)
        names.seen.clear()
        return result

    names = _Names()
    return counted


def _flash_version() -> str:
    import transformers.modeling_flash_attention_utils as flash

    owner = getattr(flash._flash_varlen_fn, "__module__", "")
    return {"flash_attn": "flash2", "flash_attn_interface": "flash3"}.get(owner.partition(".")[0], owner or "flash")


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that run below it, by the names that they have in torch's library."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
