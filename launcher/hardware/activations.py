"""What a decoder layer and the loss keep in memory between forward and backward pass, in bytes. Not weights, gradients or optimizer.

Every figure is what the classes of transformers 5 keep, read off tensor by tensor with what ``benchmarks/memory_fake.py`` measures.

T tokens of a micro batch, D hidden, I intermediate, K width of keys, H heads, S length of the score matrix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from launcher.preset.model import ModelFacts, layer_matrices

Kernel = Literal["flash", "efficient", "math", "eager"]
"""flash: no score matrix, no mask. efficient: no score matrix, but a mask of each layer's own. math, eager: whole score matrices."""

LOSS_CHUNK_TOKENS = 1024
"""Tokens of a piece of ``cross_entropy: chunked``: its fp32 logits are about as large as the head's fp32 gradient, to which each piece is
added; with smaller ones that adding, which moves all of the gradient, takes longer than the piece."""

FP32, HALF = 4, 2


@dataclass(frozen=True)
class Compute:
    """One forward and backward pass as a layer sees it."""

    rows: int
    """Sequences side by side; 1 where they are packed into one row."""
    length: int
    """Positions of a row: T = rows × length."""
    half: bool
    """Matrix products in 16 bits."""
    autocast: bool
    """16 bits by autocast over fp32 weights: weights and inputs of matrix products are copied, the residual stream stays fp32."""
    kernel: Kernel
    masked: bool
    """An explicit mask of length × length for each row: batches with pads, or documents kept apart in a row."""
    repeats_kv: bool
    """Keys and values are copied out to all heads before attention."""
    checkpointing: bool
    """A layer is computed again in its backward pass, all of it or (``selective``) what is cheap."""
    dropout: bool
    """Of the model, as its config says."""
    adapted: frozenset[str] | None = None
    """Names of the layers with an adapter; None: every weight is trained."""
    rank: int = 0
    adapter_dropout: bool = False
    dora: bool = False
    quantised: bool = False
    """Layers' weights in 4 bits."""
    selective: bool = False

    @property
    def copies(self) -> int:
        """16-bit copies of each weight of a layer that autocast makes and the backward pass reads. Of weights in 4 bits there are none:
        they are written out anew. DoRA with dropout multiplies by the weight once more.
        """
        return (2 if self.dora and self.adapter_dropout else 1) if self.autocast and not self.quantised else 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def h(self) -> int:
        """Bytes of a matrix product's input."""
        return HALF if self.half else FP32

    @property
    def r(self) -> int:
        """Bytes of an entry of the residual stream."""
        return HALF if self.half and not self.autocast else FP32

    @property
    def scores(self) -> int:
        """Entries of a score matrix per head."""
        return self.rows * self.length**2


class Saved(NamedTuple):
    """Bytes that a layer keeps until its backward pass."""

    attention: int
    mlp: int
    copies: int
    """Autocast's 16-bit copies of the layer's weights."""

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.copies


def layer_saved(facts: ModelFacts, compute: Compute) -> Saved:
    """Of one decoder layer without checkpointing."""
    t, d, h = compute.tokens, facts.hidden, compute.h
    reads_attention, reads_mlp = _readers(facts)
    copies = sum(m.rows * m.columns for m in layer_matrices(facts)) * HALF * compute.copies
    attention = _norm(facts, compute) + _inputs(compute, reads_attention, t * d) + _attention(facts, compute) + _adapters(facts, compute)
    mlp = _norm(facts, compute) + _inputs(compute, reads_mlp, t * d) + _mlp(facts, compute)
    if compute.dropout:
        attention, mlp = attention + t * d, mlp + t * d
    if compute.autocast and compute.adapted is not None and _OUTPUT[facts.architecture] in compute.adapted:
        attention += t * d * h  # the adapter casts the attention's output to fp32 and back
    return Saved(attention, mlp, copies)


