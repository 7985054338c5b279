"""Tiny runs for the tests of the training: a model, data, a plan, a run folder, and ways to start its ranks. No assertions here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch", reason="the training's tests need torch: pip install -e '.[train,dev]'")

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Sequence, Value
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from launcher import metrics
from launcher.node import free_port
from launcher.plan import Batch, Container, Layout, Plan, Staged, rank_slices, write_plan
from launcher.run import Run
from launcher.train.live import Progress
from launcher.train.loop import train
from launcher.train.order import Order
from launcher.train.place import Place, prepare_environment
from launcher.train.ranks import connect
from launcher.train.stop import Stop
from launcher.train.supported import require_supported

SOURCE = Path(__file__).parents[2]
VOCABULARY = 64
SEQUENCE = 24

CONFIGS: dict[str, dict[str, Any]] = {
    "starcoder2": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_bigcode": {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "multi_query": True},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}
DROPOUT: dict[str, dict[str, float]] = {
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
    "gpt_bigcode": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
}

PRESET: dict[str, Any] = {
    "name": "test",
    "model": {"name": None},
    "data": {"packing": "none"},
    "training": {
        "sequence_length": SEQUENCE,
        "epochs": 1,
        "effective_batch": 8,
        "micro_batch": 4,
        "optimizer": "adamw",
        "learning_rate": 3e-3,
        "schedule": "linear",
        "warmup": 3,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "dtype": "fp32",
        "tf32": False,
        "activation_checkpointing": "none",
        "cross_entropy": "plain",
        "compile": "none",
        "seed": 42,
    },
    "attention": "sdpa",
    "adapter": "none",
    "parallelism": "ddp",
    "offload": "none",
    "evaluation": {"every": "never", "split": "valid", "micro_batch": 3},
    "checkpoint": {"every": "epoch", "minutes": None, "keep": 3, "keep_epochs": None, "asynchronous": False},
    "tracking": {"to": [], "project": "ftlaunch", "wandb": "auto", "mlflow_uri": None},
}
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "targets": None, "modules_to_save": None}


def make_model(folder: Path, model_type: str = "starcoder2", *, dropout: bool = False, **config: Any) -> Path:
    """A random model with tokenizer files, as staging leaves it."""
    values = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, **CONFIGS[model_type]}
    values.update(DROPOUT[model_type] if dropout else dict.fromkeys(DROPOUT[model_type], 0.0))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **config}))
    model.save_pretrained(folder)
    words = {"<eos>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path, train: int = 60, held_out: int = 0, *, full: bool = False) -> Path:
    """Random documents of 3 to ``SEQUENCE`` tokens (``full``: all as long as that)."""
    generator = np.random.default_rng(7)
    features = Features({"input_ids": Sequence(Value("int32")), "num_targets": Value("int32")})
    for name, count in (("train", train), ("eval", held_out)):
        lengths = np.full(count, SEQUENCE) if full else generator.integers(3, SEQUENCE + 1, count)
        # rising numbers with jumps: something to learn
        rows = [((np.cumsum(generator.integers(1, 3, length)) + generator.integers(0, 50)) % VOCABULARY).tolist() for length in lengths]
        if count:
            data = {"input_ids": rows, "num_targets": [len(row) - 1 for row in rows]}
            Dataset.from_dict(data, features=features).save_to_disk(str(folder / name))
    return folder


def make_run(root: Path, model: Path, data: Path, /, *, ranks: int = 1, **sections: Any) -> Run:
    """A run folder with its plan; ``sections`` are laid over ``PRESET``, dictionaries key by key."""
    preset = {
        key: {**value, **sections.get(key, {})} if isinstance(value, dict) else sections.get(key, value) for key, value in PRESET.items()
    }
    training = preset["training"]
    shares = tuple(part.stop - part.start for part in rank_slices(training["effective_batch"], ranks))
    micro_steps = -(-shares[0] // training["micro_batch"])
    counts = {name: len(Dataset.load_from_disk(str(data / name))) if (data / name).exists() else 0 for name in ("train", "eval")}
    plan = Plan(
        identity="0" * 64,
        preset=preset,
        hardware={"name": "cpu", "gpu": None},
        site={"name": "local", "network": {"ifname": None, "host_suffix": None, "env": {}, "binds": [], "rendezvous_s": 30}},
        stack={"name": "cpu", "minimum_driver": None},
        layout=Layout(nodes=1, gpus_per_node=0, ranks_per_node=ranks, cpus_per_node=ranks, memory_per_node_gib=4, threads_per_rank=1),
        batch=Batch(training["effective_batch"], shares, -(-shares[0] // micro_steps), micro_steps),
        attention=preset["attention"],
        container=Container("none"),
        time_limit_min=None,
        signal_lead_s=60,
        staged=Staged(str(model), str(data), counts["train"], counts["eval"], 0, "0"),
    )
    root.mkdir(parents=True)
    write_plan(plan, root / "plan.json")
    if preset["parallelism"].startswith("zero"):
        from launcher.render import deepspeed_config  # needs jinja2, which the source's stack is without

        (root / "ds_config.json").write_text(deepspeed_config(plan))
    return Run(root)


def start(
    run: Run, *, life: int = 0, stop_at: tuple[int, int] | None = None, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start all ranks of a life. ``stop_at``: (step, rank) at which that rank gets USR2."""
    ranks = run.plan(life).world_size
    command = ["-m", "launcher.train", str(run.root)]
    if stop_at is not None:
        command = [str(Path(__file__).parent / "stop_at_step.py"), str(run.root), *map(str, stop_at)]
    run.life(life).mkdir(parents=True, exist_ok=True)
    processes = []
    port = str(free_port())
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        values = {**os.environ, **place, "PYTHONPATH": str(SOURCE), "FTLAUNCH_LIFE": str(life), "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
        with open(run.rank_log(life, rank), "ab") as log:
            processes.append(subprocess.Popen([sys.executable, *command], env=values, stdout=log, stderr=log))
    return processes


def finish(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes by rank; ranks that outlive one which failed are killed, as the supervisor does."""
    try:
        return [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_processes(run: Run, *, life: int = 0, stop_at: tuple[int, int] | None = None) -> list[int]:
    return finish(start(run, life=life, stop_at=stop_at))


def history(run: Run) -> list[tuple[Any, ...]]:
    """What must be the same to the last bit in two runs that are the same."""
    fields = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "useful_tokens", "samples_sha")
    return [tuple(record[field] for field in fields) for record in metrics.read(run.metrics_file, "train")]


def state_of(run: Run, step: int) -> dict[str, Any]:
    """Every tensor and number of a checkpoint, flat."""
    folder, found = run.checkpoint(step), {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{path}/{key}", item)
        else:
            found[path] = value.tolist() if isinstance(value, torch.Tensor) else value

    for kind in ("model", "optimizer"):
        for file in sorted(folder.glob(f"{kind}*.safetensors")):
            walk(file.stem, load_file(file))
    walk("trainer", json.loads((folder / "trainer.json").read_text()))
    return found


def train_here(run: Run, *, life: int = 0, stop_at: int | None = None, stop: Stop | None = None) -> int:
    """One rank in this process, which is faster. ``stop_at``: the stop is requested while this step is computed."""
    plan, place, stop = run.plan(life), Place(0, 1, 0), stop or Stop()
    samples = Order.samples

    def samples_and_stop(order: Order, step: int) -> Any:
        if step == stop_at:
            stop.request()
        return samples(order, step)

    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ), mock.patch.object(Order, "samples", samples_and_stop):
        staged = require_supported(plan)
        prepare_environment(os.environ, plan, place)
        return train(run, life, plan, staged, connect(plan, place), stop, Progress())


def rewrite_plan(run: Run, life: int, **sections: Any) -> None:
    """The plan that ``life`` changes, as a resume on other hardware does."""
    value = json.loads((run.root / "plan.json").read_text())
    for key, section in sections.items():
        value[key].update(section)
    run.life(life).mkdir(parents=True, exist_ok=True)
    (run.life(life) / "plan.json").write_text(json.dumps(value))
