"""How long training waits for a checkpoint, written by itself and beside it: python -m benchmarks.checkpoint_stall

``--page`` writes docs/benchmarks/checkpoints.md. One rank, a model of 100M parameters in fp32 with AdamW, the functions that the training
calls, steps of arithmetic between the checkpoints.
On a machine with a GPU the state is there and is copied over PCIe.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from launcher import checkpoint
from launcher.bench.inside import machine
from launcher.files import write_text
from launcher.run import Run
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.engine_plain import PlainEngine
from launcher.train.optimizer import build_optimizer
from launcher.train.ranks import Ranks
from launcher.train.state import save
from launcher.train.writer import Writer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "checkpoints.md"

TRAINING = {
    "optimizer": "adamw", "learning_rate": 1e-5, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "seed": 1,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--saves", type=int, default=5, help="of each kind, after one that warms up")
    parser.add_argument("--layers", type=int, default=12, help="7 million parameters each, beside 38 million")
    parser.add_argument("--to", type=Path, help="folder to write into; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)} too")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.to) as folder:
        found = measure(Path(folder), chosen.saves, chosen.layers)
    print(json.dumps(found) if chosen.json else _text(found))
    if chosen.page:
        write_text(PAGE, _page(found, chosen.saves), mode=0o644)
        print(PAGE)
    return 0


def measure(folder: Path, saves: int, layers: int) -> dict[str, Any]:
    """Seconds as medians; ``slower_steps``: steps while a checkpoint is written over steps without one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine, ranks, run = _engine(layers, device), Ranks(0, 1, device), Run(folder)
    writer = Writer(run, 0, engine, ranks)
    waited: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    total, quiet, busy = [], [_step_s(engine) for _ in range(3)], []
    step, first_s = 0, 0.0
    for number in range(saves + 1):
        step += 1
        started_s = time.perf_counter()
        save(run, 0, step, "steps", None, engine, ranks)
        waited["synchronous"].append(time.perf_counter() - started_s)
        step += 1
        started_s = time.perf_counter()
        writer.begin(step, "steps", None, started_s)
        waited["asynchronous"].append(time.perf_counter() - started_s)
        first_s = first_s or waited["asynchronous"][0]
        committed = None
        while committed is None:
            busy.append(_step_s(engine))
            committed = writer.heed(*map(float, writer.progress()))
        total.append(committed.total_s)
        if number == 0:
            waited, total, busy = {"synchronous": [], "asynchronous": []}, [], []
        checkpoint.rotate(run, 1, None)
    sync_s, async_s = (statistics.median(times) for times in waited.values())
    return {
        "device": str(device),
        "checkpoint_gb": sum(int(file["size"]) for file in checkpoint.committed(run)[-1].files.values()) / 1e9,
        "synchronous_s": sync_s,
        "blocked_s": async_s,
        "first_blocked_s": first_s,
        "total_s": statistics.median(total),
        "ratio": async_s / sync_s,
        "slower_steps": statistics.median(busy) / statistics.median(quiet),
    }


def _engine(layers: int, device: torch.device) -> PlainEngine:
    config = transformers.Starcoder2Config(
        vocab_size=49152, hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12, num_key_value_heads=12,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config).to(device)
    optimizer = build_optimizer(model, TRAINING)
    engine = PlainEngine(model, model, _Wrapped(optimizer), "additive", CrossEntropy(model, "plain"), 0, 1, _NoScaler())
    engine.create_optimizer_state()
    return engine


def _step_s(engine: PlainEngine) -> float:
    """An update of all weights and a forward pass: what reads memory and what computes."""
    started_s = time.perf_counter()
    tokens_BS = torch.zeros(1, 128, dtype=torch.int64, device=engine.model.device)
    engine.model(input_ids=tokens_BS, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    engine.torch_optimizer.step()
    engine.torch_optimizer.zero_grad(set_to_none=True)
    if tokens_BS.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


class _Wrapped:
    """As accelerate wraps an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class _NoScaler:
    scaler = None


def _text(found: dict[str, Any]) -> str:
    return (
        f"{found['checkpoint_gb']:.2f} GB on {found['device']}: written by training itself {found['synchronous_s']:.2f} s, beside it "
        f"training waits {found['blocked_s']:.3f} s (the first time {found['first_blocked_s']:.3f}), committed after "
        f"{found['total_s']:.2f} s\n"
        f"ratio {found['ratio']:.3f}, steps meanwhile {found['slower_steps']:.2f} times as long"
    )


def _page(found: dict[str, Any], saves: int) -> str:
    rows = {
        "checkpoint, GB": f"{found['checkpoint_gb']:.2f}",
        "training waits for a synchronous one, s": f"{found['synchronous_s']:.2f}",
        "training waits for an asynchronous one, s": f"{found['blocked_s']:.3f}",
        "the same for the first, which makes the buffers, s": f"{found['first_blocked_s']:.3f}",
        "asynchronous ÷ synchronous": f"**{found['ratio']:.3f}** (goal ≤ 0.1: {'reached' if found['ratio'] <= 0.1 else 'missed'})",
        "asynchronous, from the first byte to committed, s": f"{found['total_s']:.2f}",
        "a step while one is written ÷ a step without": f"{found['slower_steps']:.2f}",
    }
    here = machine(torch.device(found["device"]))
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if name in ("python", "torch", "transformers"))
    return "\n".join(
        [
            "# How long training waits for a checkpoint\n",
            "Written by `python -m benchmarks.checkpoint_stall --page`. One rank, a StarCoder2 of 100M parameters in fp32 with AdamW, the",
            f"functions that training calls; medians of {saves} checkpoints of each kind, in turns.",
            f"Measured on {here['device']}, {os.cpu_count()} CPUs; {versions}.\n",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
