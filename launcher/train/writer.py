"""Checkpoints written beside training: a copy in RAM, for which training waits, then files and commit in a thread.

What is in the files is ``state``'s business. At most one checkpoint is under way. Ranks learn of each other's progress in the sum that the
loop makes of every step anyway, since a thread that talked to other ranks could meet theirs in another order.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from launcher.checkpoint import Manifest, Reason
from launcher.run import Run
from launcher.train.engine import Engine
from launcher.train.pieces import Piece
from launcher.train.ranks import Ranks
from launcher.train.state import Contents, commit, contents, prepare, write


@dataclass(frozen=True)
class Committed:
    """A checkpoint that came to be."""

    manifest: Manifest | None
    """None on ranks other than 0."""
    blocked_s: float
    total_s: float


@dataclass
class _Flight:
    step: int
    reason: Reason
    epoch: int | None
    started_s: float
    blocked_s: float
    written: Future[None]
    """This rank's files."""
    manifest: Future[Manifest] | None = None
    """On rank 0, from when every rank has written."""


class Writer:
    """One rank's part. What it copies into is kept from one checkpoint to the next, page-locked where weights are on a GPU."""

    def __init__(self, run: Run, life: int, engine: Engine, ranks: Ranks) -> None:
        self._run, self._life, self._engine, self._ranks = run, life, engine, ranks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._copies: dict[str, torch.Tensor] = {}
        self._flight: _Flight | None = None

    def begin(self, step: int, reason: Reason, epoch: int | None, started_s: float) -> None:
        """Copy the state of ``step`` and let training go on, which waits since ``started_s``. Collective. Errors: those of ``prepare``."""
        assert self._flight is None, "finish comes first"
        folder = prepare(self._run, self._life, step, self._ranks)
        copy = self._copy(contents(step, self._engine))
        written = self._thread.submit(write, folder, copy)
        self._flight = _Flight(step, reason, epoch, started_s, time.perf_counter() - started_s, written)

    def progress(self) -> tuple[bool, bool, bool]:
        """Of this rank: has it written, has it failed, has it committed. To be summed over the ranks and given to ``heed``."""
        flight = self._flight
        if flight is None:
            return False, False, False
        written, committed = flight.written.done(), flight.manifest is not None and flight.manifest.done()
        # asked after done: what ends between the two questions has not written yet, rather than written without a failure
        futures = [*([flight.written] if written else []), *([flight.manifest] if committed else [])]
        return written, any(future is not None and future.exception() is not None for future in futures), committed

    def heed(self, written: float, failed: float, committed: float) -> Committed | None:
        """What the ranks' progress means; the same on all. Returns a checkpoint once it is committed. Errors: as ``finish``."""
        flight = self._flight
        if flight is None:
            return None
        if failed or committed:
            return self.finish()
        if written == self._ranks.world_size and self._ranks.is_first and flight.manifest is None:
            flight.manifest = self._commit(flight)
        return None

    def finish(self) -> Committed | None:
        """Wait for what is under way; None when nothing is. Collective.

        Errors, on every rank: what a rank's thread met there (RuntimeError on the others), after which nothing is under way.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        self._ranks.raise_together(_failure(flight.written), f"save step {flight.step}")
        manifest: Manifest | None = None
        failure: Exception | None = None
        if self._ranks.is_first:
            future = flight.manifest or self._commit(flight)
            failure = _failure(future)
            manifest = None if failure is not None else future.result()
        self._ranks.raise_together(failure, f"save step {flight.step}")
        return Committed(manifest, flight.blocked_s, time.perf_counter() - flight.started_s)

    def _commit(self, flight: _Flight) -> Future[Manifest]:
        sharded, world_size = self._engine.sharded, self._ranks.world_size
        return self._thread.submit(commit, self._run, self._life, flight.step, flight.reason, flight.epoch, sharded, world_size)

    def _copy(self, live: Contents) -> Contents:
        files = {name: {key: self._held(name, key, piece) for key, piece in pieces.items()} for name, pieces in live.files.items()}
        for device in {piece.tensor.device for pieces in live.files.values() for piece in pieces.values() if piece.tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return replace(live, files=files)

    def _held(self, name: str, key: str, piece: Piece) -> Piece:
        if not piece.written:
            return piece
        source, place = piece.tensor.detach(), f"{name}/{key}"
        copy = self._copies.get(place)
        if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._copies[place] = copy
        copy.copy_(source, non_blocking=True)
        return replace(piece, tensor=copy)


def _failure(future: Future[None] | Future[Manifest]) -> Exception | None:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return error
