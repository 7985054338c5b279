"""The Plan: a resolved preset unchanged, plus everything that was derived from it. Standard library only (Python 3.9).

Written once by the planner, read on the host by the supervisor and in the container by the training. ``preset``, ``hardware``,
``site`` and ``stack`` are plain data (what the schemas in ``launcher.preset`` dump), so that reading a plan needs no pydantic.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from launcher.files import write_json

T = TypeVar("T")

PLAN_VERSION = 1

BIND = re.compile(r"/(?:\\.|[^:\\])*(:/(?:\\.|[^:\\])*(:(?:\\.|[^:\\])+)?)?")
"""``source[:target[:options]]``, to be matched whole: absolute paths, in which a backslash escapes a colon."""


@dataclass(frozen=True)
class Layout:
    """Which processes run where."""

    nodes: int
    gpus_per_node: int
    """0 on CPU."""
    ranks_per_node: int
    cpus_per_node: int
    """What is asked of the scheduler for each node."""
    memory_per_node_gib: int
    """What is asked of the scheduler for each node."""
    threads_per_rank: int
    """OMP_NUM_THREADS of a rank; fixed, because it changes sums."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def cpus_per_rank(self) -> int:
        return max(1, self.cpus_per_node // self.ranks_per_node)


@dataclass(frozen=True)
class Batch:
    """How the samples of one optimizer step are shared out."""

    effective_batch: int
    """Samples of one optimizer step, over all ranks."""
    samples_per_rank: tuple[int, ...]
    """Samples of one optimizer step for each rank; sums to ``effective_batch``. Rank r takes a contiguous slice of the step."""
    micro_batch: int
    """The largest number of samples that one rank holds in one micro step."""
    micro_steps: int
    """Forward and backward passes of every rank in one optimizer step; a rank with fewer samples runs zero-weight dummies."""

    @property
    def samples_per_micro_step(self) -> tuple[tuple[int, ...], ...]:
        """Rank → samples that it takes in each micro step of a whole optimizer step; 0 is a dummy."""
        return tuple(tuple(sizes(share, self.micro_steps)) for share in self.samples_per_rank)


@dataclass(frozen=True)
class Staged:
    """What ``launcher.stage`` made ready: read-only folders and the facts about them that the plan needs."""

    model: str
    """Folder with config.json, weights (safetensors) and the tokenizer's files."""
    data: str
    """Folder with ``facts.json``, ``train/`` and, when there is an evaluation, ``eval/`` (Arrow data sets)."""
    train_samples: int
    eval_samples: int
    train_targets: int
    """Target tokens of one epoch."""
    data_sha: str
    """Hash of the data's content; part of the run's identity."""
    model_revision: str = ""
    data_revision: str = ""
    """Commit on the hub, empty for local folders; of several sources those on the hub, with spaces between."""
    model_sha: str = ""
    """Hash of the content of ``model.path``, part of the run's identity; empty for a model that the preset names otherwise."""
    length_bin_tokens: int = 0
    length_counts: list[int] = field(default_factory=list)
    """Number k: training samples (the documents of packed rows) of length_bin_tokens·k + 1 … length_bin_tokens·(k + 1) tokens; empty
    where they were not counted."""
    cut_share: float = 0.0
    """Share of the training documents' tokens that was cut at the sequence length."""


@dataclass(frozen=True)
class Container:
    """How a rank's process is wrapped."""

    use: Literal["apptainer", "none"]
    image: str | None = None
    """The ``.sif`` file. None without a container."""
    identity: str | None = None
    command: str = "apptainer"
    """Absolute path, resolved when submitting."""
    binds: tuple[str, ...] = ()
    """Each as ``BIND``, beside the run folder and the staged folders, which are always bound."""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Peak per GPU and RAM per node, GiB."""

    per_gpu_gib: float
    available_gib: float
    fits: bool
    host_per_node_gib: float
    parts: dict[str, float]
    """weights, gradients, optimizer, activations, logits, other."""
    ram_disk_gib: float = 0.0
    """Of ``host_per_node_gib``: the unpacked image, where a node's disk is memory."""


@dataclass(frozen=True)
class Time:
    """Predicted seconds and hours. None where the number of samples, the mean time between preemptions or the like is not known."""

    step_s: float
    """One optimizer step."""
    steps: int | None
    total_h: float | None
    """All lives together: steps, evaluations, checkpoints, start-ups; not the time in the queue."""
    gpu_hours: float | None
    """``total_h`` × all GPUs of the run, whether they work or wait; 0 on CPU."""
    continuations: int | None
    """Further lives that the time limit makes necessary; None also where no life would get further than the one before."""
    step_parts: dict[str, float] = field(default_factory=dict)
    """Seconds of a step: matmul, attention, elementwise, weights, launch, communication, optimizer, offload."""
    evaluation_h: float | None = None
    checkpoint_h: float | None = None
    """Time in which training waits for checkpoints."""
    startup_s: float = 0.0
    """One life: start of the processes, weights, checkpoint, first steps."""
    startup_h: float | None = None
    """All lives."""
    mfu: float | None = None
    """(6·N + 12·L·d·S) × computed tokens ÷ time ÷ (all GPUs × ``peak_tflops``); None on CPU."""
    peak_tflops: float | None = None
    """Dense peak of the dtype that is trained in, TFLOP/s of one GPU."""
    tokens_per_gpu_s: float = 0.0
    """Computed tokens, pads included, per second and GPU (per node on CPU)."""
    useful_share: float | None = None
    """Share of the computed tokens that are the data's own; None where lengths are not known and there may be pads."""
    cut_share: float | None = None
    """Share of the data's tokens that is cut at the sequence length; None before staging."""
    num_checkpoints: int | None = None
    checkpoint_stop_s: float = 0.0
    """Writing one checkpoint: training waits so long where it is not asynchronous, and a stop always."""
    best_checkpoint_min: float | None = None
    """Minutes between checkpoints of least expected loss (Daly 2006, from Young 1974) at the preemption rate given; None without one."""
    best_loss_share: float | None = None
    """Expected time lost to checkpoints, repeated work and restarts at ``best_checkpoint_min``, over the time of training alone."""
    expected_loss_share: float | None = None
    """The same at the preset's own interval."""


@dataclass(frozen=True)
class Disk:
    checkpoint_gib: float
    total_gib: float
    files: int


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know. ``preset`` holds what the user wrote, resolved; nothing else repeats it."""

    identity: str
    """64 hex digits: the hash of what determines the weights. Its first 8 name the run folder."""
    preset: dict[str, Any]
    hardware: dict[str, Any]
    site: dict[str, Any]
    stack: dict[str, Any]
    layout: Layout
    batch: Batch
    attention: str
    """Resolved from ``auto``."""
    container: Container
    time_limit_min: int | None
    """What is asked of the scheduler; None on this machine, where nothing limits it."""
    signal_lead_s: int
    """Seconds before the time limit at which the scheduler is asked to send the stop."""
    slurm: dict[str, str] = field(default_factory=dict)
    """Resolved sbatch options: account, partition, qos, constraint, reservation, exclude, mail…"""
    staged: Staged | None = None
    """None until staging was done."""
    memory: Memory | None = None
    time: Time | None = None
    disk: Disk | None = None
    allowed: tuple[str, ...] = ()
    """Gates that the user overrode: memory, driver, time."""
    version: int = PLAN_VERSION

    @property
    def name(self) -> str:
        return str(self.preset["name"])

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None until staging was done."""
        if self.staged is None:
            return None
        return total_steps(self.staged.train_samples, float(self.preset["training"]["epochs"]), self.batch.effective_batch)


def total_steps(num_samples: int, epochs: float, effective_batch: int) -> int:
    """Steps of a stream of ``epochs`` × ``num_samples`` samples, the last step taking what is left."""
    return math.ceil(round(num_samples * epochs) / effective_batch)


def rank_slices(num_samples: int, world_size: int) -> list[slice]:
    """Contiguous, as even as possible, larger shares first: 25 on 4 is 7, 6, 6, 6."""
    ends = list(accumulate(sizes(num_samples, world_size)))
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def sizes(number: int, parts: int) -> list[int]:
    """``number`` in ``parts`` shares, as even as possible, larger ones first."""
    share, extra = divmod(number, parts)
    return [share + (part < extra) for part in range(parts)]


def write_plan(plan: Plan, path: Path) -> None:
    write_json(path, to_json(plan))


def read_plan(path: Path) -> Plan:
    """Errors: ValueError when the file is of another version or not a plan."""
    return from_json(json.loads(path.read_text(encoding="utf-8")))


def to_json(plan: Plan) -> dict[str, Any]:
    return dataclasses.asdict(plan)


def from_json(value: Mapping[str, Any]) -> Plan:
    if value.get("version") != PLAN_VERSION:
        raise ValueError(f"plan of version {value.get('version')!r}, this code reads version {PLAN_VERSION}")
    data = dict(value)
    data["layout"] = Layout(**data["layout"])
    data["batch"] = Batch(**{**data["batch"], "samples_per_rank": tuple(data["batch"]["samples_per_rank"])})
    data["container"] = Container(**{**data["container"], "binds": tuple(data["container"]["binds"])})
    data["allowed"] = tuple(data["allowed"])
    for key, noun in (("staged", Staged), ("memory", Memory), ("time", Time), ("disk", Disk)):
        data[key] = None if data[key] is None else noun(**data[key])
    return Plan(**data)
