"""What a GPU holds through a whole step: its share of weights, gradients and optimizer state under each parallelism, in bytes.

Not activations (``activations``). Of FSDP, DeepSpeed, offload, adamw_8bit, QLoRA and DoRA nothing was measured on a GPU: their
figures are what their documents say.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware.activations import FP32, HALF
from launcher.hardware.split import Part
from launcher.preset.model import (
    ModelFacts,
    layer_matrices,
    num_lora_parameters,
    num_saved_parameters,
    num_vector_parameters,
    outer_matrices,
)
from launcher.preset.schema import Lora, Preset
from launcher.supported import LORA_TARGETS

NF4_BYTES = 4.127 / 8
"""A weight in 4 bits with its scale doubly quantised, in blocks of 64 and 256 (QLoRA, arXiv 2305.14314, section 3)."""
BITS_8_STATE = 2 * (1 + FP32 / 256)
"""adamw_8bit: two moments of 8 bits, each with an fp32 scale for a block of 256 (bitsandbytes 0.50)."""
PURE_UPDATE_BYTES = 30
"""For each weight of the largest matrix while ``bf16_pure`` updates it: weight, gradient and moments in fp32, temporaries, noise."""
ZERO_BUCKET = 500_000_000
"""Entries of DeepSpeed's reduce and all-gather buckets: its defaults, which our template leaves alone."""
ZERO_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (``stage3_max_live_parameters``, its default)."""

ZERO = ("zero1", "zero2", "zero3")
SHARDED = ("fsdp", *ZERO)


@dataclass(frozen=True)
class Holdings:
    """Bytes on one GPU."""

    weights: float
    buckets: float
    """Second copies of gradients, and what sharding gathers: there all the time."""
    optimizer: float
    update: float
    """Temporaries of the optimizer's step."""
    layer_gradient: float
    """Of one decoder layer."""
    embedding_gradient: float
    head_gradient: float
    """Of an untied head, and of the final norm."""

    def gradients(self, layers: int) -> float:
        return layers * self.layer_gradient + self.embedding_gradient + self.head_gradient


def hold(preset: Preset, facts: ModelFacts, part: Part, world_size: int) -> Holdings:
    count = _count(preset, facts, part)
    training, parallelism = preset.training, preset.parallelism
    weight = HALF if training.dtype == "bf16_pure" else FP32
    gradient: float = weight if count.adapted_layer is None else FP32
    weights = _weight_bytes(preset, count, weight)
    state = count.trained * _state_bytes(preset, facts)
    update = _update_bytes(preset, facts, count, weight)
    buckets = 0.0
    if parallelism == "ddp" and world_size > 1:
        # DDP copies gradients into buckets of its own, there from the start (gradient_as_bucket_view is off; seen with fake tensors)
        buckets = count.trained * gradient
    elif parallelism in SHARDED:
        compute = FP32 if training.dtype == "fp32" else HALF
        if parallelism == "fsdp":  # the root's weights stay gathered; of the layers this one, the next one and this one's gradient
            buckets = (count.embedding + count.head + 3 * count.layer) * compute
            weights, gradient = weights / world_size, gradient / world_size
        else:
            bucket = min(ZERO_BUCKET, count.all)
            gathered = min(ZERO_LIVE, count.all) if parallelism == "zero3" else bucket
            buckets = (2 * bucket + gathered) * compute  # two to reduce into (overlap_comm)
            state += count.trained * FP32  # master weights, which DeepSpeed keeps also beside fp32 ones
            weights = _weight_bytes(preset, count, compute) / (world_size if parallelism == "zero3" else 1)
            gradient = compute / (1 if parallelism == "zero1" else world_size)
        state, update = state / world_size, update / world_size
    if preset.offload != "none":
        state = update = 0.0
        weights = 0.0 if preset.offload == "all" and parallelism in ("fsdp", "zero3") else weights
    layer = count.layer if count.adapted_layer is None else count.adapted_layer
    whole = count.adapted_layer is None
    embedding, head = (count.embedding, count.head) if whole else (count.saved_embedding, count.saved_head)
    return Holdings(weights, buckets, state, update, layer * gradient, embedding * gradient, head * gradient)


def targets(facts: ModelFacts, adapter: Lora) -> frozenset[str]:
    """Names of the linear layers that get an adapter."""
    return frozenset(LORA_TARGETS[facts.architecture] if adapter.targets is None else adapter.targets)


