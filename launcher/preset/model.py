"""Facts of a model that a plan needs before the model is there. ``presets/models/<last part of the name, lower case>.yaml``.

Parameters are counted from the shapes, as the transformers implementations of the three families lay them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from launcher.preset.fields import Frozen, Text
from launcher.preset.schema import Lora, RepoName
from launcher.supported import LORA_TARGETS, SAVEABLE_MODULES

Positive = Annotated[int, Field(gt=0)]
Architecture = Literal["starcoder2", "gpt_bigcode", "llama"]


class ModelFacts(Frozen):
    name: RepoName | None = None
    """Repository on the hub; none for a randomly initialised model or a folder."""
    source: Text = ""
    """Where the figures come from."""
    architecture: Architecture
    """``model_type`` of the config."""
    parameters: Positive
    """All of them, tied ones once."""
    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    """1: multi-query attention."""
    intermediate: Positive
    vocab: Positive
    context: Positive
    """Longest sequence, tokens."""
    sliding_window: Positive | None = None
    """Tokens that a position sees at most, itself among them; none: all before it."""
    tied: bool
    """The head is the embedding."""
    gated: bool = False
    """Whether the hub gives it only to a token whose owner has accepted its terms."""
    linear_layers: list[Text]
    """Names of the linear layers of a decoder layer: what LoRA can be put on."""
    dropout: bool = False
    """Whether its config trains with dropout, whose masks take memory."""
    notes: list[Text] = []


class Matrix(NamedTuple):
    """A weight of two dimensions; ``name`` as LoRA targets it."""

    name: str
    rows: int
    columns: int


def layer_matrices(facts: ModelFacts) -> list[Matrix]:
    """The linear layers of one decoder layer, in order; gpt_bigcode uses ``c_proj`` twice, starcoder2 once."""
    d, i = facts.hidden, facts.intermediate
    kv = facts.kv_heads * (d // facts.heads)
    attention = [Matrix("q_proj", d, d), Matrix("k_proj", kv, d), Matrix("v_proj", kv, d), Matrix("o_proj", d, d)]
    if facts.architecture == "gpt_bigcode":
        return [Matrix("c_attn", d + 2 * kv, d), Matrix("c_proj", d, d), Matrix("c_fc", i, d), Matrix("c_proj", d, i)]
    if facts.architecture == "starcoder2":
        return [*attention, Matrix("c_fc", i, d), Matrix("c_proj", d, i)]
    return [*attention, Matrix("gate_proj", i, d), Matrix("up_proj", i, d), Matrix("down_proj", d, i)]


def outer_matrices(facts: ModelFacts) -> list[Matrix]:
    """Embeddings and, where it is not tied, the head."""
    found = [Matrix("embedding", facts.vocab, facts.hidden)]
    if facts.architecture == "gpt_bigcode":
        found.append(Matrix("positions", facts.context, facts.hidden))
    if not facts.tied:
        found.append(Matrix("head", facts.vocab, facts.hidden))
    return found


def num_vector_parameters(facts: ModelFacts) -> int:
    """Biases and norms. llama: RMSNorm, no bias; the others: LayerNorm with bias, every linear layer with bias."""
    norms = facts.hidden * (2 * facts.layers + 1)
    if facts.architecture == "llama":
        return norms
    return 2 * norms + facts.layers * sum(matrix.rows for matrix in layer_matrices(facts))


def num_parameters(facts: ModelFacts) -> int:
    """All parameters, counted from the shapes."""
    layer = sum(matrix.rows * matrix.columns for matrix in layer_matrices(facts))
    outer = sum(matrix.rows * matrix.columns for matrix in outer_matrices(facts))
    return facts.layers * layer + outer + num_vector_parameters(facts)


def num_lora_parameters(facts: ModelFacts, rank: int, targets: list[str] | None) -> int:
    """Parameters of the adapters: rank × (rows + columns) for each target of each layer; default: ``LORA_TARGETS``."""
    names = LORA_TARGETS[facts.architecture] if targets is None else targets
    chosen = [matrix for matrix in layer_matrices(facts) if matrix.name in names]
    return facts.layers * rank * sum(matrix.rows + matrix.columns for matrix in chosen)


def num_saved_parameters(facts: ModelFacts, modules: list[str] | None) -> tuple[int, int, int]:
    """Parameters of ``adapter.modules_to_save``: of one decoder layer, of the embeddings, of the head and the last norm."""
    places = [SAVEABLE_MODULES[facts.architecture].get(name) for name in modules or []]
    norm = facts.hidden * (1 if facts.architecture == "llama" else 2)
    table = facts.vocab * facts.hidden
    embedding = table * places.count("embedding") + facts.context * facts.hidden * places.count("positions")
    return norm * places.count("layer norm"), embedding, table * places.count("head") + norm * places.count("norm")


def num_adapter_parameters(facts: ModelFacts, adapter: Lora) -> int:
    """All that is trained with an adapter: its matrices, DoRA's magnitudes (one for each output), whole modules."""
    names = adapter.targets or LORA_TARGETS[facts.architecture]
    rows = sum(matrix.rows for matrix in layer_matrices(facts) if matrix.name in names) if adapter.kind == "dora" else 0
    layer, embedding, head = num_saved_parameters(facts, adapter.modules_to_save)
    return num_lora_parameters(facts, adapter.rank, adapter.targets) + facts.layers * (rows + layer) + embedding + head


