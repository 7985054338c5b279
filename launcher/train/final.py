"""The final model: a folder that ``from_pretrained`` loads (an adapter's, for LoRA), there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from launcher.base_model import BASE_MODEL
from launcher.checkpoint import committed
from launcher.files import sync_folder
from launcher.run import Run
from launcher.supported import TOKENIZER_FILES
from launcher.train.engine import Engine
from launcher.train.ranks import Ranks
from launcher.train.state import checkpoint_weights, require_ownership


def save_final(run: Run, life: int, engine: Engine, staged_model: Path, ranks: Ranks, *, adapter: bool) -> None:
    """Write ``run.model``; collective, rank 0 writes. Errors: RunFailed when a newer life owns the run; OSError on rank 0."""
    failure: Exception | None = None
    if ranks.is_first:
        try:
            require_ownership(run, life)
            _write(run, life, engine, staged_model, adapter=adapter)
        except Exception as error:
            failure = error
    ranks.raise_together(failure, "write the final model")


def _write(run: Run, life: int, engine: Engine, staged_model: Path, *, adapter: bool) -> None:
    folder = run.root / f".model-{life}"
    shutil.rmtree(folder, ignore_errors=True)
    arguments: dict[str, Any] = {"save_embedding_layers": False} if adapter else {}
    if engine.sharded:  # the last checkpoint has them all, so nobody needs to gather them
        with checkpoint_weights(run.checkpoint(committed(run)[-1].step)) as weights:
            arguments["state_dict"] = {name: weights.whole(name) for name in weights.shapes}
    engine.model.save_pretrained(folder, **arguments)
    if adapter:
        shutil.copyfile(run.root / BASE_MODEL, folder / BASE_MODEL)
    # copied, not loaded and saved: another version of the libraries would write the tokenizer in its own way
    for name in TOKENIZER_FILES:
        if (staged_model / name).exists():
            shutil.copyfile(staged_model / name, folder / name)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(run.model, ignore_errors=True)
    os.rename(folder, run.model)
    sync_folder(run.root)
