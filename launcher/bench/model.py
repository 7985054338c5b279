"""The transformers config of a model's facts, for a random start at its real shapes. Not its published config, which nobody need fetch."""

from __future__ import annotations

from typing import Any

from launcher.files import digest
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset

DROPOUT = 0.1
"""Of the published configs of starcoder2 and gpt_bigcode, on attention, residual stream and embedding."""


def config_for(preset: Preset, facts: ModelFacts) -> dict[str, Any]:
    """Arguments as ``model.config`` of a preset has them."""
    if preset.model.config is not None:
        return preset.model.config
    if facts.architecture == "gpt_bigcode":
        return {
            "model_type": "gpt_bigcode", "vocab_size": facts.vocab, "n_embd": facts.hidden, "n_layer": facts.layers, "n_head": facts.heads,
            "n_inner": facts.intermediate, "n_positions": facts.context, "multi_query": facts.kv_heads == 1,
            "tie_word_embeddings": facts.tied,
        }  # fmt: skip
    arguments: dict[str, Any] = {
        "model_type": facts.architecture, "vocab_size": facts.vocab, "hidden_size": facts.hidden, "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads, "num_key_value_heads": facts.kv_heads, "intermediate_size": facts.intermediate,
        "max_position_embeddings": facts.context, "tie_word_embeddings": facts.tied,
    }  # fmt: skip
    if facts.architecture == "starcoder2":
        rate = DROPOUT if facts.dropout else 0.0
        arguments |= {"attention_dropout": rate, "residual_dropout": rate, "embedding_dropout": rate}
    return arguments


def folder_name(config: dict[str, Any]) -> str:
    """Of the random weights, which benches of one model share."""
    return f"random-{config['model_type']}-{digest(config)[:12]}"
