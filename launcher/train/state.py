"""Saving and restoring the state of training. What a checkpoint is on disk is the business of ``launcher.checkpoint``.

model.safetensors       the trained parameters: all of them, or the adapter's
optimizer.safetensors   the tensors of the optimizer's state, as parameter/entry
trainer.json            step, loss scaler, the optimizer's plain numbers

Where ranks hold different parts each writes its own, ``model-00001-of-00004.safetensors``, and any number of ranks reads them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import checkpoint
from launcher.checkpoint import COMMITTED, Manifest, Reason
from launcher.errors import RunFailed
from launcher.files import sync_folder
from launcher.run import Run, may_commit
from launcher.train.engine import Engine, fill
from launcher.train.pieces import Piece, PieceFiles, write_pieces
from launcher.train.ranks import Ranks

LOG = logging.getLogger("launcher.train")

MODEL, OPTIMIZER, TRAINER = "model", "optimizer", "trainer.json"

VISIBLE_S = 120
"""How long rank 0 waits for files of other nodes to appear: network file systems hide new ones for up to a minute."""


def save(run: Run, life: int, step: int, reason: Reason, epoch: int | None, engine: Engine, ranks: Ranks) -> Manifest | None:
    """Write and commit the checkpoint of ``step``. Collective: every rank raises when one of those that write meets an error.

    Returns the manifest on rank 0. Errors: RunFailed when a newer life owns the run; OSError from the file system.
    """
    manifest: Manifest | None = None
    failure: Exception | None = None
    folder = prepare(run, life, step, ranks)
    try:
        write(folder, contents(step, engine))
    except Exception as error:
        failure = error
    ranks.raise_together(failure, f"save step {step}")
    if ranks.is_first:
        try:
            manifest = commit(run, life, step, reason, epoch, engine.sharded, ranks.world_size)
        except Exception as error:
            failure = error
    ranks.raise_together(failure, f"save step {step}")
    return manifest


@dataclass(frozen=True)
class Contents:
    """What one rank writes of a checkpoint."""

    files: dict[str, dict[str, Piece]]
    """Name of a file → its tensors, live."""
    trainer: str | None
    """The text of ``trainer.json``; None where another rank writes it."""


def prepare(run: Run, life: int, step: int, ranks: Ranks) -> Path:
    """The empty folder that the checkpoint is written into. Collective. Errors: as ``save``."""
    failure: Exception | None = None
    folder = checkpoint.stage_folder(run, step, life)
    if ranks.is_first:
        try:
            require_ownership(run, life)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except Exception as error:
            failure = error
    ranks.raise_together(failure, f"save step {step}")
    return folder


def contents(step: int, engine: Engine) -> Contents:
    """What this rank writes: nothing where rank 0 has all."""
    names = _names(engine.sharded, engine.world_size, engine.rank)
    if not names:
        return Contents({}, None)
    state, numbers = engine.optimizer_state()
    model_file, optimizer_file = names
    scaler = engine.scaler
    trainer = {"version": 2, "step": step, "scaler": None if scaler is None else scaler.state_dict(), "optimizer": numbers}
    return Contents({model_file: engine.weights(), optimizer_file: state}, json.dumps(trainer) if engine.rank == 0 else None)


def write(folder: Path, written: Contents) -> None:
    for name, pieces in written.files.items():
        write_pieces(folder / name, pieces)
    if written.trainer is not None:
        (folder / TRAINER).write_text(written.trainer, encoding="utf-8")


def commit(run: Run, life: int, step: int, reason: Reason, epoch: int | None, sharded: bool, world_size: int) -> Manifest:
    """On rank 0, after every rank has written. Errors: as ``checkpoint.commit``; FileNotFoundError when a rank's file is not there."""
    names = [name for rank in range(world_size) for name in _names(sharded, world_size, rank)]
    _await(checkpoint.stage_folder(run, step, life), names)
    return checkpoint.commit(run, step, life, reason, epoch, world_size)


def restore(run: Run, life: int, engine: Engine, ranks: Ranks) -> int:
    """Load the highest checkpoint that verifies into the engine; returns its step, 0 when the run has no checkpoint at all.

    Rank 0 verifies and all ranks go by its choice. Errors: RunFailed when there are checkpoints but none is good.
    """
    chosen = 0
    refused: list[str] = []
    if ranks.is_first:
        require_ownership(run, life)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep_stages(run)
        chosen, refused = _newest_good(run)
        for line in refused:
            LOG.warning("checkpoint refused: %s", line)
    chosen = ranks.from_first(chosen)
    if chosen < 0:
        detail = f": {refused[0]}" if refused else ""
        raise RunFailed(
            f"no checkpoint in {run.checkpoints} is whole{detail}", code="no-good-checkpoint", hint="start again with submit --new"
        )
    if ranks.is_first and refused:
        _set_aside(run, life, chosen)
    if chosen:
        _read(run.checkpoint(chosen), chosen, engine)
        LOG.info("continuing after step %d", chosen)
    return chosen


