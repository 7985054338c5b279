"""What cells train on: a random model of the real shapes and random tokens of realistic lengths, as staging would leave them.

``python -m launcher.bench.material REQUEST``, once for a bench; in the image (Python 3.9).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.bench.lengths import code_lengths, documents_for, sample_lengths
from launcher.files import write_json

SEED = 42


def main(arguments: list[str]) -> None:
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))

    from launcher.bench.inside import leave, tell

    leave(tell(Path(request["result"]), lambda: make(request)))


def make(request: dict[str, Any]) -> dict[str, Any]:
    """``model``: its folder; made where ``config`` is not None. ``data``: folder → what is wished of its samples."""
    if request["config"] is not None and not (Path(request["model"]) / "config.json").exists():
        make_model(request["config"], Path(request["model"]))
    found = {}
    for folder, wish in request["data"].items():
        facts = Path(folder) / "facts.json"
        if not facts.exists():
            write_json(facts, make_data(wish, Path(folder)))
        found[folder] = json.loads(facts.read_text(encoding="utf-8"))
    return {"data": found}


def make_model(config: dict[str, Any], folder: Path) -> None:
    """Weights from a seed, on the GPU where there is one, kept in bf16: half the bytes to read, and training loads them as fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from launcher.stage.random_start import model_config

    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(model_config(config)).to(torch.bfloat16)
    model.save_pretrained(str(folder.with_name(f"{folder.name}.part")))
    folder.with_name(f"{folder.name}.part").rename(folder)


def make_data(wish: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Samples such that each step of the training's order gets the lengths that ``sample_lengths`` gives it."""
    import numpy as np

    from launcher.stage.samples import Sample, Tally, pack, write_samples
    from launcher.train.order import Order

    length, steps, per_step, packing = wish["sequence_length"], wish["steps"], wish["samples_per_step"], wish["packing"]
    generator = np.random.default_rng(SEED)

    def sample(number: int) -> Sample:
        return Sample(generator.integers(0, wish["vocabulary"], number).tolist())

    def samples() -> Iterator[Sample]:
        if packing == "concatenate":
            yield from (sample(length) for _ in range(steps * per_step))
        elif packing == "documents":
            (wanted,) = sample_lengths(code_lengths(), length, 1, documents_for(length, steps * per_step))
            rows = list(pack(map(sample, wanted), length))
            assert len(rows) >= steps * per_step, "the documents fill the rows"
            yield from rows[: steps * per_step]
        else:
            order = Order(wish["seed"], steps * per_step, 1, per_step)
            lengths = np.empty(steps * per_step, dtype=np.int64)
            for step, wanted in enumerate(sample_lengths(code_lengths(), length, steps, per_step), 1):
                lengths[order.samples(step)] = wanted
            yield from map(sample, lengths.tolist())

    folder.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    write_samples(samples(), folder / "train", folder, tally, lambda: None, masked=False, packed=packing == "documents")
    return {"train_samples": tally.samples, "train_targets": tally.targets}


if __name__ == "__main__":
    main(sys.argv[1:])
