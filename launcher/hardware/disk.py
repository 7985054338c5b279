"""What a run's checkpoints take of disk, from the shapes of the model. The image, the staged model and the data are not in it.

checkpoint = weights + optimizer state
weights:    4 bytes a parameter (fp32, bf16, fp16: fp32 masters), 2 for bf16_pure; with LoRA the adapters' parameters only
optimizer:  adamw, adamw_fused 8 bytes a trained parameter (bf16_pure 4), adamw_8bit 2, adafactor 4 × (rows + columns) of a matrix and
            4 a vector entry;
            under ZeRO adafactor is not factored (DeepSpeed flattens parameters): 4 bytes a parameter
total     = checkpoint × (those that are kept + the one being written) + the final model
"""

from __future__ import annotations

import math

from launcher.plan import Disk
from launcher.preset.model import ModelFacts, layer_matrices, num_adapter_parameters, num_vector_parameters, outer_matrices
from launcher.preset.schema import Lora, Preset

GIB = 1024**3
FILES_PER_CHECKPOINT = 6
"""Weights, optimizer, position in the run, one to spare, manifest, marker."""
FILES_BESIDE = 200
"""Code, logs, exit records, final model, report."""


def predict_disk(preset: Preset, facts: ModelFacts) -> Disk:
    weights, state = weight_bytes(preset, facts), optimizer_bytes(preset, facts)
    checkpoint = weights + state
    kept = num_kept(preset) + 1
    return Disk(
        checkpoint_gib=round(checkpoint / GIB, 3),
        total_gib=round((checkpoint * kept + weights) / GIB, 3),
        files=kept * FILES_PER_CHECKPOINT + FILES_BESIDE,
    )


def weight_bytes(preset: Preset, facts: ModelFacts) -> int:
    return num_trained(preset, facts) * (2 if preset.training.dtype == "bf16_pure" else 4)


def optimizer_bytes(preset: Preset, facts: ModelFacts) -> int:
    trained = num_trained(preset, facts)
    if preset.training.optimizer in ("adamw", "adamw_fused"):
        return trained * (4 if preset.training.dtype == "bf16_pure" else 8)
    if preset.training.optimizer == "adamw_8bit":
        return trained * 2
    if preset.parallelism in ("zero1", "zero2", "zero3"):
        return trained * 4
    if isinstance(preset.adapter, Lora):
        return trained * 4  # the adapters' short sides are so short that this is the right size
    layer = sum(matrix.rows + matrix.columns for matrix in layer_matrices(facts))
    outer = sum(matrix.rows + matrix.columns for matrix in outer_matrices(facts))
    return 4 * (facts.layers * layer + outer + num_vector_parameters(facts))


def num_trained(preset: Preset, facts: ModelFacts) -> int:
    if isinstance(preset.adapter, Lora):
        return num_adapter_parameters(facts, preset.adapter)
    return facts.parameters


def num_kept(preset: Preset) -> int:
    """Checkpoints that lie on disk at the end: those of epochs, and the newest of the others; never fewer than 2."""
    rule = preset.checkpoint
    epochs = math.ceil(preset.training.epochs)
    kept = min(epochs, rule.keep_epochs or epochs) if rule.every == "epoch" else 0
    if rule.every not in ("epoch", "never") or rule.minutes is not None:
        kept += rule.keep
    return max(kept, 2)
