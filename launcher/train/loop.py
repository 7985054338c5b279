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
from launcher.train.batches import Samples, collate
from launcher.train.engine import Engine, build_engine, reseed
from launcher.train.evaluate import evaluate
from launcher.train.final import save_final
from launcher.train.journal import Journal, finite
from launcher.train.live import Progress
from launcher.train.optimizer import learning_rate
from launcher.train.order import Order, micro_slices
from launcher.train.ranks import Ranks
from launcher.train.state import restore, save
from launcher.train.stop import Stop


def train(run: Run, life: int, plan: Plan, staged: Staged, ranks: Ranks, stop: Stop, progress: Progress) -> int:
    """Train from the newest checkpoint to the end or to an agreed stop. Returns 0 or ``EXIT_STOPPED``; the same on every rank."""
    if ranks.any(stop.requested):
        return EXIT_STOPPED
    journal = Journal(run, life, ranks)
    samples, held_out = _open_data(plan, staged)
    training, cadence, evaluation = plan.preset["training"], plan.preset["checkpoint"], plan.preset["evaluation"]
    order = Order(training["seed"], len(samples), training["epochs"], training["effective_batch"])
    engine = build_engine(plan, staged.model, ranks)
    step = restore(run, life, engine, ranks)
    progress.step = step
    engine.settle()
    if ranks.any(stop.requested):
        return EXIT_STOPPED
    saved_s = time.monotonic()

    if held_out is not None and step and _evaluation_due(order, evaluation["every"], step):
        # the life that saved this step may have been stopped before it was evaluated
        on_record = ranks.from_first(int(ranks.is_first and step in journal.evaluated_steps()))
        if not on_record and not _evaluate(plan, engine, held_out, ranks, stop, journal, order, step):
            return EXIT_STOPPED

    while step < order.total_steps:
        step += 1
        started_s = time.perf_counter()
        done = _train_step(plan, engine, samples, order, ranks, step)
        minutes_due = ranks.is_first and cadence["minutes"] is not None and time.monotonic() - saved_s >= 60 * cadence["minutes"]
        loss_sum, num_tokens, stops, timed, outdated = ranks.sum(
            [done.loss_sum, done.num_tokens, stop.requested, minutes_due, journal.outdated()]
        )
        progress.step = step
        if outdated:
            raise RunFailed(f"a newer life than {life} owns {run.root}", code="older-life")
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
            _save(run, life, plan, step, reason, order, engine, ranks, journal)
            saved_s = time.monotonic()
        if stops and step < order.total_steps:
            return EXIT_STOPPED
        evaluated = held_out is None or not _evaluation_due(order, evaluation["every"], step)
        if not evaluated and held_out is not None and not _evaluate(plan, engine, held_out, ranks, stop, journal, order, step):
            journal.event("stop_seen", step=step)
            if reason is None:
                _save(run, life, plan, step, "stop", order, engine, ranks, journal)
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


def _train_step(plan: Plan, engine: Engine, samples: Samples, order: Order, ranks: Ranks, step: int) -> _Step:
    training, packing = plan.preset["training"], plan.preset["data"]["packing"]
    indices = order.samples(step)
    num_targets = int(samples.num_targets[indices].sum())
    shares = micro_slices(indices, ranks.rank, ranks.world_size, plan.batch.micro_steps)
    loss_sum, num_tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0
    for micro_step, share in enumerate(shares):
        assert len(share) <= plan.batch.micro_batch, "the plan's micro steps hold the step's samples"
        batch = collate(samples, share.tolist(), packing, training["sequence_length"])
        reseed(training["seed"], step, micro_step, ranks.rank)
        loss_sum += engine.backward(batch, num_targets, last=micro_step == len(shares) - 1)
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


def _save(run: Run, life: int, plan: Plan, step: int, reason: Reason, order: Order, engine: Engine, ranks: Ranks, journal: Journal) -> None:
    started_s = time.perf_counter()
    manifest = save(run, life, step, reason, order.completed_epoch(step), engine, ranks)
    journal.checkpoint(manifest, time.perf_counter() - started_s)
    if ranks.is_first:
        rotate(run, plan.preset["checkpoint"]["keep"], plan.preset["checkpoint"]["keep_epochs"])


def _evaluate(plan: Plan, engine: Engine, held_out: Samples, ranks: Ranks, stop: Stop, journal: Journal, order: Order, step: int) -> bool:
    """Evaluate and write it down; False when it was given up for a stop."""
    loss = evaluate(plan, engine, held_out, ranks, stop)
    if loss is None:
        return False
    journal.record("eval", step, epoch=order.epoch_fraction(step), loss=finite(loss))
    journal.say("step %d: evaluation loss %.4f", step, loss)
    return True
