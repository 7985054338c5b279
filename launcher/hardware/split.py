"""``device_map``: which layers a GPU gets, as accelerate's balanced split deals them out. The training asks accelerate; a test compares."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.preset.model import ModelFacts, layer_matrices, num_vector_parameters, outer_matrices

_FP32 = 4
_MARGIN = 1.25
"""accelerate's ``get_balanced_memory``: each GPU may hold its even share and 1.25 of the largest block."""


@dataclass(frozen=True)
class Part:
    """What one GPU holds of a model."""

    layers: int
    embedding: bool
    head: bool
    """The head, and the final norm; a tied head lies with the embedding."""


def whole(facts: ModelFacts) -> Part:
    return Part(facts.layers, True, True)


def split(facts: ModelFacts, gpus: int, budget: float) -> list[Part] | None:
    """In order of the GPUs; a GPU may hold nothing. ``budget``: bytes of fp32 weights that each may hold. None when they do not fit."""
    norm = facts.hidden * (1 if facts.architecture == "llama" else 2)
    vectors = (num_vector_parameters(facts) - norm) // facts.layers
    layer = _FP32 * (sum(m.rows * m.columns for m in layer_matrices(facts)) + vectors)
    embedding = [_FP32 * m.rows * m.columns for m in outer_matrices(facts) if m.name != "head"]
    head = 0 if facts.tied else _FP32 * facts.vocab * facts.hidden
    total = facts.layers * layer + sum(embedding) + head + _FP32 * norm
    if gpus == 1:
        return [whole(facts)] if total <= budget else None
    modules = facts.layers * (len(layer_matrices(facts)) + 2) + len(embedding) + 1 + (head > 0)
    even = min(budget, total // gpus + int(_MARGIN * max(layer, total // modules)))

    blocks = [*[("embedding", size) for size in embedding], *[("layer", layer)] * facts.layers, ("norm", _FP32 * norm)]
    if head:
        blocks.append(("head", head))
    held: list[list[str]] = [[] for _ in range(gpus)]
    gpu, used = 0, 0.0
    for index, (name, size) in enumerate(blocks):
        # on the first GPU accelerate keeps room for the largest block that is still to come
        while True:
            limit = (even if gpu < gpus - 1 else budget) - (max((later for _, later in blocks[index + 1 :]), default=0) if gpu == 0 else 0)
            if used + size <= limit:
                break
            gpu, used = gpu + 1, 0.0
            if gpu == gpus:
                return None
        held[gpu].append(name)
        used += size
    return [Part(names.count("layer"), "embedding" in names, "embedding" in names if facts.tied else "head" in names) for names in held]
