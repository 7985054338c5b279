"""How much memory a run takes: of its fullest GPU, and of a node's RAM. Pure, no torch: shapes and arithmetic.

One optimizer step is looked at as a row of moments (end of the forward pass, loss, each layer's backward pass, update, evaluation); the
fullest one is the answer. ``benchmarks/memory_fake.py`` measures the same step of the real classes, and a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launcher.hardware import compatibility as known
from launcher.hardware.activations import (
    FP32,
    HALF,
    Compute,
    Kernel,
    evaluation_bytes,
    layer_backward,
    layer_kept,
    layer_saved,
    layer_working,
    loss_bytes,
    outer_saved,
)
from launcher.hardware.holdings import SHARDED, hold, targets
from launcher.hardware.host import predict_host
from launcher.hardware.lengths import by_blocks
from launcher.hardware.split import Part, split, whole
from launcher.plan import Batch, Layout, Memory
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Lora, Preset
from launcher.preset.stack import Stack

GIB = 1024**3
CONTEXT_GIB = 0.5
"""What a process holds of a GPU outside torch: CUDA context and the kernels it loaded. Assumed: 0.3 to 0.6 on V100 to H100."""
NCCL_GIB = 0.5
"""NCCL's buffers where GPUs talk to each other. Assumed: it grows with channels and neighbours, 0.2 to 0.9."""
WORKSPACE_GIB = {"9.0": 2 * 32 / 1024}
"""cuBLAS workspaces, for the forward and the backward thread: torch takes 32 MiB on Hopper, 8.1 elsewhere (its notes on CUDA semantics)."""
WORKSPACE_DEFAULT_GIB = 2 * 8.125 / 1024
FRAGMENTED = 0.045
"""Share that torch's allocator needs beyond the tensors. Replayed for every measured step (``benchmarks/results/memory-fake.json``): 0.2 to
7.5 %, in two of 58 steps 11 and 13; with expandable segments (PYTORCH_CUDA_ALLOC_CONF) 0.1 to 2.8."""
RESERVED = 0.07
"""Share of a GPU that a plan must leave free to count as fitting: for what nobody predicts. Set between the known facts
(``benchmarks/published.yaml``): of what the sources ran, the fullest takes 0.91 of a GPU by this model; what could not, 0.94 or more."""
GQA_STACK = 5
"""transformers from this major version on leaves grouped keys to the kernel where there is no mask; before, they were always copied out."""


class Moment(NamedTuple):
    """Bytes on one GPU, at one moment of a step."""

    name: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def predict_memory(
    preset: Preset,
    facts: ModelFacts,
    hardware: Hardware,
    layout: Layout,
    batch: Batch,
    attention: str,
    stack: Stack | None = None,
    *,
    ram_disk_gib: float = 0.0,
) -> Memory:
    """The peak of the fullest GPU with its parts, what a process can use of a GPU, whether one fits into the other, and a node's RAM.

    On CPU the same parts lie in RAM: ``per_gpu_gib`` is what one rank computes with there (an upper bound: AdamW takes less for its step on
    CPU), ``available_gib`` a rank's share of what is asked of the scheduler, less what its libraries and the reading of a checkpoint take.
    ``stack`` says how old transformers is; None: current. ``ram_disk_gib``: what lies in a folder of the node that is memory.
    """
    peak = fullest_moment(preset, facts, hardware, layout, batch, attention, stack)
    ranks = layout.ranks_per_node
    gpu = hardware.gpu if layout.gpus_per_node else None
    computed_gib = 0.0 if gpu is not None else peak.total / GIB
    host = predict_host(preset, facts, layout, computed_gib=computed_gib, ram_disk_gib=ram_disk_gib).peak
    if gpu is None:
        other = FRAGMENTED * (peak.activations + peak.logits) / GIB
        available = layout.memory_per_node_gib / ranks - (host - ranks * peak.total / GIB) / ranks
    else:
        talks = layout.world_size > 1
        other = FRAGMENTED * peak.total / GIB + WORKSPACE_GIB.get(gpu.compute_capability, WORKSPACE_DEFAULT_GIB)
        available = (1 - RESERVED) * (gpu.memory_gib - CONTEXT_GIB - (NCCL_GIB if talks else 0.0))
    parts = {name: round(getattr(peak, name) / GIB, 3) for name in ("weights", "gradients", "optimizer", "activations", "logits")}
    parts["other"] = round(other, 3)
    used = round(sum(parts.values()), 3)
    return Memory(used, round(available, 3), used <= available, round(host, 1), parts, ram_disk_gib)


