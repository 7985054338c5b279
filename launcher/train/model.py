"""The model as it is trained: loaded from the staged folder in fp32, on its device or split over them, with an adapter where asked for."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.train.adapter import quantisation, with_adapter
from launcher.train.attention import attention_name, by_blocks, fit_attention
from launcher.train.layers import checkpoint_activations
from launcher.train.ranks import Ranks
from launcher.train.split import device_split, weight_budget

LOG = logging.getLogger("launcher.train")


def load_model(plan: Plan, folder: str, ranks: Ranks) -> Any:
    """A transformers model, or a peft model around one. Weights are fp32 whatever the training computes in: that is the master copy.

    Only ``bf16_pure`` has none, and its weights in bf16. DeepSpeed makes its master copy of weights that it has rounded to bf16 first.
    """
    training, adapter = plan.preset["training"], plan.preset["adapter"]
    transformers.utils.logging.disable_progress_bar()  # logs are files
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and training["sequence_length"] > longest:
        message = f"{training['sequence_length']} is longer than the model's {longest} positions"
        raise UsageError(message, code="too-long", key="training.sequence_length")
    precision = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    arguments: dict[str, Any] = {
        precision: torch.bfloat16 if training["dtype"] == "bf16_pure" else torch.float32,
        "attn_implementation": attention_name(plan.attention, config, by_blocks=by_blocks(plan)),
        **quantisation(adapter, training["dtype"]),
    }
    if plan.preset["parallelism"] == "device_map":
        arguments["device_map"] = _device_map(plan, config)
        LOG.info("device map: %s", arguments["device_map"])
    elif ranks.device.type == "cuda":
        arguments["device_map"] = {"": ranks.device.index}  # straight to the GPU: the ranks of a node do not fill its RAM with copies
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True, **arguments)
    fit_attention(model, plan.attention)
    checkpoint_activations(model, training["activation_checkpointing"])
    if adapter != "none":
        model = with_adapter(model, adapter, training["seed"])
    if plan.preset["parallelism"] != "device_map":
        model.to(ranks.device)
    return model.train()


def input_device(model: Any) -> torch.device:
    """Where the model wants its input."""
    device = model.get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    return device


def _device_map(plan: Plan, config: Any) -> dict[str, int | str]:
    gpus = plan.layout.gpus_per_node
    if gpus == 0:
        return {"": "cpu"}
    adapter = plan.preset["adapter"] != "none"
    optimizer = plan.preset["training"]["optimizer"]
    sizes = {index: torch.cuda.get_device_properties(index).total_memory for index in range(gpus)}
    return device_split(config, {index: weight_budget(size, optimizer, adapter) for index, size in sizes.items()})
