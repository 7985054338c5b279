"""The model as it is trained: loaded from the staged folder in fp32, on its device or split over them, with an adapter where asked for."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.supported import LORA_TARGETS
from launcher.train.ranks import Ranks
from launcher.train.split import device_split, weight_budget

LOG = logging.getLogger("launcher.train")


def load_model(plan: Plan, folder: str, ranks: Ranks) -> Any:
    """A transformers model, or a peft model around one. Weights are fp32 whatever the training's dtype: that is the master copy."""
    training, adapter = plan.preset["training"], plan.preset["adapter"]
    transformers.utils.logging.disable_progress_bar()  # logs are files
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and training["sequence_length"] > longest:
        message = f"{training['sequence_length']} is longer than the model's {longest} positions"
        raise UsageError(message, code="too-long", key="training.sequence_length")
    window = getattr(config, "sliding_window", None)
    if plan.preset["data"]["packing"] == "flatten" and window is not None and training["sequence_length"] > window:
        message = f"flatten does not apply the model's sliding window of {window}"
        raise UsageError(message, code="not-here-yet", key="data.packing", hint="packing: none, or a sequence_length within the window")
    precision = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    arguments: dict[str, Any] = {precision: torch.float32, "attn_implementation": plan.attention}
    if plan.preset["parallelism"] == "device_map":
        arguments["device_map"] = _device_map(plan, config)
        LOG.info("device map: %s", arguments["device_map"])
    elif ranks.device.type == "cuda":
        arguments["device_map"] = {"": ranks.device.index}  # straight to the GPU: the ranks of a node do not fill its RAM with copies
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True, **arguments)
    if training["activation_checkpointing"] == "full":
        # transformers 5 renames it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if adapter != "none":
        model = _with_lora(model, adapter, training["seed"])
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


def _with_lora(model: Any, adapter: dict[str, Any], seed: int) -> Any:
    from peft import LoraConfig, get_peft_model  # slow to import, and not every stack has it

    targets = adapter["targets"] or LORA_TARGETS.get(model.config.model_type)
    if targets is None:
        message = f"no default LoRA targets for {model.config.model_type}"
        raise UsageError(message, code="lora-targets", key="adapter.targets", hint="name the linear layers, e.g. [q_proj, v_proj]")
    torch.manual_seed(seed)  # the same adapter on every rank, and again in a life that starts anew
    config = LoraConfig(
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(str(error).split("\n")[0], code="lora-targets", key="adapter.targets") from error
