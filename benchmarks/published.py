"""The rows of ``published.yaml`` as what the planner takes: a preset, facts, hardware, layout and batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from launcher.hardware.step import FITTED, Fitted, StepParts, step_parts
from launcher.plan import Batch, Layout, rank_slices
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.reading import read_hardware, read_model_facts
from launcher.preset.schema import Preset

FILE = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True)
class Row:
    name: str
    source: str
    use: str
    """fit or test."""
    notes: str
    published_s: float
    preset: Preset
    facts: ModelFacts
    hardware: Hardware
    layout: Layout
    batch: Batch
    attention: str

    def parts(self, fitted: Fitted = FITTED, hardware: Hardware | None = None) -> StepParts:
        return step_parts(self.preset, self.facts, hardware or self.hardware, self.layout, self.batch, self.attention, fitted=fitted)

    def deviation(self) -> float:
        """Predicted over published, less 1."""
        return self.parts().total_s / self.published_s - 1


@dataclass(frozen=True)
class FitFact:
    """A shipped preset, changed below ``training``, that ran or could not."""

    name: str
    preset: str
    fits: bool
    training: dict[str, Any] = field(default_factory=dict)


def fit_facts() -> list[FitFact]:
    return [FitFact(**value) for value in YAML(typ="safe", pure=True).load(FILE.read_text())["fits"]]


@cache
def rows() -> tuple[Row, ...]:
    data = YAML(typ="safe", pure=True).load(FILE.read_text())
    return tuple(_row(value, data["models"]) for value in data["rows"])


def _row(value: dict[str, Any], models: dict[str, Any]) -> Row:
    own = models.get(value["model"])
    preset = preset_of(value)
    facts = read_model_facts(value["model"].rpartition("/")[2].lower()).value if own is None else ModelFacts.model_validate(own)
    hardware = read_hardware(value["hardware"]).value
    ranks = 1 if value["parallelism"] == "device_map" else value["gpus"]
    layout = Layout(1, value["gpus"], ranks, hardware.cpus, hardware.memory_gib, 8)
    shares = tuple(part.stop - part.start for part in rank_slices(value["effective_batch"], ranks))
    assert max(shares) == value["micro_batch"] * value["accumulation"], value["name"]
    batch = Batch(value["effective_batch"], shares, value["micro_batch"], value["accumulation"])
    return Row(
        value["name"], value["source"], value["use"], value.get("notes", ""), value["published_s"], preset, facts, hardware, layout, batch,
        value["attention"],
    )  # fmt: skip


def preset_of(value: dict[str, Any]) -> Preset:
    return Preset.model_validate(
        {
            "name": value["name"],
            "model": {"name": value["model"]},
            "data": {"name": "as-published", "packing": value["packing"]},
            "training": {
                "sequence_length": value["sequence_length"],
                "effective_batch": value["effective_batch"],
                "micro_batch": value["micro_batch"],
                "optimizer": value["optimizer"],
                "learning_rate": 1e-5,
                "dtype": value["dtype"],
                "activation_checkpointing": value["activation_checkpointing"],
            },
            "attention": value["attention"],
            "adapter": value.get("adapter", "none"),
            "parallelism": value["parallelism"],
            "hardware": value["hardware"],
            "gpus": value["gpus"],
            "stack": "as-published",
        }
    )