def require_ownership(run: Run, life: int) -> None:
    """Errors: RunFailed when a newer life owns the run, whose files this one must not touch."""
    if not may_commit(run, life):
        raise RunFailed(f"a newer life than {life} owns {run.root}", code="older-life")


def checkpoint_weights(folder: Path) -> PieceFiles:
    """The trained parameters in a checkpoint, whoever wrote it."""
    return PieceFiles(sorted(folder.glob(f"{MODEL}*.safetensors")))


def _read(folder: Path, step: int, engine: Engine) -> None:
    trainer: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    if trainer["step"] != step:
        raise RunFailed(f"{folder} is of step {trainer['step']}", code="foreign-checkpoint")
    engine.create_optimizer_state()
    state, _ = engine.optimizer_state()
    weights = engine.weights()
    for kind, pieces in ((MODEL, weights), (OPTIMIZER, state)):
        with PieceFiles(sorted(folder.glob(f"{kind}*.safetensors"))) as files:
            expected = {name: piece.shape for name, piece in pieces.items()}
            if {name: files.shapes.get(name) for name in expected} != expected or (
                not engine.sharded and files.shapes.keys() != expected.keys()
            ):
                wrong = sorted(name for name in files.shapes.keys() | expected.keys() if files.shapes.get(name) != expected.get(name))
                raise RunFailed(f"{folder} is not of this run: other {kind}, e.g. {wrong[0]}", code="foreign-checkpoint")
            fill(pieces, files.read)
    engine.set_numbers(trainer["optimizer"])
    engine.weights_changed()
    if engine.scaler is not None:
        engine.scaler.load_state_dict(trainer["scaler"])


def _names(sharded: bool, world_size: int, rank: int) -> list[str]:
    """Files of tensors that ``rank`` writes."""
    if sharded:
        return [f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors" for kind in (MODEL, OPTIMIZER)]
    return [f"{kind}.safetensors" for kind in (MODEL, OPTIMIZER)] if rank == 0 else []


def _await(folder: Path, names: Collection[str]) -> None:
    """Errors: FileNotFoundError when a file that another rank has written does not appear."""
    deadline_s = time.monotonic() + VISIBLE_S
    while missing := sorted(set(names) - set(os.listdir(folder))):
        if time.monotonic() > deadline_s:
            raise FileNotFoundError(f"{folder / missing[0]}: written by its rank, but not to be seen here")
        time.sleep(0.5)


def _newest_good(run: Run) -> tuple[int, list[str]]:
    """The highest step that verifies (0: no checkpoints, −1: none is good) and what was wrong with higher ones."""
    markers = sorted(run.checkpoints.glob(f"step-*/{COMMITTED}"), reverse=True)
    refused: list[str] = []
    for folder in (marker.parent for marker in markers):
        problem = _problem(folder)
        if problem is None:
            return int(folder.name.partition("-")[2]), refused
        refused.append(problem)
    return (-1 if refused else 0), refused


def _problem(folder: Path) -> str | None:
    problem = checkpoint.verify(folder)
    if problem is None and not _complete(checkpoint.read_manifest(folder).files.keys()):
        return f"{folder}: incomplete, model, optimizer and trainer state belong together"
    return problem


def _complete(names: Collection[str]) -> bool:
    """Whether there is trainer state and, of model and optimizer, the only file or every part."""
    parts = [match for match in (re.fullmatch(r"(model|optimizer)-\d{5}-of-(\d{5})\.safetensors", name) for name in names) if match]
    whole = [kind for kind in (MODEL, OPTIMIZER) if f"{kind}.safetensors" in names]
    numbers = {kind: [int(match[2]) for match in parts if match[1] == kind] for kind in (MODEL, OPTIMIZER)}
    return TRAINER in names and all(kind in whole or (numbers[kind] and len(numbers[kind]) == numbers[kind][0]) for kind in numbers)


def _set_aside(run: Run, life: int, good_step: int) -> None:
    """Rename what was refused, so that this life can commit these steps again and nobody takes them for checkpoints."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    for folder in [marker.parent for marker in run.checkpoints.glob(f"step-*/{COMMITTED}")]:
        step = int(folder.name.partition("-")[2])
        if step > good_step:
            os.rename(folder, run.checkpoints / f"refused-{folder.name}-{life}-{stamp}")
            run.append_event("checkpoint_refused", life=life, step=step)
    sync_folder(run.checkpoints)
