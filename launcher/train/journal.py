"""What rank 0 writes down while training: metrics, events, a line in its log. Every record asks first whether the run is still ours."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

from launcher import metrics
from launcher.checkpoint import Manifest
from launcher.metrics import Kind
from launcher.run import Run, may_commit
from launcher.train.ranks import Ranks
from launcher.train.tracking import Tracking

LOG = logging.getLogger("launcher.train")


@dataclass(frozen=True)
class Journal:
    run: Run
    life: int
    ranks: Ranks
    tracking: Tracking | None = None

    def outdated(self) -> bool:
        """Whether a newer life owns the run; only rank 0 looks."""
        return self.ranks.is_first and not may_commit(self.run, self.life)

    def record(self, kind: Kind, step: int, **values: Any) -> None:
        if self.ranks.is_first and may_commit(self.run, self.life):
            metrics.append(self.run.metrics_file, kind, step=step, **values, life=self.life)
            if self.tracking is not None:
                self.tracking.log(kind, step, values)

    def event(self, event: str, **details: Any) -> None:
        if self.ranks.is_first and may_commit(self.run, self.life):
            self.run.append_event(event, life=self.life, job_id=os.environ.get("SLURM_JOB_ID"), **details)

    def say(self, text: str, *values: object) -> None:
        if self.ranks.is_first:
            LOG.info(text, *values)

    def checkpoint(self, manifest: Manifest | None, blocked_s: float, total_s: float) -> None:
        """``manifest``: None on ranks other than 0. ``blocked_s``: training waited; ``total_s``: until it was known to be committed."""
        if manifest is not None:
            size = sum(int(file["size"]) for file in manifest.files.values())
            self.record("checkpoint", manifest.step, blocked_s=blocked_s, total_s=total_s, bytes=size)
            self.event("checkpoint", step=manifest.step, reason=manifest.reason, epoch=manifest.epoch)
            self.say("step %d: checkpoint (%s), %.1f MB in %.1f s", manifest.step, manifest.reason, size / 1e6, total_s)

    def evaluated_steps(self) -> set[int]:
        """Steps whose evaluation loss is on record."""
        return {record["step"] for record in metrics.read(self.run.metrics_file, "eval")}


def finite(value: float) -> float | None:
    """None for infinities and NaN, which JSON cannot hold (a step that fp16's loss scaling skips has such a norm)."""
    return value if math.isfinite(value) else None
