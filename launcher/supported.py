"""What planning, staging and training must agree on: what the training runs, which files are a tokenizer, where LoRA goes by default.

Not what a GPU, a driver or a stack can do: that is ``launcher.hardware.compatibility``. Standard library only (Python 3.9).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXECUTED: Mapping[str, tuple[str, ...]] = {
    "parallelism": ("single", "ddp", "device_map"),
    "attention": ("eager", "sdpa"),
    "data.packing": ("none", "flatten", "concatenate"),
    "training.dtype": ("fp32", "bf16", "fp16"),
    "training.optimizer": ("adamw", "adafactor"),
    "training.cross_entropy": ("plain",),
    "adapter": ("none", "lora"),
    "offload": ("none",),
}
"""Key of the preset → the values that the training runs. It refuses every other one, and so does ``submit`` before anything queues."""


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