def layer_kept(facts: ModelFacts, compute: Compute, saved: Saved) -> int:
    """What a layer keeps until its backward pass: with checkpointing its input, if selective also the results of its matrix products and
    of attention, unless that is eager or draws random numbers.
    """
    stream = compute.tokens * facts.hidden * compute.r
    if not compute.checkpointing:
        return saved.attention + saved.mlp
    if not compute.selective:
        return stream
    products = sum(matrix.rows for matrix in layer_matrices(facts)) + (
        0 if compute.adapted is None else sum(compute.rank + m.rows for m in layer_matrices(facts) if m.name in compute.adapted)
    )
    kept = compute.tokens * products * compute.h
    if compute.kernel in ("flash", "efficient") and not compute.dropout:
        kept += compute.tokens * (facts.hidden * compute.h + facts.heads * FP32)
    return stream + kept


def layer_backward(facts: ModelFacts, compute: Compute, saved: Saved) -> int:
    """What the backward pass of a layer takes at its worst, beyond what the forward pass kept (which it frees as it goes)."""
    t, d, i, h, r = compute.tokens, facts.hidden, facts.intermediate, compute.h, compute.r
    trains = compute.adapted is None
    stream = t * d * r
    # the MLP's output layer: gradient of its output, of its input, of its weight
    mlp = stream + t * d * h + t * i * h + (d * i * h if trains else 0)
    # its first layer, with the weight's gradient cast up
    first = stream + t * i * h + t * d * h + (d * i * (FP32 + h) if trains else 0) - t * i * h - d * i * h * min(1, compute.copies)
    n = compute.scores * facts.heads
    scores = stream + t * d * h - saved.mlp - 2 * d * i * HALF * min(1, compute.copies) + n * _scores_backward(compute)
    return max(mlp, first, scores, stream)


def layer_working(facts: ModelFacts, compute: Compute) -> int:
    """What one adapted linear layer takes while it is computed, in the forward pass and when that is repeated: of weights in 4 bits the
    layer's weights written out; for DoRA's norms an identity as wide as its input, its update, and both sums with the weight, in fp32.
    """
    if compute.adapted is None:
        return 0
    chosen = [matrix for matrix in layer_matrices(facts) if matrix.name in compute.adapted]
    norms = max((m.columns**2 + 3 * m.rows * m.columns for m in chosen), default=0) * FP32 if compute.dora else 0
    written_out = max(m.rows * m.columns for m in layer_matrices(facts)) * compute.h if compute.quantised else 0
    return max(norms, written_out)


