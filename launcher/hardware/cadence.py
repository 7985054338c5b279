"""When to save: checkpoints of a run, what a preemption costs, the interval of least expected loss, lives within a time limit. No clock.

Young: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974). Daly: J. T. Daly, "A higher order
estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), equations 20, 37. Preemptions come at random, independent
of each other, at a mean distance; a restart and a save can be hit too.
"""

from __future__ import annotations

import math


def young_interval_s(save_s: float, between_s: float) -> float:
    """Work between two saves: sqrt(2·C·M). ``save_s``: C, training waits so long; ``between_s``: M, mean time between preemptions."""
    return math.sqrt(2 * save_s * between_s)


def daly_interval_s(save_s: float, between_s: float) -> float:
    """Daly's higher order: sqrt(2CM)·(1 + sqrt(C/2M)/3 + (C/2M)/9) − C, and M where C ≥ 2M."""
    if save_s >= 2 * between_s:
        return between_s
    x = save_s / (2 * between_s)
    return young_interval_s(save_s, between_s) * (1 + math.sqrt(x) / 3 + x / 9) - save_s


def expected_loss_share(interval_s: float, save_s: float, between_s: float, restart_s: float) -> float:
    """Expected time beyond the work itself, over the work: saves, repeated work, restarts. Daly's equation 20, exact for his model."""
    exponent = (interval_s + save_s) / between_s
    if exponent > 700:
        return math.inf
    return between_s * math.exp(restart_s / between_s) * math.expm1(exponent) / interval_s - 1


def num_due(every: str, steps: int, epochs: float) -> int:
    """How often ``every`` comes due in a run: ``epoch``, ``never``, a number of steps, a share of all steps. The last step not added."""
    if every == "never":
        return 0
    if every == "epoch":
        return math.floor(epochs + 1e-9)
    return steps // interval_steps(every, steps)


def num_evaluations(every: str, steps: int, epochs: float) -> int:
    """As ``num_due``, and the last step always unless never."""
    if every == "never":
        return 0
    due = num_due(every, steps, epochs)
    last = epochs == int(epochs) if every == "epoch" else steps % interval_steps(every, steps) == 0
    return due if last else due + 1


def interval_steps(every: str, steps: int) -> int:
    """A share of all steps is rounded up, as transformers does."""
    return math.ceil(steps * float(every[:-1]) / 100) if every.endswith("%") else int(every)


def num_lives(work_s: float, limit_s: float | None, startup_s: float, lead_s: float, step_s: float) -> int | None:
    """Lives that a run needs when each starts anew and is told to stop ``lead_s`` before its limit, whole steps only.

    None where a life has no room for a step. ``work_s``: everything but the start-ups.
    """
    if limit_s is None or work_s + startup_s <= limit_s - lead_s:
        return 1
    room = limit_s - lead_s - startup_s
    if room < step_s or step_s <= 0:
        return None
    return math.ceil(work_s / (math.floor(room / step_s) * step_s))


def save_s(checkpoint_gib: float, write_gb_s: float) -> float:
    """Seconds that training waits for one checkpoint; it is written by the ranks themselves, so they wait for all of it."""
    return checkpoint_gib * 1.073741824 / write_gb_s


def signal_lead_s(checkpoint_gib: float, write_gb_s: float, step_s: float, beside_s: float) -> int:
    """Notice before a time limit: the step that is being computed, twice the time of a save (it may meet a busy file system), and
    ``beside_s``: the way of the signal, the end of the ranks, cleaning up.
    """
    return math.ceil(step_s + 2 * save_s(checkpoint_gib, write_gb_s) + beside_s)
