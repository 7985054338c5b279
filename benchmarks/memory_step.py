"""The step that is measured: the model as the training builds it, our engine and optimizer, two optimizer steps. On any device."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32

from benchmarks.memory_cases import Case, preset_of
from launcher.preset.model import ModelFacts
from launcher.supported import LORA_TARGETS
from launcher.train.batches import MicroBatch
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.engine_plain import PlainEngine
from launcher.train.layers import checkpoint_activations
from launcher.train.optimizer import build_optimizer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(case: Case, facts: ModelFacts) -> Any:
    """On torch's default device, with whatever weights that gives; as ``launcher.train.model`` leaves it."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(facts), attn_implementation=case.attention, dtype=torch.float32)
    model.tie_weights()
    checkpoint_activations(model, preset_of(case).training.activation_checkpointing)
    if case.lora_rank:
        import peft

        targets = list(case.lora_targets or LORA_TARGETS[facts.architecture])
        lora = peft.LoraConfig(r=case.lora_rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    return model.train()


def build_engine(case: Case, model: Any) -> PlainEngine:
    """With autocast as accelerate's ``prepare_model`` wraps it, and what else the engine asks of accelerate."""
    if case.dtype in _DTYPES:
        forward = torch.autocast("cuda", dtype=_DTYPES[case.dtype])(model.forward.__func__)
        model.forward = MethodType(convert_outputs_to_fp32(forward), model)
    training = preset_of(case).training.model_dump()
    optimizer = build_optimizer(model, training)
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = True  # torch's default on a GPU, which it does not take for fake tensors
    return PlainEngine(model, model, optimizer, "additive", CrossEntropy(model, training["cross_entropy"]), 0, 1, _Accelerator())


def take_steps(case: Case, engine: PlainEngine, batch: Callable[[int], MicroBatch], phase: Callable[[str], None]) -> None:
    """Two optimizer steps, so that the second meets the optimizer's state. ``phase`` is told what comes next, "" after each pass."""
    for _ in range(2):
        for _ in range(case.micro_steps):
            phase("forward")
            loss = engine.loss_sum(batch(case.micro_batch))
            phase("backward")
            engine.accelerator.backward(loss)
            del loss
            phase("")
        phase("update")
        engine.update(1e-5, 1.0)
        if case.evaluation:
            phase("evaluation")
            engine.model.eval()
            with torch.no_grad():
                engine.loss_sum(batch(case.evaluation))
            engine.model.train()
            phase("")


class _Accelerator:
    """accelerate without its search for devices."""

    scaler = None

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, norm: float) -> float:
        torch.nn.utils.clip_grad_norm_(list(parameters), norm, foreach=True)
        return 0.0  # the norm of fake tensors has no value


def config_of(facts: ModelFacts) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    if facts.architecture == "gpt_bigcode":
        return transformers.GPTBigCodeConfig(
            vocab_size=facts.vocab, n_embd=facts.hidden, n_layer=facts.layers, n_head=facts.heads, n_inner=facts.intermediate,
            n_positions=facts.context, multi_query=facts.kv_heads == 1, **ids,
        )  # fmt: skip
    shared = {
        "vocab_size": facts.vocab, "hidden_size": facts.hidden, "num_hidden_layers": facts.layers, "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads, "intermediate_size": facts.intermediate, "max_position_embeddings": facts.context,
        "tie_word_embeddings": facts.tied, **ids,
    }  # fmt: skip
    if facts.architecture == "llama":
        return transformers.LlamaConfig(**shared)
    rate = 0.1 if facts.dropout else 0.0
    return transformers.Starcoder2Config(**shared, attention_dropout=rate, residual_dropout=rate, embedding_dropout=rate)
