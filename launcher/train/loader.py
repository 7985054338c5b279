"""The micro batches of a step, made ready beside the step before. Which samples they hold is the order's business."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch

from launcher.plan import Plan
from launcher.train.batches import MicroBatch, Samples, collate
from launcher.train.order import Order, micro_slices
from launcher.train.ranks import Ranks


class Loader:
    """One rank's micro batches, in page-locked memory where they go to a GPU.

    A thread and not processes: a step's samples are read from mapped memory in milliseconds, and nothing random is drawn.
    """

    def __init__(self, samples: Samples, order: Order, plan: Plan, ranks: Ranks) -> None:
        self._samples, self._order, self._plan, self._ranks = samples, order, plan, ranks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def load(self, step: int) -> Sequence[MicroBatch]:
        """Of each micro step; the next step's are begun. Errors: those of ``collate``."""
        ready = self._ahead.pop(step, None) or self._thread.submit(self._collate, step)
        if step < self._order.total_steps:
            self._ahead[step + 1] = self._thread.submit(self._collate, step + 1)
        return ready.result()

    def _collate(self, step: int) -> list[MicroBatch]:
        preset, batch = self._plan.preset, self._plan.batch
        indices = self._order.stream(*self._order.span(step))
        shares = micro_slices(indices, self._ranks.rank, self._ranks.world_size, batch.micro_steps)
        assert max(map(len, shares)) <= batch.micro_batch, "the plan's micro steps hold the step's samples"
        if len(indices) == batch.effective_batch:
            planned = batch.samples_per_micro_step[self._ranks.rank]
            assert tuple(map(len, shares)) == planned, f"micro batches of {tuple(map(len, shares))}, the plan has {planned}"
        made = [
            collate(self._samples, share.tolist(), preset["data"]["packing"], preset["training"]["sequence_length"]) for share in shares
        ]
        return [_pinned(each) for each in made] if self._ranks.device.type == "cuda" else made


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Without waiting for what the GPU still computes. Masks and borders stay where they are: attention makes its own of them on CPU."""
    return replace(
        batch,
        input_ids_BS=batch.input_ids_BS.to(device, non_blocking=True),
        targets_BS=batch.targets_BS.to(device, non_blocking=True),
        position_ids_BS=None if batch.position_ids_BS is None else batch.position_ids_BS.to(device, non_blocking=True),
    )


def _pinned(batch: MicroBatch) -> MicroBatch:
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    pinned: dict[str, Any] = {name: value.pin_memory() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(batch, **pinned)
