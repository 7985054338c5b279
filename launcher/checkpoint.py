"""A checkpoint on disk: it exists or it does not. Standard library only (Python 3.9).

    checkpoints/.stage-<8 digits>-<life>/   being written
    checkpoints/step-<8 digits>/            manifest.json (sizes, SHA-256), COMMITTED (the marker, written last)

What is inside the files is the business of ``launcher.train``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.files import hash_file, sync_folder, write_json, write_text
from launcher.run import Run, may_commit, now

Reason = Literal["epoch", "steps", "minutes", "stop", "end"]

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"


@dataclass(frozen=True)
class Manifest:
    step: int
    life: int
    reason: Reason
    epoch: int | None
    """The epoch (from 1) that this step completed; None in the middle of one. Such checkpoints are kept by rotation."""
    world_size: int
    files: dict[str, dict[str, Any]]
    """Name below the folder → ``{"size": bytes, "sha256": hex}``."""
    time: str


def stage_folder(run: Run, step: int, life: int) -> Path:
    """Where rank 0 (and each rank that has a shard) writes before the commit."""
    return run.checkpoints / f".stage-{step:08d}-{life}"


def commit(run: Run, step: int, life: int, reason: Reason, epoch: int | None, world_size: int) -> Manifest:
    """Turn the stage folder into the checkpoint of ``step``: hash and flush its files, manifest, rename, marker.

    Called by one rank, after every rank has written. A checkpoint of the same step that is already committed stays.
    Errors: RuntimeError when a newer life owns the run; OSError from the file system, with the old checkpoints intact.
    """
    if not may_commit(run, life):
        raise RuntimeError(f"life {life} may not commit: a newer life owns {run.root}")
    stage, final = stage_folder(run, step, life), run.checkpoint(step)
    files = {}
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        files[path.relative_to(stage).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path, flush=True)}
    manifest = Manifest(step, life, reason, epoch, world_size, files, now())
    write_json(stage / MANIFEST, asdict(manifest))
    if (final / COMMITTED).exists():
        shutil.rmtree(stage)
        return read_manifest(final)
    if final.exists():
        shutil.rmtree(final)
    os.rename(stage, final)
    sync_folder(run.checkpoints)
    write_text(final / COMMITTED, f"{manifest.time}\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def committed(run: Run) -> list[Manifest]:
    """Committed checkpoints by step, lowest first. Not verified: see ``verify``."""
    found = []
    for marker in run.checkpoints.glob(f"step-*/{COMMITTED}"):
        try:
            found.append(read_manifest(marker.parent))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda manifest: manifest.step)


def verify(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """None when the files named (default: all of the manifest) are whole, else one line that says what is wrong."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, TypeError) as error:
        return f"{folder / MANIFEST}: {error}"
    for name in manifest.files if names is None else names:
        path, expected = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{path}: {size} bytes, the manifest has {expected['size']}"
            if hash_file(path) != expected["sha256"]:
                return f"{path}: its SHA-256 differs from the manifest"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


def rotate(run: Run, keep: int, keep_epochs: int | None) -> list[Path]:
    """Remove timed checkpoints beyond the newest ``keep`` (never below 2 checkpoints in all) and, when ``keep_epochs`` is
    set, epoch checkpoints beyond the newest ``keep_epochs``. By step, never by time. Returns what was removed.
    """
    manifests = committed(run)
    timed = [manifest for manifest in manifests if manifest.epoch is None]
    epochs = [manifest for manifest in manifests if manifest.epoch is not None]
    doomed = timed[: -keep if keep else None]
    if keep_epochs is not None:
        doomed += epochs[: -keep_epochs if keep_epochs else None]
    newest = {manifest.step for manifest in manifests[-2:]}
    removed = []
    for manifest in doomed:
        if manifest.step in newest:
            continue
        folder = run.checkpoint(manifest.step)
        (folder / COMMITTED).unlink()
        shutil.rmtree(folder)
        removed.append(folder)
    return removed


def sweep_stages(run: Run) -> None:
    """Remove what an earlier life left half-written."""
    for folder in run.checkpoints.glob(".stage-*"):
        shutil.rmtree(folder, ignore_errors=True)
