"""Planning again with a change laid over the preset: what remedies and advice try. Stacks and other presets are read only for them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.advice import advise, same_training
from launcher.cli.line import Line, Wish, expected_container, observed_here, read
from launcher.errors import Finding, FtlaunchError
from launcher.hardware.fits import Observed
from launcher.plan import Container, Plan, Staged
from launcher.planner import make_plan
from launcher.preset.choose import SLURM_KEYS, with_partition
from launcher.preset.partition import node_for, partition_findings
from launcher.preset.reading import known_presets, known_stacks, locate, read_stack
from launcher.preset.stack import Stack
from launcher.remedies import Change, Replan, changed, passing, value_of, with_remedies, written
from launcher.supported import EXECUTED, choices

TOO_MANY_GPUS = ("gpus-above-node", "gpus-above-partition")

OPTIONS = {"nodes": "--nodes", "gpus": "--gpus", **{f"slurm.{key}": f"--{key}" for key in SLURM_KEYS}}
"""Keys of the preset that have an option of their own."""


@dataclass(frozen=True)
class Way:
    """A preset and a change of it that pass on a site."""

    preset: str
    before: Plan
    change: Change
    plan: Plan
    typed: tuple[str, ...] = ()
    """Options of the command that hold for it too."""

    @property
    def arguments(self) -> str:
        """As one types it after ``ftlaunch check``: the preset, then what is changed."""
        new = {key: value for key, value in self.change.items() if key.startswith("slurm.") or value_of(self.before, key) != value}
        words = [self.preset, *self.typed]
        for key, value in new.items():
            words += [OPTIONS[key], written(value)] if key in OPTIONS else ["--set", f"{key}={'null' if value is None else written(value)}"]
        return shlex.join(words)

    @property
    def not_executed(self) -> list[str]:
        """What the training cannot run yet of it."""
        return [value for key, value in choices(self.plan.preset, self.plan.attention).items() if value not in EXECUTED[key]]


def remedied(line: Line, plan: Plan, findings: Sequence[Finding], container: Container, observed: Observed) -> list[Finding]:
    """Findings whose errors name the smallest change that passes, where one was found; too many GPUs also the variant that passes."""
    found = with_remedies(plan, findings, replanner(line, container, plan.staged, observed), known_stacks())
    if not any(finding.code in TOO_MANY_GPUS for finding in findings):
        return found
    way = variant_way(line, plan, observed)
    if way is None:
        return found
    later = f"; not executed yet: {', '.join(way.not_executed)}" if way.not_executed else ""
    words = f"passes here: ftlaunch check {way.arguments}{later}"
    tried = {id(finding) for finding in findings}  # a finding that stayed as it was has no remedy that was tried
    return [
        replace(finding, hint=words if id(finding) in tried or finding.hint is None else f"{finding.hint}; or {words}")
        if finding.level == "error" and finding.code in TOO_MANY_GPUS
        else finding
        for finding in found
    ]


def advice(line: Line, plan: Plan) -> list[Finding]:
    """What would make this run faster or cheaper, with its place in the preset."""
    observed = observed_here(line)
    variants = {}
    for other in variant_lines(line):
        variant, findings = unremedied(other, observed)
        if not any(finding.level == "error" for finding in findings):
            variants[other.preset.value.name] = variant
    found = advise(plan, replanner(line, plan.container, plan.staged, observed), known_stacks(), variants)
    return locate(found, line.preset)


def unremedied(line: Line, observed: Observed) -> tuple[Plan, list[Finding]]:
    """The plan and its findings, without a look for what would pass."""
    result = replanner(line, expected_container(line), None, observed)({})
    assert result is not None, "without a change the preset makes sense"
    return result


def own_way(line: Line, plan: Plan, findings: Sequence[Finding], observed: Observed) -> Way | None:
    """The change of the preset itself that passes, empty where nothing refuses it; other partitions of the site are tried last."""
    found = _passing(line, observed, plan, findings)
    return None if found is None else Way(line.wish.preset, plan, *found, typed(line.wish))


def variant_way(line: Line, plan: Plan, observed: Observed) -> Way | None:
    """The shipped variant of this preset that trains the same and passes, changed where it must be; those that are executed come first."""
    ways = []
    for other in variant_lines(line):
        variant, findings = unremedied(other, observed)
        found = _passing(other, observed, variant, findings) if same_training(plan, variant) else None
        if found is not None:
            ways.append(Way(other.preset.value.name, variant, *found, typed(other.wish)))
    return min(ways, key=lambda way: len(way.not_executed), default=None)


def variant_lines(line: Line) -> Iterator[Line]:
    """The presets whose names begin with this one's, on the same site, with the account, the partition and the like that were typed."""
    chosen = {key: value for key, value in (line.wish.options or {}).items() if key in SLURM_KEYS and key != "time"}
    for name in (other.name for other in known_presets() if other.name.startswith(f"{line.preset.value.name}-")):
        try:
            yield read(Wish(name, line.wish.site, options=chosen))
        except FtlaunchError:
            continue


def typed(wish: Wish) -> tuple[str, ...]:
    """The command's options that choose the plan, but for the site's."""
    options = [word for key, value in (wish.options or {}).items() if value is not None for word in (f"--{key}", str(value))]
    return (*(word for setting in wish.settings for word in ("--set", setting)), *options)


def _passing(line: Line, observed: Observed, plan: Plan, findings: Sequence[Finding]) -> tuple[Change, Plan] | None:
    """In the partition that was chosen, else in another one of the site, where the user named none."""
    replan, stacks = replanner(line, plan.container, plan.staged, observed), known_stacks()
    found = passing(plan, findings, replan, stacks)
    if found is not None or (line.partition is not None and not line.slurm["partition"].source.startswith("site ")):
        return found
    for name in line.nodes:
        if name == line.partition or line.site.value.partitions[name].test:
            continue
        there: Change = {"slurm.partition": name}
        result = replan(there)
        found = None if result is None else passing(*result, _after(there, replan), stacks)
        if found is not None:
            return {**there, **found[0]}, found[1]
    return None


def _after(before: Change, replan: Replan) -> Replan:
    return lambda change: replan({**before, **change})


def replanner(line: Line, container: Container, staged: Staged | None, observed: Observed) -> Replan:
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
        if "slurm.partition" in change:
            slurm = with_partition(line.slurm, line.site.value, str(change["slurm.partition"]))
        slurm.update({key.removeprefix("slurm."): str(value) for key, value in change.items() if key.startswith("slurm.")})
        site, wanted, partition = line.site.value, line.hardware.value, slurm.get("partition")
        plan, findings = make_plan(
            preset, node_for(preset, wanted, site, partition, line.nodes), site, stack, container=container, slurm=slurm, staged=staged,
            model_facts=line.facts, allowed=line.wish.allowed, observed=observed,
        )  # fmt: skip
        return plan, [*partition_findings(preset, wanted, site, partition, line.suits, line.nodes), *findings]

    return replan
