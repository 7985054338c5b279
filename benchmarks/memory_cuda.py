"""Measure the memory of real optimizer steps on a GPU against the prediction: python -m benchmarks.memory_cuda

Random weights, one GPU, the same step as ``memory_fake``. NEVER RUN YET: no GPU was at hand when it was written.
Three values for each case: allocated and reserved at most, and whether the step runs when torch may take no more than predicted plus 3 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.memory_cases import CUDA_CASES, Case, facts_of, preset_of, stack_of, surroundings, to_json
from benchmarks.memory_step import build_engine, build_model, take_steps
from launcher.files import write_json
from launcher.hardware.memory import fullest_moment, predict_memory
from launcher.train.batches import MicroBatch

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
MARGIN = 1.03


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--hardware", default="h200", help="a file of presets/hardware: the GPU that the prediction is made for")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("memory_cuda needs an NVIDIA GPU, its driver and a CUDA build of torch: this process sees none", file=sys.stderr)
        return 4
    device = torch.cuda.get_device_properties(0)
    file = RESULTS / f"memory-{device.name.lower().replace(' ', '-')}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    for case in [case for case in CUDA_CASES if chosen.only in case.name]:
        predicted = _predict(case, chosen.hardware)
        if any(row["name"] == case.name for row in rows) or predicted["total_gib"] * GIB > 0.95 * device.total_memory:
            continue
        capped = measure(case, predicted["total_gib"] * MARGIN * GIB / device.total_memory)
        row = {"name": case.name, "case": to_json(case), "predicted": predicted, **measure(case, 1.0), "runs_capped": capped is not None}
        rows = [*rows, row]
        machine = {"gpu": device.name, "total_bytes": device.total_memory}
        write_json(file, {"versions": versions, "machine": machine, "rows": rows})
        print(f"{case.name}: predicted {predicted['total_gib']:.2f} GiB, reserved {row['reserved_bytes'] / GIB:.2f}", flush=True)
    return 0


def measure(case: Case, share: float) -> Any:
    """Bytes at most, with torch held to ``share`` of the GPU; None when that is not enough."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    started_s = time.perf_counter()
    try:
        _run(case)
    except torch.cuda.OutOfMemoryError:
        return None
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def _run(case: Case) -> None:
    facts = facts_of(case)
    with torch.device("cuda"):
        model = build_model(case, facts)

    def batch(rows: int) -> MicroBatch:
        tokens = torch.randint(0, facts.vocab, (rows, case.sequence_length), device="cuda")
        mask = torch.ones_like(tokens)
        mask[:, -1] = 0
        return MicroBatch(tokens, tokens, mask if case.padded else None)

    take_steps(case, build_engine(case, model), batch, lambda phase: None)
    torch.cuda.synchronize()


def _predict(case: Case, hardware: str) -> dict[str, float]:
    preset, facts = preset_of(case, hardware), facts_of(case)
    node, layout, batch = surroundings(case, hardware)
    arguments = (preset, facts, node, layout, batch, case.attention, stack_of(case))
    memory, tensors = predict_memory(*arguments), fullest_moment(*arguments).total
    return {"total_gib": memory.per_gpu_gib, "tensors_gib": round(tensors / GIB, 3), **memory.parts}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
