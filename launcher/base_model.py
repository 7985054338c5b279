"""Which model an adapter belongs to: ``base_model.json``, beside the run's checkpoints and beside its final adapter.

An adapter's checkpoint holds what is trained and nothing else; this note is how a later life, or an export, knows that the weights
below are still the same ones. Standard library only (Python 3.9).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.files import write_json
from launcher.plan import Plan, Staged

BASE_MODEL = "base_model.json"

BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""What is read of each file of weights. Other weights differ all over, so samples tell them apart; a flipped byte is not found."""


@dataclass(frozen=True)
class BaseModel:
    name: str
    """Repository on the hub, or the folder that the weights were read from."""
    revision: str
    """Commit on the hub; empty for a folder and for a random start."""
    folder: str
    """Where the weights lay while the adapter was trained."""
    weights: str
    """``fingerprint`` of that folder, 64 hex digits."""


def base_of(plan: Plan, staged: Staged) -> BaseModel:
    return BaseModel(plan.preset["model"]["name"] or staged.model, staged.model_revision, staged.model, fingerprint(Path(staged.model)))


def fingerprint(folder: Path) -> str:
    """Hash of names, sizes and evenly spaced samples of the weights; milliseconds for any size. Errors: OSError."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def write_base(base: BaseModel, folder: Path) -> None:
    write_json(folder / BASE_MODEL, asdict(base))


def read_base(folder: Path) -> BaseModel | None:
    """None where there is no note. Errors: ValueError, TypeError when it is damaged."""
    try:
        text = (folder / BASE_MODEL).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return BaseModel(**json.loads(text))
