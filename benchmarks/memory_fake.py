"""Measure the memory of one optimizer step of the real model classes at full size, on any machine: python -m benchmarks.memory_fake

Fake tensors on a fake GPU, torch's memory tracker, our engine, loss and optimizer. Seen: every tensor that torch allocates, and how long it
lives, under the GPU's autocast rules. Not seen: what kernels allocate inside, CUDA context, workspaces, NCCL, DDP. Which sdpa kernel a GPU
takes cannot be asked without one: ``_attention`` says what is assumed. torch's allocator is replayed. A killed run goes on where it was.
"""

from __future__ import annotations

from benchmarks.fake_gpu import load_fake_gpu

if __name__ == "__main__":
    load_fake_gpu()  # before torch

import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.caching_allocator import CachingAllocator, replay, smallest_capacity
from benchmarks.memory_cases import CASES, QUICK, Case, facts_of, to_json
from benchmarks.memory_step import build_engine, build_model, take_steps
from launcher.files import write_json
from launcher.train.batches import MicroBatch

RESULTS = Path(__file__).parent / "results" / "memory-fake.json"
GPU = torch.device("cuda", 0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the few layers that the tests measure")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--to", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    _prepare()
    rows = json.loads(chosen.to.read_text(encoding="utf-8"))["rows"] if chosen.to.exists() else []
    for case in [case for case in (QUICK if chosen.quick else CASES) if chosen.only in case.name]:
        if not chosen.again and any(row["name"] == case.name for row in rows):
            continue
        row = {"name": case.name, "case": to_json(case), **measure(case)}
        rows = [other for other in rows if other["name"] != case.name] + [row]
        write_json(chosen.to, {"versions": _versions(), "machine": _machine(), "rows": sorted(rows, key=lambda row: str(row["name"]))})
        print(f"{row['peak_bytes'] / 2**30:7.2f} GiB in {row['seconds']:3.0f} s  {case.name}", flush=True)
        gc.collect()
    return 0


def measure(case: Case) -> dict[str, Any]:
    """Bytes; parts as torch's memory tracker names them, at the fullest moment of all.

    ``reserved``: by torch's allocator with memory without end; ``needed``: the smallest GPU on which that allocator would get through;
    ``expandable``: that with expandable segments.
    """
    started_s = time.perf_counter()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = build_model(case, facts_of(case))
    _make_fake(model, mode)
    engine = build_engine(case, model)
    tracker = _Tracker(model)

    def batch(rows: int) -> MicroBatch:
        tokens, targets, mask = (
            FakeTensor(mode, torch.empty(rows, case.sequence_length, dtype=torch.int64, device="meta"), GPU) for _ in range(3)
        )
        return MicroBatch(tokens, targets, mask if case.padded else None)

    with mode, tracker:
        take_steps(case, engine, batch, tracker.begin)
    peak = max(tracker.phases.values(), key=lambda parts: parts["Total"])
    reserved = replay(tracker.trace, CachingAllocator()).peak_reserved
    return {
        "peak_bytes": peak["Total"],
        "parts_bytes": {kind: size for kind, size in peak.items() if size and kind != "Total"},
        "phases_bytes": {phase: parts["Total"] for phase, parts in tracker.phases.items()},
        "reserved_bytes": reserved,
        "needed_bytes": smallest_capacity(tracker.trace, peak["Total"], reserved),
        "expandable_bytes": replay(tracker.trace, CachingAllocator(expandable=True)).peak_used_pages,
        "seconds": round(time.perf_counter() - started_s, 1),
    }


class _Tracker(MemTracker):
    """Keeps the peak of each phase instead of each module's, and what came and went."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.phase = "setup"
        self.phases: dict[str, dict[str, int]] = {}
        self.trace: list[tuple[int, int]] = []
        self._keys: dict[int, int] = {}
        super().__init__()
        self.track_external(model)
        for parameter in model.parameters():
            if not parameter.requires_grad:  # no gradient to wait for
                self._param_to_grad_hook_handles[parameter] = (_Nothing(), _Nothing())

    def begin(self, phase: str) -> None:
        if phase:
            self.phase = phase
        else:
            self.reset_mod_stats()

    def _update_peak_stats(self, peak_state: Any) -> None:
        now = self._curr_mem_snap.get(GPU)
        if now is not None and now["Total"] > self.phases.get(self.phase, {"Total": 0})["Total"]:
            self.phases[self.phase] = {getattr(kind, "value", kind): size for kind, size in now.items()}

    def _update_snap(self, u_type: Any, winfo: Any, *more: Any, **named: Any) -> None:
        super()._update_snap(u_type, winfo, *more, **named)
        if winfo.device == GPU and u_type.name == "ADD":
            self._keys[id(winfo)] = len(self.trace)
            self.trace.append((len(self.trace), winfo.mem_consumed))
        elif winfo.device == GPU and u_type.name == "DEL":
            self.trace.append((self._keys.pop(id(winfo)), -1))


class _Nothing:
    def remove(self) -> None:
        pass


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Weights and buffers on the fake GPU; tied ones stay tied."""
    memo: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in memo:
                    fake = FakeTensor(mode, parameter.data.to("meta"), GPU)
                    memo[id(parameter)] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = memo[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.to("meta"), GPU)


_MATH = torch.nn.functional.scaled_dot_product_attention


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """sdpa with the kernel that torch takes on an Ampere or newer GPU: flash for 16 bits without a mask, else the memory-efficient
    one, else (grouped keys and values in fp32) plain arithmetic. Masks as torch's own front end turns them into biases.
    """
    kernels: Any = torch.ops.aten
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(half), key.to(half), value.to(half)
    if attn_mask is None and query.dtype != torch.float32:
        given = kernels._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    elif query.shape[1] != key.shape[1]:
        given = _MATH(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    else:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, float("-inf"))
            attn_mask = attn_mask.to(query.dtype).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        given = kernels._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    assert isinstance(given, torch.Tensor)
    return given


def _prepare() -> None:
    """What looks at numbers, or for a device, is told: fake tensors have no numbers, and there is no device."""
    from transformers import masking_utils

    transformers.utils.logging.set_verbosity_error()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.nn.functional.scaled_dot_product_attention = _attention
    # transformers takes fake tensors for a compiler's and then always makes a mask; here one is made where a batch has pads
    masking_utils.is_tracing = lambda *_, **__: False
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils._ignore_causal_mask_sdpa = lambda padding_mask, *_, **__: padding_mask is None


def _versions() -> dict[str, str]:
    modules = (torch, transformers, accelerate, peft)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def _machine() -> dict[str, Any]:
    return {"cpu": platform.machine(), "cpus": os.cpu_count(), "gpu": "none: fake tensors on a fake CUDA device"}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
