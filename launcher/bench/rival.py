"""What people run instead, on the same model and data: ``python -m launcher.bench.rival REQUEST``. One process; in the image.

trainer   transformers' Trainer as it comes, padded to the sequence length, in the preset's dtype and with its optimizer
memtune   memtune's script: padded, fp32, Adafactor, micro batches of 8, split over the GPUs by ``device_map="auto"``
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from launcher.plan import read_plan
from launcher.train.place import find_place, prepare_environment

MEMTUNE_MICRO_BATCH = 8
"""Of its scripts for 3B and 7B; accumulation makes the effective batch of it."""

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_fused": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor"}


def main(arguments: list[str]) -> None:
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    prepare_environment(os.environ, read_plan(Path(request["plan"])), find_place(os.environ))

    from launcher.bench.inside import leave, tell

    leave(tell(Path(request["result"]), lambda: train(request)))


def train(request: dict[str, Any]) -> dict[str, Any]:
    """The request and the answer of ``measure``; ``request["kind"]`` says who it is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers import __version__ as transformers_version

    from launcher.bench.inside import Turns, clock, machine, parameters
    from launcher.train.batches import NO_TARGET, Samples
    from launcher.train.order import Order

    turns, plan, memtune = Turns(request["turns"]), read_plan(Path(request["plan"])), request["kind"] == "memtune"
    assert plan.staged is not None, "the material was made first"
    training, length = plan.preset["training"], plan.preset["training"]["sequence_length"]
    on_gpu = plan.layout.gpus_per_node > 0
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(plan.layout.threads_per_rank)
    samples = Samples(Path(plan.staged.data) / "train")
    effective = int(training["effective_batch"])
    order = Order(training["seed"], len(samples), 1, effective)
    indices = [int(index) for step in range(1, order.total_steps + 1) for index in order.samples(step)]
    micro_batch = _divisor(effective, MEMTUNE_MICRO_BATCH if memtune else plan.batch.micro_batch)

    dtype = "dtype" if int(transformers_version.split(".")[0]) >= 5 else "torch_dtype"
    arguments: dict[str, Any] = {dtype: torch.float32}
    if memtune and on_gpu:
        arguments["device_map"] = "auto"
    config = AutoConfig.from_pretrained(plan.staged.model)
    model = AutoModelForCausalLM.from_pretrained(plan.staged.model, config=config, **arguments)
    model.config.use_cache = False

    class Padded(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(indices)

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            tokens = torch.as_tensor(samples.tokens_and_targets(indices[number])[0])
            ids, labels, mask = (
                torch.zeros(length, dtype=torch.int64),
                torch.full((length,), NO_TARGET),
                torch.zeros(length, dtype=torch.int64),
            )
            ids[: len(tokens)], labels[: len(tokens)], mask[: len(tokens)] = tokens, tokens, 1
            return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    padded = Padded()

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(padded)

    step_s: list[float] = []
    cpu_s: list[float] = []

    class Clock(TrainerCallback):
        started_s = started_cpu_s = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()
            self.started_s, self.started_cpu_s = clock(device), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_s.append(clock(device) - self.started_s)
            cpu_s.append(time.process_time() - self.started_cpu_s)

    wanted = TrainingArguments(
        output_dir=str(Path(request["result"]).parent / "trainer"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=effective // micro_batch,
        max_steps=request["warm_up"] + request["steps"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type="linear" if memtune else "constant",
        optim="adafactor" if memtune else OPTIMIZERS[training["optimizer"]],
        weight_decay=training["weight_decay"],
        max_grad_norm=training["max_grad_norm"],
        bf16=training["dtype"] == "bf16" and not memtune,
        fp16=training["dtype"] == "fp16" and not memtune,
        tf32=True if on_gpu and training["tf32"] and not memtune else None,
        gradient_checkpointing=training["activation_checkpointing"] == "full" and not memtune,
        use_cpu=not on_gpu,
        seed=training["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )
    InOrder(model=model, args=wanted, train_dataset=padded, callbacks=[Clock()]).train()
    measured = indices[request["warm_up"] * effective :]
    useful = int(samples.num_targets[measured].sum())
    return {
        "step_s": step_s[request["warm_up"] :],
        "cpu_s": cpu_s[request["warm_up"] :],
        "tokens": len(measured) * length,
        "useful_tokens": useful,
        "samples": len(measured),
        "micro_batch": micro_batch,
        **machine(device),
        **parameters(model),
    }


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to ``most``: the Trainer makes only such batches."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
