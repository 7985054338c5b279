"""One cell in one process per rank: ``python -m launcher.bench.measure REQUEST``. The training's own engine, batches and order.

Not the training's loop: no checkpoints, no evaluation, no journal. Runs in the image (Python 3.9).
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from launcher.plan import read_plan
from launcher.train.place import Place, find_place, prepare_environment


def main(arguments: list[str]) -> None:
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    place = find_place(os.environ)
    plan_file = Path(request["plan"])
    prepare_environment(os.environ, read_plan(plan_file), place)

    from launcher.bench.inside import leave, tell

    leave(tell(Path(request["result"]), lambda: measure(request, place)))


def measure(request: dict[str, Any], place: Place) -> dict[str, Any] | None:
    """Seconds, tokens and memory of ``request["steps"]`` optimizer steps after ``request["warm_up"]``; None on ranks other than 0."""
    import torch

    from launcher.bench.inside import Turns, clock, machine, parameters
    from launcher.train.batches import Samples, collate
    from launcher.train.engine import build_engine, reseed
    from launcher.train.order import Order, micro_slices
    from launcher.train.ranks import connect

    turns = Turns(request["turns"])
    plan = read_plan(Path(request["plan"]))
    assert plan.staged is not None, "the material was made first"
    ranks = connect(plan, place)
    training, packing = plan.preset["training"], plan.preset["data"]["packing"]
    samples = Samples(Path(plan.staged.data) / "train")
    order = Order(training["seed"], len(samples), 1, training["effective_batch"])
    engine = build_engine(plan, plan.staged.model, ranks, Path(request["plan"]).with_name("ds_config.json"))
    engine.settle()
    step_s: list[float] = []
    cpu_s: list[float] = []
    counted = {"tokens": 0, "useful_tokens": 0, "samples": 0}
    losses: list[float] = []
    with only_backend(request["backend"]) if request["backend"] else nullcontext():
        for step in range(1, request["warm_up"] + request["steps"] + 1):
            turns.wait()
            started_s, started_cpu_s = clock(ranks.device), time.process_time()
            indices = order.samples(step)
            num_targets = int(samples.num_targets[indices].sum())
            shares = micro_slices(indices, ranks.rank, ranks.world_size, plan.batch.micro_steps)
            loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
            for micro_step, share in enumerate(shares):
                batch = collate(samples, share.tolist(), packing, training["sequence_length"])
                reseed(training["seed"], step, micro_step, ranks.rank)
                loss_sum += engine.backward(batch, num_targets, last=micro_step == len(shares) - 1).to(ranks.device)
                tokens += batch.num_tokens
            engine.update(training["learning_rate"], training["max_grad_norm"])
            total_loss, total_tokens = ranks.sum([loss_sum.item(), tokens])  # as the loop does: it waits for the step
            ended_s = clock(ranks.device)
            if step > request["warm_up"]:
                step_s.append(ended_s - started_s)
                cpu_s.append(time.process_time() - started_cpu_s)
                losses.append(total_loss / num_targets)
                counted["tokens"] += int(total_tokens)
                counted["useful_tokens"] += num_targets
                counted["samples"] += len(indices)
    if not all(loss == loss for loss in losses):
        raise RuntimeError(f"the loss is not a number: {losses}")
    here = machine(ranks.device)
    for name in ("memory_gib", "allocated_gib"):
        if here[name] is not None:
            here[name] = max(ranks.sum([here[name] if rank == ranks.rank else 0.0 for rank in range(ranks.world_size)]))
    if not ranks.is_first:
        return None
    return {"step_s": step_s, "cpu_s": cpu_s, "losses": losses, **counted, **here, **parameters(engine.model)}


def only_backend(backend: str) -> Any:
    """torch's sdpa with one of its backends alone; it raises where that one cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH", "cudnn": "CUDNN_ATTENTION"}
    return sdpa_kernel([getattr(SDPBackend, names[backend])])


if __name__ == "__main__":
    main(sys.argv[1:])
