"""Saving and restoring the state of training. What a checkpoint is on disk is the business of ``launcher.checkpoint``.

model.safetensors   the trained parameters in fp32: all of them, or the adapter's
optimizer.pt        the optimizer's state
trainer.json        step, loss scaler
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from launcher import checkpoint
from launcher.checkpoint import COMMITTED, Manifest, Reason
from launcher.errors import RunFailed
from launcher.files import sync_folder
from launcher.run import Run, may_commit
from launcher.train.engine import Engine
from launcher.train.ranks import Ranks

LOG = logging.getLogger("launcher.train")

MODEL, OPTIMIZER, TRAINER = "model.safetensors", "optimizer.pt", "trainer.json"


def save(run: Run, life: int, step: int, reason: Reason, epoch: int | None, engine: Engine, ranks: Ranks) -> Manifest | None:
    """Write and commit the checkpoint of ``step``. Collective: every rank raises when rank 0, which writes, meets an error.

    Returns the manifest on rank 0. Errors: RunFailed when a newer life owns the run; OSError from the file system on rank 0.
    """
    manifest: Manifest | None = None
    failure: Exception | None = None
    if ranks.is_first:
        try:
            require_ownership(run, life)
            _write(checkpoint.stage_folder(run, step, life), step, engine)
        except Exception as error:
            failure = error
    ranks.raise_together(failure, f"save step {step}")
    if ranks.is_first:
        try:
            manifest = checkpoint.commit(run, step, life, reason, epoch, ranks.world_size)
        except Exception as error:
            failure = error
    ranks.raise_together(failure, f"save step {step}")
    return manifest


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


def trained_parameters(engine: Engine) -> dict[str, torch.nn.Parameter]:
    """Name → parameter; tied ones once."""
    return {name: parameter for name, parameter in engine.model.named_parameters() if parameter.requires_grad}


def _write(folder: Path, step: int, engine: Engine) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {name: parameter.detach().to("cpu", torch.float32).contiguous() for name, parameter in trained_parameters(engine).items()}
    safetensors.torch.save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    torch.save(engine.optimizer.optimizer.state_dict(), folder / OPTIMIZER)
    scaler = engine.accelerator.scaler
    trainer = {"version": 1, "step": step, "scaler": None if scaler is None else scaler.state_dict()}
    (folder / TRAINER).write_text(json.dumps(trainer), encoding="utf-8")


def _read(folder: Path, step: int, engine: Engine) -> None:
    trainer: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(folder / MODEL)
    parameters = trained_parameters(engine)
    if trainer["step"] != step or tensors.keys() != parameters.keys():
        raise RunFailed(f"{folder} is not of this run: other step or other parameters", code="foreign-checkpoint")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise RunFailed(f"{folder}: {name} has shape {tuple(tensors[name].shape)}", code="foreign-checkpoint")
            parameter.copy_(tensors[name])
    engine.optimizer.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
    if engine.accelerator.scaler is not None:
        engine.accelerator.scaler.load_state_dict(trainer["scaler"])


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
    if problem is None and not {MODEL, OPTIMIZER, TRAINER} <= checkpoint.read_manifest(folder).files.keys():
        return f"{folder}: incomplete, model, optimizer and trainer state belong together"
    return problem


def _set_aside(run: Run, life: int, good_step: int) -> None:
    """Rename what was refused, so that this life can commit these steps again and nobody takes them for checkpoints."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    for folder in [marker.parent for marker in run.checkpoints.glob(f"step-*/{COMMITTED}")]:
        step = int(folder.name.partition("-")[2])
        if step > good_step:
            os.rename(folder, run.checkpoints / f"refused-{folder.name}-{life}-{stamp}")
            run.append_event("checkpoint_refused", life=life, step=step)
    sync_folder(run.checkpoints)