@dataclass(frozen=True)
class _Count:
    """Parameters on one GPU, before any sharding."""

    layers: int
    matrices: int
    """Entries of a layer's matrices."""
    layer: int
    embedding: int
    head: int
    adapted_layer: int | None
    """What is trained of a layer beside its own weights: adapters and copies of its norms; None without an adapter."""
    saved_embedding: int
    saved_head: int
    """Copies of whole modules that are trained with an adapter."""

    @property
    def all(self) -> int:
        return self.layers * self.layer + self.embedding + self.head

    @property
    def trained(self) -> int:
        if self.adapted_layer is None:
            return self.all
        return self.layers * self.adapted_layer + self.saved_embedding + self.saved_head


def _count(preset: Preset, facts: ModelFacts, part: Part) -> _Count:
    norm = facts.hidden * (1 if facts.architecture == "llama" else 2)
    matrices = sum(m.rows * m.columns for m in layer_matrices(facts))
    vectors = (num_vector_parameters(facts) - norm) // facts.layers
    outer = outer_matrices(facts)
    embedding = sum(m.rows * m.columns for m in outer if m.name != "head") if part.embedding else 0
    head = norm + sum(m.rows * m.columns for m in outer if m.name == "head") if part.head else 0
    adapted, saved_embedding, saved_head = None, 0, 0
    if isinstance(preset.adapter, Lora):
        saved_layer, saved_embedding, saved_head = num_saved_parameters(facts, preset.adapter.modules_to_save)
        adapted = num_lora_parameters(facts, preset.adapter.rank, preset.adapter.targets) // facts.layers + saved_layer
        if preset.adapter.kind == "dora":  # a magnitude for each output
            adapted += sum(m.rows for m in layer_matrices(facts) if m.name in targets(facts, preset.adapter))
    saved_embedding, saved_head = saved_embedding if part.embedding else 0, saved_head if part.head else 0
    return _Count(part.layers, matrices, matrices + vectors, embedding, head, adapted, saved_embedding, saved_head)


def _weight_bytes(preset: Preset, count: _Count, weight: float) -> float:
    """``weight``: bytes of each. Adapters are fp32 whatever the rest is (peft casts them)."""
    if count.adapted_layer is None:
        return count.all * weight
    quantised = count.layers * count.matrices if isinstance(preset.adapter, Lora) and preset.adapter.kind == "qlora" else 0
    return (count.all - quantised) * weight + quantised * NF4_BYTES + count.trained * FP32


def _state_bytes(preset: Preset, facts: ModelFacts) -> float:
    """Bytes of optimizer state for each trained weight, without master weights."""
    training = preset.training
    if training.optimizer in ("adamw", "adamw_fused"):
        return 2.0 * (HALF if training.dtype == "bf16_pure" and preset.parallelism not in ZERO else FP32)
    if training.optimizer == "adamw_8bit":
        return BITS_8_STATE
    if preset.parallelism in ZERO or isinstance(preset.adapter, Lora):
        return FP32  # DeepSpeed flattens parameters, so nothing is left to factor; adapters are too thin to gain by it
    factors = facts.layers * sum(m.rows + m.columns for m in layer_matrices(facts)) + sum(m.rows + m.columns for m in outer_matrices(facts))
    return FP32 * (factors + num_vector_parameters(facts)) / facts.parameters


def _update_bytes(preset: Preset, facts: ModelFacts, count: _Count, weight: int) -> float:
    """AdamW over lists of tensors takes the root of all second moments at once. Adafactor goes matrix by matrix with two temporaries, and
    still holds one of the matrix before; adamw_8bit works in place.
    """
    if preset.training.dtype == "bf16_pure" and count.adapted_layer is None:  # one matrix after the other in fp32
        largest = max(
            *(m.rows * m.columns for m in layer_matrices(facts)), facts.vocab * facts.hidden if count.embedding or count.head else 0
        )
        return PURE_UPDATE_BYTES * largest
    if preset.training.optimizer == "adamw_fused":
        return 0.0
    if preset.training.optimizer == "adamw":
        return count.trained * weight
    if preset.training.optimizer == "adamw_8bit" or count.adapted_layer is not None:
        return 0.0
    layer = max(m.rows * m.columns for m in layer_matrices(facts))
    outer = facts.vocab * facts.hidden if count.embedding or count.head else 0
    return FP32 * (2 * max(layer, outer) + (0 if facts.tied and outer >= layer else layer))