_DEFAULTS: dict[str, dict[str, Any]] = {
    # What the config classes of transformers 4.41 and 5.x fill in where config.json says nothing.
    "starcoder2": {
        "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "gpt_bigcode": {
        "vocab_size": 50257, "n_embd": 768, "n_inner": None, "n_layer": 12, "n_head": 12, "n_positions": 1024, "multi_query": True,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

_DROPOUT = {"starcoder2": "residual_dropout", "llama": "attention_dropout", "gpt_bigcode": "resid_pdrop"}


def facts_of_config(config: Mapping[str, Any]) -> ModelFacts | None:
    """Facts from a transformers config; None for a family that is not known here or a config that makes no sense."""
    family = config.get("model_type")
    if family not in _DEFAULTS:
        return None
    given = {(_OTHER_NAMES.get(name, name) if family == "gpt_bigcode" else name): value for name, value in config.items()}
    value = {**_DEFAULTS[family], **{name: given[name] for name in _DEFAULTS[family] if name in given}}
    if family == "gpt_bigcode":
        heads, hidden, layers = value["n_head"], value["n_embd"], value["n_layer"]
        kv_heads, intermediate, context = 1 if value["multi_query"] else heads, value["n_inner"] or 4 * hidden, value["n_positions"]
    else:
        heads, hidden, layers = value["num_attention_heads"], value["hidden_size"], value["num_hidden_layers"]
        kv_heads, intermediate, context = (
            value["num_key_value_heads"] or heads,
            value["intermediate_size"],
            value["max_position_embeddings"],
        )
    numbers = (heads, hidden, layers, kv_heads, intermediate, context, value["vocab_size"])
    if not all(type(number) is int and number > 0 for number in numbers):
        return None
    rate = config.get(_DROPOUT[family], 0.1 if family == "gpt_bigcode" else 0.0)
    draft = ModelFacts(
        source="config", architecture=family, parameters=1, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
        intermediate=intermediate, vocab=value["vocab_size"], context=context, tied=bool(value["tie_word_embeddings"]), linear_layers=[],
        dropout=isinstance(rate, (int, float)) and rate > 0,
        sliding_window=config.get("sliding_window") if family == "starcoder2" else None,
    )  # fmt: skip
    names = list(dict.fromkeys(matrix.name for matrix in layer_matrices(draft)))
    return draft.model_copy(update={"parameters": num_parameters(draft), "linear_layers": names})