def outer_saved(facts: ModelFacts, compute: Compute) -> int:
    """Kept outside the layers: embedding with its dropout, final norm and the head's input, rotary tables, an eager mask."""
    t, d = compute.tokens, facts.hidden
    kept = t * d * compute.h if compute.adapted is None else 0  # the head's input
    kept += _norm(facts, compute)
    if compute.dropout and compute.adapted is None:
        kept += t * d
    if facts.architecture != "gpt_bigcode":
        kept += 2 * compute.length * (d // facts.heads) * FP32
    if compute.masked or compute.kernel == "eager":
        kept += compute.scores * FP32
    return kept


class Loss(NamedTuple):
    """Bytes of logits and loss, in the order of a step."""

    in_model: int
    """Logits as the head gives them, while the model still runs."""
    forward: int
    backward: int
    to_head: int
    """Gradient of the logits as the head's backward pass reads it."""


def loss_bytes(facts: ModelFacts, compute: Compute, cross_entropy: str) -> Loss:
    """Plain: logits are cast to fp32, log-softmax makes as much again and keeps it, and its backward pass holds two more of that size.

    In pieces (of liger's kernel an upper bound): the backward pass turns the fp32 logits into their gradient and casts that.
    """
    if cross_entropy != "plain":
        piece = facts.vocab * min(compute.tokens, LOSS_CHUNK_TOKENS)
        return Loss(0, 2 * piece * FP32, piece * (FP32 + compute.h), 0)
    entries = facts.vocab * compute.tokens
    given = entries * compute.h
    return Loss(given, 2 * entries * FP32, 3 * entries * FP32, given)


def evaluation_bytes(facts: ModelFacts, compute: Compute) -> tuple[int, int]:
    """Activations and logits of a forward pass that keeps nothing: (at the layers, at the loss)."""
    t = compute.tokens
    stream = t * facts.hidden * (2 * compute.r + compute.h)
    wide = t * facts.intermediate * compute.h * (3 if facts.architecture == "llama" else 2)
    scores = compute.scores * facts.heads * (FP32 + compute.h) if compute.kernel in ("math", "eager") else 0
    return stream + max(wide, scores), 2 * t * facts.vocab * FP32


_OUTPUT: Mapping[str, str] = {"starcoder2": "o_proj", "gpt_bigcode": "c_proj", "llama": "o_proj"}
_DOWN: Mapping[str, str] = {"starcoder2": "c_proj", "gpt_bigcode": "c_proj", "llama": "down_proj"}


def _scores_backward(compute: Compute) -> int:
    """Bytes for each score, beyond what the forward pass kept: in the backward pass of the softmax, the worst of its moments."""
    if compute.kernel == "eager":
        return FP32 + 1 if compute.half else FP32
    return FP32 if compute.kernel == "math" else 0


def _readers(facts: ModelFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Layers that read the output of the first norm and of the second."""
    if facts.architecture == "gpt_bigcode":
        return ("c_attn",), ("c_fc",)
    return ("q_proj", "k_proj", "v_proj"), (("c_fc",) if facts.architecture == "starcoder2" else ("gate_proj", "up_proj"))


def _norm(facts: ModelFacts, compute: Compute) -> int:
    """Its input, its statistics, and of an RMSNorm with a trained weight the normed input."""
    t, d = compute.tokens, facts.hidden
    if facts.architecture != "llama":
        return t * d * compute.r + 2 * t * FP32
    return t * d * compute.r + t * FP32 + (t * d * FP32 if compute.adapted is None else 0)


def _inputs(compute: Compute, readers: tuple[str, ...], entries: int) -> int:
    """Inputs of the layers that read a norm's output: autocast casts it anew for each of them."""
    reading = [name for name in readers if compute.adapted is None or name in compute.adapted]
    if not reading:
        return 0
    return entries * compute.h * (len(reading) if compute.autocast else 1)


def _attention(facts: ModelFacts, compute: Compute) -> int:
    t, d, h = compute.tokens, facts.hidden, compute.h
    kv = facts.kv_heads * (d // facts.heads)
    n = compute.scores * facts.heads
    if compute.kernel == "eager":
        # softmax in fp32 and its result as the product reads it; with dropout a mask beside. Keys and values that all heads of the
        # only row share are not copied out
        copied = 2 if facts.kv_heads == 1 and compute.rows == 1 else 4
        masks = (1 if compute.half else FP32 + 1) if compute.dropout else 0
        return copied * t * d * h + n * (FP32 + (HALF if compute.half else 0) + masks)
    if compute.kernel == "math":
        return 3 * t * d * FP32 + t * d * h + n * (FP32 + (FP32 + 1 if compute.dropout else 0))
    kept = t * (2 * d + 2 * (d if compute.repeats_kv else kv)) * h + t * facts.heads * FP32
    if compute.masked and compute.kernel == "efficient":
        kept += compute.scores * h
    return kept


def _mlp(facts: ModelFacts, compute: Compute) -> int:
    """Between its layers; the last one's input is kept where that layer is trained or adapted."""
    wide = compute.tokens * facts.intermediate * compute.h
    last = compute.adapted is None or _DOWN[facts.architecture] in compute.adapted
    return wide * ((3 if facts.architecture == "llama" else 1) + last)


def _adapters(facts: ModelFacts, compute: Compute) -> int:
    """What LoRA keeps beside its layers' inputs."""
    if compute.adapted is None:
        return 0
    t, h = compute.tokens, compute.h
    chosen = [matrix for matrix in layer_matrices(facts) if matrix.name in compute.adapted]
    kept = sum(t * compute.rank * h + (compute.rank * (m.rows + m.columns) * HALF if compute.autocast else 0) for m in chosen)
    if compute.adapter_dropout:
        kept += sum(t * matrix.columns * (1 if compute.autocast else 1 + h) for matrix in chosen)
    if compute.dora:
        kept += sum(2 * t * matrix.rows * h for matrix in chosen)
    return kept
