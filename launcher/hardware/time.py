"""How long a run takes: steps, evaluations, checkpoints, start-ups, lives within a time limit. Pure: no queue, no clock."""

from __future__ import annotations

from dataclasses import asdict

from launcher.hardware import cadence
from launcher.hardware.flops import flops_per_token
from launcher.hardware.lengths import Lengths, shape_of
from launcher.hardware.step import BANDWIDTH, SHARDED, missing_fact, peak_dtype, predict_evaluation, predict_step, step_parts
from launcher.plan import Batch, Layout, Time, total_steps
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack

__all__ = ["missing_fact", "predict_step", "predict_time", "step_parts"]

START_CPU_S, START_GPU_S = 15.0, 60.0
"""One life before its weights are read: processes, imports (torch and transformers 13 s on 2 shared cores), the devices, their first
meeting. The first measured here, the second the goal for a start; not fitted."""
COPY_RAM_GB_S = 3.0
"""Copying from RAM to RAM; assumed."""
WARM_UP_S = 10.0
"""What the first steps of a life on GPUs take longer: kernels loaded, memory pools grown, buckets rebuilt; assumed."""


def predict_time(
    preset: Preset,
    facts: ModelFacts,
    hardware: Hardware,
    site: Site,
    layout: Layout,
    batch: Batch,
    attention: str,
    *,
    num_samples: int | None,
    eval_samples: int = 0,
    lengths: Lengths | None = None,
    stack: Stack | None = None,
    checkpoint_gib: float = 0.0,
    time_limit_min: int | None = None,
    signal_lead_s: int = 0,
    preempted_every_min: float | None = None,
) -> Time:
    """``num_samples``: training samples of an epoch; None leaves everything unknown that needs them.

    ``preempted_every_min``: mean time between preemptions. Errors: ValueError where ``missing_fact`` says so.
    """
    parts = step_parts(preset, facts, hardware, layout, batch, attention, lengths, stack=stack)
    step_s = parts.total_s
    shape = shape_of(preset, attention, batch.micro_batch, lengths, stack)
    gpus = layout.nodes * layout.gpus_per_node
    tokens_s = batch.effective_batch * shape.tokens / step_s
    peak = hardware.gpu.peak_tflops[peak_dtype(preset, hardware.gpu)] if hardware.gpu is not None and gpus else None
    stop_s = cadence.save_s(checkpoint_gib, site.checkpoint_write_gb_s)
    waits_s = _copy_s(preset, hardware, checkpoint_gib) if preset.checkpoint.asynchronous else stop_s
    startup_s = _startup_s(facts, site, gpus, checkpoint_gib)
    steps = None if num_samples is None else total_steps(num_samples, preset.training.epochs, batch.effective_batch)
    evaluation_s = saving_s = total_s = None
    saves = lives = None
    if steps is not None:
        each = predict_evaluation(preset, facts, hardware, layout, attention, eval_samples, lengths, stack=stack) if eval_samples else 0.0
        evaluation_s = each * cadence.num_evaluations(preset.evaluation.every, steps, preset.training.epochs)
        saves = _num_checkpoints(preset, steps, steps * step_s + evaluation_s)
        saving_s = (saves - 1) * waits_s + stop_s  # nothing is left to train beside the last one
        work_s = steps * step_s + evaluation_s + saving_s
        limit_s = None if time_limit_min is None else 60.0 * time_limit_min
        lives = cadence.num_lives(work_s, limit_s, startup_s, signal_lead_s, step_s)
        total_s = work_s + (lives or 1) * startup_s
    between_s = None if preempted_every_min is None else 60.0 * preempted_every_min
    best_s = None if between_s is None or waits_s == 0 else cadence.daly_interval_s(waits_s, between_s)
    return Time(
        step_s=step_s,
        steps=steps,
        total_h=_hours(total_s),
        gpu_hours=None if total_s is None else gpus * total_s / 3600,
        continuations=None if lives is None else lives - 1,
        step_parts=asdict(parts),
        evaluation_h=_hours(evaluation_s),
        checkpoint_h=_hours(saving_s),
        startup_s=startup_s,
        startup_h=None if steps is None else (lives or 1) * startup_s / 3600,
        mfu=None if peak is None else flops_per_token(facts, round(shape.tokens)) * tokens_s / (gpus * peak * 1e12),
        peak_tflops=peak,
        tokens_per_gpu_s=tokens_s / (gpus or layout.nodes),
        useful_share=shape.useful_share,
        cut_share=None if lengths is None else lengths.cut_share,
        num_checkpoints=saves,
        checkpoint_stop_s=stop_s,
        best_checkpoint_min=None if best_s is None else best_s / 60,
        best_loss_share=_loss(best_s, waits_s, between_s, startup_s),
        expected_loss_share=_loss(_interval_s(total_s, saves), waits_s, between_s, startup_s),
    )


def _copy_s(preset: Preset, hardware: Hardware, checkpoint_gib: float) -> float:
    """What training waits for of an asynchronous checkpoint: the copy in RAM, over PCIe from a GPU."""
    sharded = preset.parallelism in SHARDED
    ranks = preset.nodes * (preset.ranks_per_node or max(preset.gpus, 1)) if sharded else 1
    gb_s = hardware.gpu.pcie_gb_s * BANDWIDTH if hardware.gpu is not None and preset.gpus else COPY_RAM_GB_S
    return checkpoint_gib * 1.073741824 / ranks / gb_s


def _startup_s(facts: ModelFacts, site: Site, gpus: int, checkpoint_gib: float) -> float:
    """Weights are read as fp32 once a node, and a later life reads its checkpoint beside them."""
    read_s = (4.0 * facts.parameters / 1e9 + checkpoint_gib * 1.073741824) / site.checkpoint_read_gb_s
    return (START_GPU_S + WARM_UP_S if gpus else START_CPU_S) + read_s


def _num_checkpoints(preset: Preset, steps: int, work_s: float) -> int:
    """Regular ones and the one at the end, and timed ones between them: every save starts the minutes anew."""
    rule = preset.checkpoint
    regular = max(1, cadence.num_evaluations(rule.every, steps, preset.training.epochs))
    timed = 0 if rule.minutes is None else int(work_s / regular // (60 * rule.minutes))
    return regular * (1 + timed)


def _interval_s(total_s: float | None, saves: int | None) -> float | None:
    return None if total_s is None or not saves else total_s / saves


def _loss(interval_s: float | None, stop_s: float, between_s: float | None, startup_s: float) -> float | None:
    """None too where no finite time would do: infinity is no JSON."""
    if interval_s is None or between_s is None:
        return None
    share = cadence.expected_loss_share(interval_s, stop_s, between_s, startup_s)
    return share if share < 1e6 else None


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600