def largest_micro_batch(
    preset: Preset,
    facts: ModelFacts,
    hardware: Hardware,
    layout: Layout,
    shares: Sequence[int],
    attention: str,
    stack: Stack | None = None,
    *,
    ram_disk_gib: float = 0.0,
) -> int | None:
    """The largest number of samples that a rank can hold at once; None when not even one fits. ``shares``: samples of a step per rank."""
    most = max(shares)

    def fits(micro_batch: int) -> bool:
        batch = Batch(sum(shares), tuple(shares), micro_batch, -(-most // micro_batch))
        return predict_memory(preset, facts, hardware, layout, batch, attention, stack, ram_disk_gib=ram_disk_gib).fits

    if fits(most):  # in one micro step no gradients are there yet: it may fit where a smaller one does not
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def fullest_moment(
    preset: Preset, facts: ModelFacts, hardware: Hardware, layout: Layout, batch: Batch, attention: str, stack: Stack | None = None
) -> Moment:
    """Of the fullest GPU: what torch's tensors take, without workspaces and fragmentation."""
    capability = hardware.gpu.compute_capability if layout.gpus_per_node and hardware.gpu is not None else None
    old = stack is not None and known.version(stack.packages.get("transformers", "5"))[0] < GQA_STACK
    evaluated = preset.evaluation.micro_batch if preset.evaluation.every != "never" else 0
    blocks = by_blocks(preset, attention, stack)
    moments = [
        moment
        for masked in _masks(preset, blocks=blocks)
        for part in _parts(preset, facts, hardware, layout)
        for moment in _moments(
            preset, facts, part, layout.world_size, batch.micro_steps,
            _compute(preset, facts, batch.micro_batch, attention, capability, masked=masked, repeats=old, blocks=blocks),
            _compute(preset, facts, evaluated, attention, capability, masked=masked, repeats=old, blocks=blocks),
        )
    ]  # fmt: skip
    return max(moments, key=lambda moment: moment.total)


def _masks(preset: Preset, *, blocks: bool) -> tuple[bool, ...]:
    """Whether attention gets an explicit mask. With pads it does, but a batch that happens to have none goes without."""
    return {"none": (True, False), "concatenate": (False,)}.get(preset.data.packing, (not blocks,))


def _parts(preset: Preset, facts: ModelFacts, hardware: Hardware, layout: Layout) -> list[Part]:
    if preset.parallelism != "device_map" or layout.gpus_per_node < 2 or hardware.gpu is None:
        return [whole(facts)]
    state = (
        1.0
        if isinstance(preset.adapter, Lora)
        else {"adamw": 4.0, "adamw_fused": 4.0, "adamw_8bit": 2.5, "adafactor": 2.0}[preset.training.optimizer]
    )
    parts = split(facts, layout.gpus_per_node, hardware.gpu.memory_gib * GIB * 0.9 / state)
    return parts if parts is not None else [whole(facts)]


def _compute(
    preset: Preset, facts: ModelFacts, rows: int, attention: str, capability: str | None, *, masked: bool, repeats: bool, blocks: bool
) -> Compute:
    training = preset.training
    half = training.dtype != "fp32"
    adapter = preset.adapter if isinstance(preset.adapter, Lora) else None
    kernel = _kernel(attention, facts, half=half, masked=masked, capability=capability, repeats=repeats, blocks=blocks)
    joined = preset.data.packing == "flatten"
    return Compute(
        rows=1 if joined else rows,
        length=training.sequence_length * (rows if joined else 1),
        half=half,
        autocast=training.dtype in ("bf16", "fp16") and preset.parallelism not in SHARDED,
        kernel=kernel,
        masked=masked and attention in ("sdpa", "eager"),
        repeats_kv=_repeats_kv(attention, facts, asked=masked or repeats or (blocks and kernel != "flash")),
        checkpointing=training.activation_checkpointing != "none",
        selective=training.activation_checkpointing == "selective",
        dropout=facts.dropout,
        adapted=None if adapter is None else targets(facts, adapter),
        rank=0 if adapter is None else adapter.rank,
        adapter_dropout=adapter is not None and adapter.dropout > 0,
        dora=adapter is not None and adapter.kind == "dora",
        quantised=adapter is not None and adapter.kind == "qlora",
    )


def _repeats_kv(attention: str, facts: ModelFacts, *, asked: bool) -> bool:
    """Whether keys and values are copied out to all heads. ``asked``: sdpa got a mask or no kernel for groups, or transformers is old."""
    if attention == "flex":  # transformers does, where the number of heads is no power of 2
        return facts.kv_heads < facts.heads and facts.heads & (facts.heads - 1) != 0
    return 1 < facts.kv_heads < facts.heads and (attention == "xformers" or (attention == "sdpa" and asked))


def _kernel(attention: str, facts: ModelFacts, *, half: bool, masked: bool, capability: str | None, repeats: bool, blocks: bool) -> Kernel:
    """What torch takes for sdpa on a GPU: flash for 16 bits without a mask (Ampere or newer), else its memory-efficient kernel, which
    reads masks but knows no grouped keys and values: where transformers leaves those to the kernel, plain arithmetic remains, where
    attention goes over ``blocks``, they are copied.
    """
    if attention == "eager":
        return "eager"
    if attention != "sdpa":
        return "flash"
    grouped = facts.kv_heads < facts.heads
    if masked or repeats:
        return "efficient"
    if half and (capability is None or known.at_least(capability, "8.0")):
        return "flash"
    return "math" if grouped and not blocks else "efficient"


def _moments(
    preset: Preset, facts: ModelFacts, part: Part, world_size: int, micro_steps: int, training: Compute, evaluation: Compute
) -> Iterator[Moment]:
    """The moments of a step, in its order, at which a GPU that holds ``part`` can be fullest. The last micro step stands for all."""
    held, saved = hold(preset, facts, part, world_size), layer_saved(facts, training)
    loss = loss_bytes(facts, training, preset.training.cross_entropy)
    trained = training.adapted is None
    trained_head = trained or (isinstance(preset.adapter, Lora) and "lm_head" in (preset.adapter.modules_to_save or []))
    stream, narrow = (training.tokens * facts.hidden * size for size in (training.r, training.h))
    vocabulary = facts.vocab * facts.hidden if part.head else 0
    head_copy = vocabulary * HALF if training.autocast else 0
    copies = head_copy + part.layers * saved.copies
    standing = held.gradients(part.layers) if micro_steps > 1 else 0.0  # what earlier micro steps left
    kept_by_layer, in_pieces = layer_kept(facts, training, saved), preset.training.cross_entropy != "plain"
    outside, working = outer_saved(facts, training) + stream, layer_working(facts, training)
    kept = outside + part.layers * kept_by_layer

    def moment(
        name: str, *, activations: float = 0, logits: float = 0, gradients: float = 0, copied: float = 0, update: float = 0
    ) -> Moment:
        return Moment(name, held.weights + copied, gradients + held.buckets, held.optimizer + update, activations, logits)

    if part.head:
        # autocast holds on to its copies of trained weights until the forward pass ends, whether a layer keeps them or not
        cached = copies if trained or not training.checkpointing else head_copy
        yield moment("forward", activations=kept + working, logits=loss.in_model, gradients=standing, copied=cached)
        copied = head_copy if training.checkpointing else copies
        gradient = vocabulary * training.h if trained_head else 0
        if in_pieces:  # inside the model's forward pass; the head's gradient is added up in fp32 while there are logits
            made = standing + (vocabulary * FP32 if trained_head else 0)
            yield moment("loss", activations=kept + stream, logits=loss.forward, gradients=made, copied=cached)
            made += gradient if training.half else 0
            yield moment("loss, head", activations=kept + stream, logits=loss.backward, gradients=made, copied=cached)
        else:
            yield moment("loss", activations=kept, logits=max(loss.forward, loss.backward), gradients=standing, copied=copied)
        yield moment("head", activations=kept + narrow, logits=loss.to_head, gradients=standing + gradient, copied=copied)
        if training.autocast:
            gradient += vocabulary * FP32 if trained_head else 0
            yield moment("head, cast", activations=kept + narrow + stream, gradients=standing + gradient, copied=copied - head_copy)
    waiting = vocabulary * FP32 if facts.tied and trained else 0  # a tied head's gradient, until the embedding's is there too
    for layer in range(part.layers, 0, -1):
        done = 0.0 if standing else (part.layers - layer) * held.layer_gradient + held.head_gradient
        recomputed = saved.attention + saved.mlp - (kept_by_layer - stream) if training.checkpointing else 0
        yield moment(
            "backward",
            activations=outside + layer * kept_by_layer + recomputed + working + layer_backward(facts, training, saved),
            gradients=(standing or done) + waiting,
            copied=saved.copies * (1 if training.checkpointing else layer),
        )
    if part.embedding and (trained or held.embedding_gradient):
        gradients = standing or held.gradients(part.layers) - held.embedding_gradient
        sums = 3 if waiting else 1  # of a tied one: the head's gradient, the embedding's, and their sum
        yield moment("embedding", activations=stream, gradients=gradients + sums * facts.vocab * facts.hidden * FP32)
    yield moment("update", gradients=held.gradients(part.layers), update=held.update)
    if evaluation.tokens:
        activations, logits = evaluation_bytes(facts, evaluation)
        cached = copies if trained else head_copy + saved.copies
        given = evaluation.tokens * facts.vocab * evaluation.h if part.head and not in_pieces else 0
        logits = loss_bytes(facts, evaluation, preset.training.cross_entropy).forward if in_pieces else logits
        yield moment("evaluation", activations=activations, logits=given, copied=cached)
        yield moment("evaluation, loss", activations=stream, logits=logits if part.head else 0)
