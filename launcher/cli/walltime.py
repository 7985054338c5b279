"""The time limit of a submission, fitted to what Slurm says now: asked by ``submit`` and ``resume``, never by ``check`` and ``render``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from launcher.cli.line import Line
from launcher.cli.show import show_findings
from launcher.errors import Finding
from launcher.plan import Plan
from launcher.preset.choose import Chosen
from launcher.preset.fields import duration_text
from launcher.preset.reading import read_config
from launcher.run import Run
from launcher.site.limits import Choice, ask_limits, choose_time
from launcher.site.machine_facts import user_name
from launcher.slurm.waiting import MINUTES

FULL_TIME = "full_time_min"
"""In an event of submission: the limit without the maintenance that its own ends before. Follow-up jobs and ``resume`` take it again."""


@dataclass(frozen=True)
class Fitted:
    line: Line
    plan: Plan
    details: Mapping[str, object] = field(default_factory=dict)
    """For the event of the submission."""


def fit(line: Line, plan: Plan, replan: Callable[[Line], tuple[Plan, list[Finding]]], *, wanted_min: int | None = None) -> Fitted:
    """What is submitted; says in a line what it changed and why. ``wanted_min``: a limit that nobody typed, in the place of the plan's."""
    typed = wanted_min is None and "time" in line.slurm
    wanted = wanted_min or plan.time_limit_min
    choice = _asked(plan, wanted, typed=typed)
    if choice is None or wanted is None:
        return Fitted(line, plan)
    if choice.time_min == plan.time_limit_min:
        show_findings(choice.findings)
        return Fitted(line, plan, _details(choice, wanted))
    other = replace(line, slurm={**line.slurm, "time": Chosen(duration_text(choice.time_min), "what Slurm allows now")})
    changed, found = replan(other)
    errors = [finding for finding in found if finding.level == "error"]
    if errors:  # too short for this run: better late
        late = _asked(plan, wanted, typed=True)
        show_findings([*(late.findings if late else ()), replace(errors[0], level="advice")])
        return Fitted(line, plan)
    show_findings(choice.findings)
    return Fitted(other, changed, _details(choice, wanted))


def fits_as_it_is(run: Run, plan: Plan) -> bool:
    """Whether a run may be resumed with the time limit that it has. Otherwise ``fit`` has more to say."""
    wanted = full_time_min(run, plan)
    if wanted is None:
        _show(_asked(plan, plan.time_limit_min, typed=True))
        return True
    choice = _asked(plan, wanted, typed=False)
    if choice is None or choice.time_min == plan.time_limit_min:
        _show(choice)
        return True
    return False


def with_minutes(command: str, plan: Plan) -> str:
    """``command`` with the time limit that would let a waiting job start, in the place of ``MINUTES``, where Slurm says what that is."""
    choice = _asked(plan, plan.time_limit_min, typed=False)
    return command if choice is None or choice.time_min == plan.time_limit_min else command.replace(MINUTES, str(choice.time_min))


def full_time_min(run: Run, plan: Plan) -> int | None:
    """The time limit as it was before a maintenance; None where a person typed one, and without Slurm."""
    config = read_config()
    own = None if config is None else config.value.slurm.time
    if plan.time_limit_min is None or plan.preset["slurm"]["time"] is not None or own is not None:
        return None
    sent = run.events("submitted", "resumed")
    return int(sent[-1].get(FULL_TIME) or plan.time_limit_min) if sent else plan.time_limit_min


def _asked(plan: Plan, wanted_min: int | None, *, typed: bool) -> Choice | None:
    """None without Slurm."""
    if wanted_min is None or plan.site["scheduler"] != "slurm" or shutil.which("scontrol") is None:
        return None
    time = plan.time
    startup_s = 0.0 if time is None else time.startup_s
    needed = None if time is None or time.total_h is None else 60 * time.total_h
    overhead_min = (startup_s + plan.signal_lead_s) / 60
    limits = ask_limits(plan.slurm, plan.layout.nodes, user_name())
    return choose_time(wanted_min, limits, typed=typed, now=datetime.now(), needed_min=needed, overhead_min=overhead_min)


def _details(choice: Choice, wanted_min: int) -> dict[str, object]:
    cut = any(finding.code == "maintenance" and finding.level == "advice" for finding in choice.findings)
    return {FULL_TIME: wanted_min} if cut else {}


def _show(choice: Choice | None) -> None:
    if choice is not None:
        show_findings(choice.findings)
