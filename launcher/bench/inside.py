"""What the processes of a measurement share: taking turns, the clock, telling what went wrong. Runs in the image (Python 3.9)."""

from __future__ import annotations

import os
import platform
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from launcher.bench.cell import READY
from launcher.files import write_json

GIB = 2**30
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "flash-attn", "xformers", "liger-kernel", "deepspeed")


class Turns:
    """Where contenders take turns: says over stdout that this one is ready, and waits on stdin to be told to go.

    Otherwise stdin only tells when the bench is gone, and this process goes with it.
    """

    def __init__(self, asked: bool) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8") if asked else None
        if asked:
            os.dup2(2, 1)  # what libraries print belongs into the log
        elif not sys.stdin.isatty():
            threading.Thread(target=_end_with_parent, daemon=True).start()

    def wait(self) -> None:
        """Errors: EOFError when nobody is there to say go."""
        if self._answers is None:
            return
        self._answers.write(READY + "\n")
        self._answers.flush()
        if not sys.stdin.readline():
            raise EOFError("the bench is gone")


def clock(device: torch.device) -> float:
    """Seconds, when the GPUs of this process have done what they were told."""
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
    return time.perf_counter()


def machine(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process (on its fullest GPU), the device's own name, versions of what computed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    peak: dict[str, Any] = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "allocated_gib": None}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        numbers = range(torch.cuda.device_count())
        reserved, allocated = max(map(torch.cuda.max_memory_reserved, numbers)), max(map(torch.cuda.max_memory_allocated, numbers))
        peak = {"memory_gib": reserved / GIB, "allocated_gib": allocated / GIB}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {**peak, "device": name, "versions": versions}


def parameters(model: torch.nn.Module) -> dict[str, int]:
    """As peft counts them: 4-bit weights hold two in a byte."""
    counted = {"parameters": 0, "trained_parameters": 0}
    for parameter in model.parameters():
        number = parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        counted["parameters"] += number
        counted["trained_parameters"] += number if parameter.requires_grad else 0
    return counted


def tell(result: Path, work: Callable[[], Mapping[str, Any] | None]) -> int:
    """Do the work and write what came of it, also when it failed: one bad cell is a row, not the end. Gives the exit code."""
    try:
        found = work()
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        outcome = "out of memory" if _is_memory(error) else "failed"
        if not result.exists():
            write_json(result, {"outcome": outcome, "reason": f"{type(error).__name__}: {first}"[:300]})
        return 1
    if found is not None:
        write_json(result, {"outcome": "measured", "reason": "", **found})
    return 0


def leave(code: int) -> None:
    """End at once: the clean-up of communication libraries can wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_memory(error: BaseException) -> bool:
    texts = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)
