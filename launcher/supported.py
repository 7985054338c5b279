"""What planning, staging and training must agree on: what the training runs, which files are a tokenizer, where LoRA goes by default.

Not what a GPU, a driver or a stack can do: that is ``launcher.hardware.compatibility``. Standard library only (Python 3.9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXECUTED: Mapping[str, tuple[str, ...]] = {
    "parallelism": ("single", "ddp", "fsdp", "zero1", "zero2", "zero3", "device_map"),
    "attention": ("eager", "sdpa", "flash2", "flash3", "xformers", "flex"),
    "data.packing": ("none", "flatten", "documents", "concatenate"),
    "training.dtype": ("fp32", "bf16", "bf16_pure", "fp16"),
    "training.optimizer": ("adamw", "adamw_fused", "adamw_8bit", "adafactor"),
    "training.cross_entropy": ("plain", "chunked", "fused"),
    "adapter": ("none", "lora", "rslora", "dora", "qlora"),
    "offload": ("none", "optimizer", "all"),
}
"""Key of the preset → the values that the training runs. It refuses every other one, and so does ``submit`` before anything queues."""


SHARDED = ("fsdp", "zero1", "zero2", "zero3")
"""Kinds of parallelism in which ranks hold different parts of the training's state."""

OFFLOADS: Mapping[str, tuple[str, ...]] = {
    "fsdp": ("none", "all"),
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "all"),
}
"""Parallelism → what it can offload; nothing where it is not named."""


@dataclass(frozen=True)
class Refusal:
    code: str
    message: str
    key: str
    hint: str


def sharding_refusal(preset: Mapping[str, Any]) -> Refusal | None:
    """Why what a resolved preset chooses does not go with how it shares the state out over ranks; None where it does."""
    kind, optimizer, offload = preset["parallelism"], preset["training"]["optimizer"], preset["offload"]
    if kind.startswith("zero") and optimizer == "adafactor":
        message = "DeepSpeed flattens parameters: Adafactor has nothing to factor then, saves no memory and gives other results"
        return Refusal("optimizer-not-sharded", message, "training.optimizer", "parallelism: fsdp, or optimizer: adamw")
    if kind in SHARDED and optimizer == "adamw_8bit":
        message = f"bitsandbytes' 8-bit AdamW knows whole tensors only, {kind} shards them"
        return Refusal("optimizer-not-sharded", message, "training.optimizer", "optimizer: adamw, whose state is sharded")
    if kind in SHARDED and preset["training"]["dtype"] == "bf16_pure":
        message = f"weights in bf16 are rounded stochastically, which {kind}'s shards are not"
        return Refusal("dtype-not-sharded", message, "training.dtype", "dtype: bf16, whose fp32 weights are sharded")
    if kind in SHARDED and preset["training"]["dtype"] == "fp16":
        message = f"loss scaling is not here yet with {kind}"
        return Refusal("dtype-not-sharded", message, "training.dtype", "dtype: bf16, or parallelism: ddp")
    if offload != "none" and kind not in OFFLOADS:
        message = f"{kind} keeps everything on the GPUs"
        return Refusal("offload-not-sharded", message, "offload", "offload: none, or parallelism: zero2, zero3 or fsdp")
    if offload != "none" and offload not in OFFLOADS[kind]:
        shards = "offloads weights and optimizer state together" if kind == "fsdp" else "does not shard the weights"
        return Refusal("offload-not-sharded", f"{kind} {shards}", "offload", f"offload: {OFFLOADS[kind][1]}")
    return None


def choices(preset: Mapping[str, Any], attention: str) -> dict[str, str]:
    """What a resolved preset chooses, by the keys of ``EXECUTED``. ``attention``: the plan's, in the place of ``auto``."""
    training, adapter = preset["training"], preset["adapter"]
    return {
        "parallelism": preset["parallelism"],
        "attention": attention,
        "data.packing": preset["data"]["packing"],
        "training.dtype": training["dtype"],
        "training.optimizer": training["optimizer"],
        "training.cross_entropy": training["cross_entropy"],
        "adapter": adapter if isinstance(adapter, str) else adapter["kind"],
        "offload": preset["offload"],
    }


TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
"""Fetched with a model, hashed, and copied beside the final one."""

LORA_TARGETS: Mapping[str, tuple[str, ...]] = {
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "gpt_bigcode": ("c_attn", "c_proj", "c_fc"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""``model_type`` → linear layers of a decoder layer that get an adapter where ``adapter.targets`` names none: all of them."""

SAVEABLE_MODULES: Mapping[str, Mapping[str, str]] = {
    "starcoder2": {
        "embed_tokens": "embedding", "lm_head": "head", "norm": "norm", "input_layernorm": "layer norm",
        "post_attention_layernorm": "layer norm",
    },
    "gpt_bigcode": {
        "wte": "embedding", "wpe": "positions", "lm_head": "head", "ln_f": "norm", "ln_1": "layer norm", "ln_2": "layer norm",
    },
    "llama": {
        "embed_tokens": "embedding", "lm_head": "head", "norm": "norm", "input_layernorm": "layer norm",
        "post_attention_layernorm": "layer norm",
    },
}  # fmt: skip
"""``model_type`` → modules that ``adapter.modules_to_save`` may name, and what each is."""

_PACKED = "weights in 4 bits are bytes, which are neither cut over ranks nor gathered"
_ACROSS = "its norms read whole weights outside the layers that gather them"
ADAPTER_NOT_WITH: Mapping[str, Mapping[str, str]] = {
    "qlora": {
        "fsdp": _PACKED, "zero1": _PACKED, "zero2": _PACKED, "zero3": _PACKED,
        "device_map": "layers are split over the GPUs by their size in fp32",
    },
    "dora": {"zero3": _ACROSS},
}  # fmt: skip
"""Kind of adapter → parallelism that it is not run with, and why."""

NOT_QUANTISED = ("lm_head",)
"""Linear layers that qlora leaves as they are: the head, whose errors nothing after it corrects (and which may be the embedding)."""


def lora_arguments(adapter: Mapping[str, Any], targets: Sequence[str], modules_to_save: Sequence[str]) -> dict[str, Any]:
    """A preset's adapter in the words of peft's ``LoraConfig``."""
    return {
        "r": adapter["rank"],
        "lora_alpha": adapter["alpha"],
        "lora_dropout": adapter["dropout"],
        "target_modules": list(targets),
        "modules_to_save": list(modules_to_save) or None,
        "use_rslora": adapter["kind"] == "rslora",
        "use_dora": adapter["kind"] == "dora",
        "task_type": "CAUSAL_LM",
    }
