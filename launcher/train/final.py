"""The final model: a folder that ``from_pretrained`` loads (an adapter's, for LoRA), there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from launcher.files import sync_folder
from launcher.run import Run
from launcher.supported import TOKENIZER_FILES
from launcher.train.engine import Engine
from launcher.train.ranks import Ranks
from launcher.train.state import require_ownership


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
    engine.model.save_pretrained(folder, **({"save_embedding_layers": False} if adapter else {}))
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
