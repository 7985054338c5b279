"""What one token costs, counted from the model's shapes: matrix products, attention, bytes through memory. No hardware, no seconds.

FLOP per token of training = 6·N + 12·L·d·S, "full attention" (Narayanan et al. 2021; the MFU of llm-foundry): N = parameters of matrix
products, the head once and no embedding look-ups; L layers, d hidden, S sequence length. That is the numerator of every MFU here. What
a kernel really computes differs (a causal kernel half of the attention, checkpointing one forward pass more), and is counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware.activations import LOSS_CHUNK_TOKENS
from launcher.preset.model import ModelFacts, layer_matrices

DROPOUT = frozenset({"gpt_bigcode", "starcoder2"})
"""Families whose published configs drop out after attention and MLP (0.1); llama does not."""


def matmul_parameters(facts: ModelFacts) -> int:
    """N: the linear layers and the head."""
    return layer_parameters(facts) + facts.vocab * facts.hidden


def layer_parameters(facts: ModelFacts) -> int:
    """The linear layers of all decoder layers."""
    return facts.layers * sum(matrix.rows * matrix.columns for matrix in layer_matrices(facts))


def flops_per_token(facts: ModelFacts, sequence_length: int) -> float:
    """FLOP of training on one token, 6·N + 12·L·d·S."""
    return 6.0 * matmul_parameters(facts) + 12.0 * facts.layers * facts.hidden * sequence_length


@dataclass(frozen=True)
class Precision:
    """Bytes of what passes through memory."""

    compute: int
    """Outputs of matrix products: 2 in half precision, 4 in fp32 and tf32."""
    stream: int
    """The residual stream. torch.autocast keeps it, and every norm, in fp32; sharded engines and bf16_pure hold the model in half."""


def elementwise_bytes(facts: ModelFacts, precision: Precision) -> float:
    """Bytes per token and forward pass that the kernels between the matrix products of all decoder layers read and write.

    Counted operation by operation as transformers writes the three families, each a kernel of its own in eager mode.
    """
    d, i, c, s = facts.hidden, facts.intermediate, precision.compute, precision.stream
    kv = facts.kv_heads * (d // facts.heads)
    norm = s + max(s, c)  # read, write
    cast = (s + c) if s != c else 0  # autocast casts the input of each product anew
    products_of_input = 1 if facts.architecture == "gpt_bigcode" else 3
    add = 2 * s + c
    dropout = (2 * c + 1) if facts.architecture in DROPOUT else 0
    attention = d * (norm + products_of_input * cast + 2 * c + dropout + add)  # 2·c: heads back beside each other
    if facts.kv_heads < facts.heads:
        attention += 4 * c * d  # keys and values repeated for the heads of a group
    if facts.architecture != "gpt_bigcode":
        attention += 10 * c * (d + kv)  # rotary embedding
    gated = facts.architecture == "llama"
    mlp = d * (norm + (2 if gated else 1) * cast + dropout + add) + (5 if gated else 2) * c * i
    return float(facts.layers * (attention + mlp))


def logits_bytes(facts: ModelFacts, precision: Precision, cross_entropy: str) -> float:
    """Bytes per token, forward and backward: logits, their fp32 copy, log-softmax and its gradient, cast back. In chunks: each one's share
    of the head's gradient added to it.
    """
    if cross_entropy == "fused":
        return facts.vocab * 5.0 * precision.compute
    casts = 12.0 if precision.compute == 2 else 4.0
    added = facts.hidden * (precision.compute + 8.0) / LOSS_CHUNK_TOKENS if cross_entropy == "chunked" else 0.0
    return facts.vocab * (precision.compute + 16.0 + casts + added)


def score_bytes(facts: ModelFacts, precision: Precision) -> tuple[float, float]:
    """Bytes per element of eager attention's S×S scores: forward, backward.

    Half precision, gpt_bigcode: the fp32 upcast softmax of transformers 4 (scores, upcast, scale, mask, softmax, cast, dropout, product).
    The others soften in fp32 too, but scale and mask in half.
    """
    if precision.compute == 4:
        return 44.0, 50.0
    return (46.0, 54.0) if facts.architecture == "gpt_bigcode" else (29.0, 33.0)


def adapter_bytes(facts: ModelFacts, targets: list[str], precision: Precision) -> float:
    """Bytes per token and forward pass that LoRA adds: its input read, its output written, scaled and added."""
    chosen = [matrix for matrix in layer_matrices(facts) if matrix.name in targets]
    return float(facts.layers * precision.compute * sum(matrix.columns + 6 * matrix.rows for matrix in chosen))
