"""Planning again with a change laid over the preset: what remedies and advice try. Stacks and other presets are read only for them."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.advice import advise
from launcher.cli.line import Line, Wish, observed_here, planned, read
from launcher.errors import Finding, FtlaunchError
from launcher.hardware.fits import Observed
from launcher.plan import Container, Plan, Staged
from launcher.planner import make_plan
from launcher.preset.reading import known_presets, known_stacks, locate, read_stack
from launcher.preset.stack import Stack
from launcher.remedies import Change, Replan, changed, with_remedies


def remedied(line: Line, plan: Plan, findings: Sequence[Finding], container: Container, observed: Observed) -> list[Finding]:
    """Findings whose errors name the smallest change that passes, where one was found."""
    return with_remedies(plan, findings, _replanner(line, container, plan.staged, observed), known_stacks())


def advice(line: Line, plan: Plan) -> list[Finding]:
    """What would make this run faster or cheaper, with its place in the preset."""
    replan = _replanner(line, plan.container, plan.staged, observed_here(line))
    found = advise(plan, replan, known_stacks(), _variants(line))
    return locate(found, line.preset)


def _replanner(line: Line, container: Container, staged: Staged | None, observed: Observed) -> Replan:
    stacks: dict[str, Stack] = {}

    def replan(change: Change) -> tuple[Plan, list[Finding]] | None:
        preset = changed(line.preset.value, {key: value for key, value in change.items() if not key.startswith("slurm.")})
        if preset is None:
            return None
        stack = None if line.stack is None else line.stack.value
        if "stack" in change:
            name = str(change["stack"])
            stack = stacks.setdefault(name, read_stack(name).value)
        slurm = {key: chosen.value for key, chosen in line.slurm.items()}
        slurm.update({key.removeprefix("slurm."): str(value) for key, value in change.items() if key.startswith("slurm.")})
        return make_plan(
            preset, line.hardware.value, line.site.value, stack, container=container, slurm=slurm, staged=staged, model_facts=line.facts,
            allowed=line.wish.allowed, observed=observed,
        )  # fmt: skip

    return replan


def _variants(line: Line) -> dict[str, Plan]:
    """Plans of the presets whose names begin with this one's, on the same site; those that are refused are left out."""
    found = {}
    for name in (other.name for other in known_presets() if other.name.startswith(f"{line.preset.value.name}-")):
        try:
            other = read(Wish(name, line.wish.site))
            plan, findings = planned(other)
        except FtlaunchError:
            continue
        if not any(finding.level == "error" for finding in findings):
            found[name] = plan
    return found
