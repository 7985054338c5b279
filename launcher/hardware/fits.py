"""What does not fit: GPU memory, RAM, disk, time limit, grace of a preemption, a gated model. Pure: a plan in, findings out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.errors import Finding
from launcher.plan import Memory, Plan
from launcher.preset.fields import duration_text
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset
from launcher.preset.site import Qos, Site


@dataclass(frozen=True)
class Observed:
    """What was seen on this machine and in earlier runs; None where nobody looked or could."""

    disk_free_gib: float | None = None
    """Free where the runs lie, GiB, for this user."""
    disk_free_files: int | None = None
    """Files that may still be made there."""
    driver: str | None = None
    """NVIDIA driver that an earlier life met on the nodes of this hardware, site and partition."""
    token: bool | None = None
    """Whether there is a token for the hub."""
    fingerprints: Mapping[str, str] | None = None
    """``data``, ``model``: names, sizes and times of local files, where their content cannot be read yet."""
    ram_disk_gib: float = 0.0
    """Memory of a node that the unpacked image took in an earlier life there, GiB: its disk is memory."""


UNOBSERVED = Observed()


def check_fits(plan: Plan, preset: Preset, site: Site, facts: ModelFacts | None, observed: Observed) -> Iterator[Finding]:
    """Errors are gates: memory, disk, time."""
    if plan.memory is not None:
        yield from _compute_memory(plan, plan.memory)
        yield from _host_memory(plan, plan.memory)
    yield from _disk(plan, observed)
    yield from _time(plan, preset, site)
    yield from _gated(plan, preset, facts, observed)


def parts_text(memory: Memory) -> str:
    """``weights 59.4, optimizer 12.1``: the parts of a GPU's memory in GiB, largest first, without what rounds to nothing."""
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {gib:.1f}" for name, gib in parts if gib >= 0.05)


def _compute_memory(plan: Plan, memory: Memory) -> Iterator[Finding]:
    if plan.layout.gpus_per_node == 0:
        if not memory.fits:
            message = f"a rank computes with {memory.per_gpu_gib:.1f} GiB of RAM, where {memory.available_gib:.1f} can be used"
            message += f": {parts_text(memory)}"
            yield Finding(
                "error", "host-memory", message, key="memory_per_node_gib", hint="more RAM, a smaller micro_batch, or --allow memory"
            )
        return
    of_them = f"{memory.per_gpu_gib:.1f} GiB on the fullest GPU, where {memory.available_gib:.1f} can be used: {parts_text(memory)}"
    if not memory.fits:
        hint = "a smaller micro_batch, activation_checkpointing: full, a sharded parallelism, or --allow memory"
        yield Finding("error", "gpu-memory", of_them, key="training.micro_batch", hint=hint)


def _host_memory(plan: Plan, memory: Memory) -> Iterator[Finding]:
    asked = plan.layout.memory_per_node_gib
    if plan.layout.gpus_per_node and memory.host_per_node_gib > asked:
        message = f"{memory.host_per_node_gib:.1f} GiB of RAM are needed on a node, {asked} are asked for"
        if memory.ram_disk_gib:
            message += f" ({memory.ram_disk_gib:.1f} of them for the image: the disk of these nodes is memory)"
        hint = f"memory_per_node_gib: {int(memory.host_per_node_gib) + 1}, or --allow memory"
        yield Finding("error", "host-memory", message, key="memory_per_node_gib", hint=hint)


def _disk(plan: Plan, observed: Observed) -> Iterator[Finding]:
    disk = plan.disk
    if disk is None:
        return
    hint = "fewer checkpoints (checkpoint.keep, checkpoint.keep_epochs), or another runs folder"
    if observed.disk_free_gib is not None and disk.total_gib > observed.disk_free_gib:
        message = f"the run's checkpoints and model take {disk.total_gib:.1f} GiB, {observed.disk_free_gib:.1f} are free in the runs folder"
        yield Finding("error", "disk-too-small", message, key="checkpoint", hint=hint)
    if observed.disk_free_files is not None and disk.files > observed.disk_free_files:
        message = f"the run makes up to {disk.files} files, {observed.disk_free_files} are free in the runs folder"
        yield Finding("error", "disk-too-small", message, key="checkpoint", hint=hint)


def _time(plan: Plan, preset: Preset, site: Site) -> Iterator[Finding]:
    time, limit_min = plan.time, plan.time_limit_min
    if time is None or limit_min is None:
        return
    needed_s = time.startup_s + time.step_s + time.checkpoint_stop_s
    left_s = 60 * limit_min - plan.signal_lead_s
    if needed_s > left_s:
        message = (
            f"a life of {duration_text(limit_min)} is told to stop after {left_s / 60:.0f} min; start-up, one step and its checkpoint "
            f"take {needed_s / 60:.0f} min: no life would get further than the one before"
        )
        yield Finding("error", "no-checkpoint-in-time", message, key="slurm.time", hint="a longer time limit, or --allow time")
    preempting = site.preempting(plan.slurm)
    if preempting is None or preempting.grace_s is None:
        return
    if time.step_s + time.checkpoint_stop_s > preempting.grace_s and preset.checkpoint.minutes is None:
        where = f"qos {plan.slurm['qos']}" if isinstance(preempting, Qos) else f"partition {plan.slurm['partition']}"
        message = (
            f"{where} gives {preempting.grace_s} s between notice and kill, finishing a step and saving takes "
            f"{time.step_s + time.checkpoint_stop_s:.0f} s: only timed checkpoints protect from a preemption there"
        )
        hint = f"checkpoint.minutes: {max(1, round(time.best_checkpoint_min or 30))}"
        yield Finding("warning", "save-longer-than-grace", message, key="checkpoint.minutes", hint=hint)


def _gated(plan: Plan, preset: Preset, facts: ModelFacts | None, observed: Observed) -> Iterator[Finding]:
    if facts is None or not facts.gated or observed.token is not False or preset.model.name is None or plan.staged is not None:
        return
    message = f"{preset.model.name} is gated: its terms must be accepted on its page, and a token shown"
    yield Finding("error", "gated-model", message, key="model.name", hint="HF_TOKEN in the environment, or hf auth login")
