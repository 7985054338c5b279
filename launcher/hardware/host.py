"""How much RAM a node needs at its worst moment. Pure.

Anonymous memory only: pages of files (weights, data, checkpoints are mapped) can be dropped when RAM runs short.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware.disk import optimizer_bytes, weight_bytes
from launcher.plan import Layout
from launcher.preset.model import ModelFacts, layer_matrices, outer_matrices
from launcher.preset.schema import Preset

GIB = 1024**3
RANK_GIB = 0.6
"""Python, torch, transformers, datasets, peft: 0.42 resident after import (Python 3.11, torch 2.13 for CPU), and some to work with."""
RANK_GPU_GIB = 2.5
"""With CUDA's libraries and its context on the host's side. Assumed: nobody has measured it here."""


@dataclass(frozen=True)
class Host:
    """GiB on one node, beside what the ranks hold on GPUs."""

    processes: float
    loading: float
    """The model in RAM before it is on its GPU: nothing but the largest weight, since weights go from the mapped file to the GPU; the
    whole model where it is cut in RAM first."""
    computing: float
    """What ranks compute with on CPU, and what is offloaded from GPUs."""
    saving: float
    """Rank 0's copy of the weights while a checkpoint is written; where they are sharded, each rank's of its shard."""
    resuming: float
    """The optimizer's state, which every rank reads: whole, or its shard of it."""
    snapshot: float
    """Asynchronous checkpoints: what rank 0 (sharded: each rank) copies of weights and optimizer state, kept for the next one; of
    tensors on a GPU page-locked (``page_locked_share``)."""
    ram_disk: float
    """What lies in a folder that is RAM, e.g. an unpacked image in /tmp."""

    @property
    def peak(self) -> float:
        return self.processes + self.computing + self.snapshot + max(self.loading, self.saving, self.resuming) + self.ram_disk


def predict_host(preset: Preset, facts: ModelFacts, layout: Layout, *, computed_gib: float = 0.0, ram_disk_gib: float = 0.0) -> Host:
    """``computed_gib``: of each rank on CPU."""
    ranks, on_gpu = layout.ranks_per_node, layout.gpus_per_node > 0
    weights, state = weight_bytes(preset, facts) / GIB, optimizer_bytes(preset, facts) / GIB
    largest = max(matrix.rows * matrix.columns for matrix in outer_matrices(facts)) * 4 / GIB
    share = ranks / layout.world_size
    sharded = preset.parallelism in ("fsdp", "zero1", "zero2", "zero3")
    offloaded = 0.0
    if preset.offload != "none":
        offloaded = share * (state + weights * (2 if preset.offload == "all" else 1))
    snapshot = (weights + state) * (share if sharded else 1.0) if preset.checkpoint.asynchronous else 0.0
    if not on_gpu:  # tensors are in RAM already and are written from where they lie
        return Host(ranks * RANK_GIB, 0.0, ranks * computed_gib, 0.0, ranks * state, snapshot, ram_disk_gib)
    snapshot *= page_locked_share(facts, layout.world_size if sharded else 1)
    saving = weights * share if sharded else weights
    resuming = state * share if sharded else ranks * state
    whole_gib = facts.parameters * 4 / GIB
    # FSDP2's ranks of a node load one after the other, ZeRO 3's at once; then a shard stays on the GPU
    loading = {"fsdp": whole_gib, "zero3": ranks * whole_gib}.get(preset.parallelism, ranks * largest)
    return Host(ranks * RANK_GPU_GIB, loading, offloaded, saving, resuming, snapshot, ram_disk_gib)


def page_locked_share(facts: ModelFacts, shards: int) -> float:
    """RAM that torch takes for page-locked copies of all matrices ÷ their bytes: it rounds each up to a power of two.

    Between 1 and 2. Source: torch's ``CachingHostAllocator``, whose blocks are ``llvm::PowerOf2Ceil`` of what is asked for.
    """
    sizes = [matrix.rows * matrix.columns * 4 // shards for matrix in layer_matrices(facts)] * facts.layers
    sizes += [matrix.rows * matrix.columns * 4 // shards for matrix in outer_matrices(facts)]
    return sum(1 << (size - 1).bit_length() for size in sizes) / sum(sizes)


def careless_loading_gib(facts: ModelFacts, ranks_per_node: int = 1) -> float:
    """What loading takes when each rank builds the whole model in fp32 in RAM before it moves it: not our way, but many a script's."""
    return ranks_per_node * facts.parameters * 4 / GIB
