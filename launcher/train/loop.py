"""The training loop, to be read from top to bottom. What a step computes is here; how it is computed is in ``engine``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.checkpoint import Reason, rotate
from launcher.errors import EXIT_STOPPED, RunFailed, UsageError
from launcher.metrics import samples_sha
from launcher.plan import Plan, Staged
from launcher.run import Run
from launcher.train.adapter import require_same_base, share_of
from launcher.train.batches import Samples
from launcher.train.engine import Engine, build_engine, reseed
from launcher.train.evaluate import evaluate
from launcher.train.final import save_final
from launcher.train.journal import Journal, finite
from launcher.train.layers import compile_layers, require_compiled
from launcher.train.live import Progress
from launcher.train.loader import Loader, on_device
from launcher.train.model import input_device
from launcher.train.optimizer import learning_rate
from launcher.train.order import Order
from launcher.train.precision import require_matmul_precision
from launcher.train.ranks import Ranks
from launcher.train.state import restore, save
from launcher.train.stop import Stop
from launcher.train.tracking import Tracking
from launcher.train.watch import prove
from launcher.train.writer import Committed, Writer


def train(run: Run, life: int, plan: Plan, staged: Staged, ranks: Ranks, stop: Stop, progress: Progress) -> int:
    """Train from the newest checkpoint to the end or to an agreed stop. Returns 0 or ``EXIT_STOPPED``; the same on every rank."""
    tracking = Tracking(run, life, plan)
    try:
        return _train(run, life, plan, staged, ranks, stop, progress, Journal(run, life, ranks, tracking))
    finally:
        tracking.close()


def _train(run: Run, life: int, plan: Plan, staged: Staged, ranks: Ranks, stop: Stop, progress: Progress, journal: Journal) -> int:
    if ranks.any(stop.requested):
        return EXIT_STOPPED
    samples, held_out = _open_data(plan, staged)
    training, cadence, evaluation = plan.preset["training"], plan.preset["checkpoint"], plan.preset["evaluation"]
    order = Order(training["seed"], len(samples), training["epochs"], training["effective_batch"])
    if plan.preset["adapter"] != "none":
        require_same_base(run, plan, staged, ranks)
    engine = build_engine(plan, staged.model, ranks, run.deepspeed_file(life))
    ran = prove(plan, engine.model, engine.form)
    journal.say("attention: %s (%s) in %d layers", plan.attention, ", ".join(ran.operators) or "its own operators", ran.layers)
    journal.event("attention", kind=plan.attention, layers=ran.layers, operators=list(ran.operators))
    require_matmul_precision(training["tf32"])
    if training["compile"] == "layers":
        compile_layers(engine.model, plan.preset["data"]["packing"])
    share = share_of(engine.model)
    journal.say("%s", share)
    journal.event("parameters", trained=share.trained, all=share.all)
    step = restore(run, life, engine, ranks)
    loader = Loader(samples, order, plan, ranks)
    writer = Writer(run, life, engine, ranks)
    progress.step = step
    engine.settle()
    if ranks.any(stop.requested):
        return EXIT_STOPPED
    saved_s, started_after = time.monotonic(), step

    if held_out is not None and step and _evaluation_due(order, evaluation["every"], step):
        # the life that saved this step may have been stopped before it was evaluated
        on_record = ranks.from_first(int(ranks.is_first and step in journal.evaluated_steps()))
        if not on_record and not _evaluate(plan, engine, held_out, ranks, stop, journal, order, step):
            return EXIT_STOPPED

    while step < order.total_steps:
        step += 1
        started_s = time.perf_counter()
        done = _train_step(plan, engine, loader, samples, order, ranks, step)
        minutes_due = ranks.is_first and cadence["minutes"] is not None and time.monotonic() - saved_s >= 60 * cadence["minutes"]
        loss_sum, num_tokens, stops, timed, outdated, *written = ranks.sum(
            [done.loss_sum, done.num_tokens, stop.requested, minutes_due, journal.outdated(), *writer.progress()]
        )
        if training["compile"] == "layers" and progress.step == started_after:
            journal.event("compiled", step=step, graphs=require_compiled(), seconds=round(time.perf_counter() - started_s, 1))
        progress.step = step
        if outdated:
            raise RunFailed(f"a newer life than {life} owns {run.root}", code="older-life")
        _note_checkpoint(run, plan, writer.heed(*written), journal)
        loss = loss_sum / done.num_targets
        if not math.isfinite(loss):
            raise RunFailed(
                f"step {step}: the loss is {loss}", code="loss-not-finite", hint=f"samples {done.samples_sha}; lower learning_rate?"
            )
        journal.record(
            "train",
            step,
            epoch=order.epoch_fraction(step),
            loss=loss,
            learning_rate=done.learning_rate,
            grad_norm=finite(done.grad_norm),
            step_s=time.perf_counter() - started_s,
            tokens=int(num_tokens),
            useful_tokens=done.num_targets,
            samples_sha=done.samples_sha,
        )
        journal.say("step %d/%d: loss %.4f, learning rate %.3g", step, order.total_steps, loss, done.learning_rate)

        if stops:
            journal.event("stop_seen", step=step)
        reason = _reason_to_save(order, cadence["every"], step, stops=stops > 0, timed=timed > 0)
        if reason is not None:
            _save(run, life, plan, step, reason, order, engine, ranks, journal, writer)
            saved_s = time.monotonic()
        if stops and step < order.total_steps:
            return EXIT_STOPPED
        evaluated = held_out is None or not _evaluation_due(order, evaluation["every"], step)
        if not evaluated and held_out is not None and not _evaluate(plan, engine, held_out, ranks, stop, journal, order, step):
            journal.event("stop_seen", step=step)
            if reason is None:
                _save(run, life, plan, step, "stop", order, engine, ranks, journal, writer)
            _note_checkpoint(run, plan, writer.finish(), journal)
            return EXIT_STOPPED

    save_final(run, life, engine, Path(staged.model), ranks, adapter=plan.preset["adapter"] != "none")
    return 0


@dataclass(frozen=True)
class _Step:
    """What one rank knows after an optimizer step."""

    loss_sum: float
    """Over this rank's targets."""
    num_tokens: int
    """Computed by this rank, pads included."""
    num_targets: int
    """Of the whole step, over all ranks."""
    grad_norm: float
    learning_rate: float
    samples_sha: str


