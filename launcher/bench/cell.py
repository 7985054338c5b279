"""A cell of the sweep and the row that comes of it, as ``rows.jsonl`` keeps them. Standard library only (Python 3.9)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from launcher.files import append_line, read_json_lines

Outcome = Literal["measured", "skipped", "out of memory", "failed"]

READY = "@ready"
"""A contender's line that it wants its next turn."""

BACKENDS = ("flash", "efficient", "math", "cudnn")
"""Of torch's sdpa: ``sdpa:flash`` allows it that one only. Plain ``sdpa`` lets torch choose, as training does."""


@dataclass(frozen=True)
class Cell:
    sequence_length: int
    attention: str
    """As in a preset, or ``sdpa:`` and one of ``BACKENDS``."""
    checkpointing: str
    adapter: str
    """none, or the kind of adapter."""
    micro_batch: int

    @property
    def name(self) -> str:
        words = (self.sequence_length, self.attention.replace(":", "-"), self.checkpointing, self.adapter, self.micro_batch)
        return "-".join(map(str, words))

    @property
    def kernel(self) -> tuple[str, str]:
        """The preset's attention, and the backend of sdpa that alone is allowed; empty for torch's choice."""
        attention, _, backend = self.attention.partition(":")
        return attention, backend


@dataclass(frozen=True)
class Row:
    """What became of a cell. Rates are per GPU, or per machine on CPU; None where nothing was measured or no figure is known."""

    cell: Cell
    outcome: Outcome
    reason: str = ""
    gradient_accumulation: int = 0
    world_size: int = 1
    steps: int = 0
    step_s: float | None = None
    """Median over ``steps`` optimizer steps."""
    step_s_lowest: float | None = None
    step_s_highest: float | None = None
    samples_per_s: float | None = None
    """Of all GPUs together."""
    tokens_per_s: float | None = None
    """Computed, pads included."""
    useful_tokens_per_s: float | None = None
    """Targets: positions whose next token is trained on."""
    useful_share: float | None = None
    """Useful over computed."""
    mfu: float | None = None
    """(6·N + 12·L·d·S) × computed tokens/s ÷ dense peak of the dtype, S the computed tokens of a sample; None on CPU."""
    memory_gib: float | None = None
    """Peak of the fullest GPU as torch reserved it; on CPU the peak resident memory of the largest process."""
    allocated_gib: float | None = None
    """Peak of what tensors took; None on CPU."""
    predicted_memory_gib: float | None = None
    predicted_step_s: float | None = None
    trained_parameters: int | None = None
    parameters: int | None = None
    device: str = ""
    """As its driver or the system names it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    setting: str = ""
    """Digest of what all cells of its bench have in common; a bench with another one does not take this row for its own."""

    @property
    def trainable_share(self) -> float | None:
        return None if not self.parameters or self.trained_parameters is None else self.trained_parameters / self.parameters


@dataclass(frozen=True)
class Spread:
    median: float
    lowest: float
    highest: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def append_row(file: Path, row: Row) -> None:
    append_line(file, json.dumps(to_json(row)))


def read_rows(file: Path) -> list[Row]:
    """One row a cell; the last one that was written counts."""
    if not file.exists():
        return []
    rows = [Row(**{**value, "cell": Cell(**value["cell"])}) for value in map(_without_derived, read_json_lines(file))]
    return list({row.cell: row for row in rows}.values())


def to_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "trainable_share": row.trainable_share}


def _without_derived(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in value.items() if name != "trainable_share"}
