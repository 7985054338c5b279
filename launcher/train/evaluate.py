"""The evaluation loss: cross-entropy over all targets of the evaluation samples, divided by their number. Deterministic, no dropout."""

from __future__ import annotations

import numpy as np
import torch

from launcher.plan import Plan, rank_slices
from launcher.train.batches import Samples, collate
from launcher.train.engine import Engine
from launcher.train.order import micro_slices
from launcher.train.ranks import Ranks
from launcher.train.stop import Stop


@torch.no_grad()
def evaluate(plan: Plan, engine: Engine, samples: Samples, ranks: Ranks, stop: Stop) -> float | None:
    """Samples are shared out over the ranks. None when a stop was asked for on any rank, which is looked at after each micro step."""
    micro_batch, packing = plan.preset["evaluation"]["micro_batch"], plan.preset["data"]["packing"]
    largest = rank_slices(len(samples), ranks.world_size)[0]
    micro_steps = -(-(largest.stop - largest.start) // micro_batch)
    engine.wrapped.eval()
    total, stopped = 0.0, False
    for indices in micro_slices(np.arange(len(samples)), ranks.rank, ranks.world_size, micro_steps):
        batch = collate(samples, indices.tolist(), packing, plan.preset["training"]["sequence_length"])
        total += engine.loss_sum(batch).item()
        if ranks.any(stop.requested):
            stopped = True
            break
    engine.wrapped.train()
    return None if stopped else ranks.sum([total])[0] / int(samples.num_targets.sum())