def _train_step(plan: Plan, engine: Engine, loader: Loader, samples: Samples, order: Order, ranks: Ranks, step: int) -> _Step:
    training, device = plan.preset["training"], input_device(engine.model)
    indices = order.samples(step)
    num_targets = int(samples.num_targets[indices].sum())
    batches = loader.load(step)
    loss_sum, num_tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    for micro_step, batch in enumerate(batches):
        reseed(training["seed"], step, micro_step, ranks.rank)
        loss_sum += engine.backward(on_device(batch, device), num_targets, last=micro_step == len(batches) - 1)
        num_tokens += batch.num_tokens
    rate = learning_rate(step, order.total_steps, training)
    grad_norm = engine.update(rate, training["max_grad_norm"])
    return _Step(loss_sum.item(), num_tokens, num_targets, grad_norm, rate, samples_sha(indices.tolist()))


def _open_data(plan: Plan, staged: Staged) -> tuple[Samples, Samples | None]:
    samples = Samples(Path(staged.data) / "train")
    held_out = None if plan.preset["evaluation"]["every"] == "never" else Samples(Path(staged.data) / "eval")
    if len(samples) != staged.train_samples or (held_out is not None and len(held_out) != staged.eval_samples):
        message = f"{len(samples)} training samples, the plan was made for {staged.train_samples}"
        raise UsageError(message, code="bad-data", file=staged.data, hint="submit again")
    if len(samples) == 0 or (held_out is not None and len(held_out) == 0):
        raise UsageError("no samples", code="bad-data", file=staged.data, hint="evaluation: {every: never} needs no evaluation samples")
    return samples, held_out


def _evaluation_due(order: Order, every: str, step: int) -> bool:
    return every != "never" and (step == order.total_steps or order.is_due(every, step))


def _reason_to_save(order: Order, every: str, step: int, *, stops: bool, timed: bool) -> Reason | None:
    if step == order.total_steps:
        return "end"
    if stops:
        return "stop"
    if order.is_due(every, step):
        return "epoch" if every == "epoch" else "steps"
    return "minutes" if timed else None


def _save(
    run: Run, life: int, plan: Plan, step: int, reason: Reason, order: Order, engine: Engine, ranks: Ranks, journal: Journal, writer: Writer
) -> None:
    """Beside training where the preset says so; never when training ends with it, and then only after what is still being written."""
    started_s = time.perf_counter()
    _note_checkpoint(run, plan, writer.finish(), journal)
    if plan.preset["checkpoint"]["asynchronous"] and reason not in ("stop", "end"):
        writer.begin(step, reason, order.completed_epoch(step), started_s)
        return
    manifest = save(run, life, step, reason, order.completed_epoch(step), engine, ranks)
    took_s = time.perf_counter() - started_s
    _note_checkpoint(run, plan, Committed(manifest, took_s, took_s), journal)


def _note_checkpoint(run: Run, plan: Plan, committed: Committed | None, journal: Journal) -> None:
    if committed is None or committed.manifest is None:
        return
    journal.checkpoint(committed.manifest, committed.blocked_s, committed.total_s)
    rotate(run, plan.preset["checkpoint"]["keep"], plan.preset["checkpoint"]["keep_epochs"])


def _evaluate(plan: Plan, engine: Engine, held_out: Samples, ranks: Ranks, stop: Stop, journal: Journal, order: Order, step: int) -> bool:
    """Evaluate and write it down; False when it was given up for a stop."""
    loss = evaluate(plan, engine, held_out, ranks, stop)
    if loss is None:
        return False
    journal.record("eval", step, epoch=order.epoch_fraction(step), loss=finite(loss))
    journal.say("step %d: evaluation loss %.4f", step, loss)
    return True
