"""``check`` of presets on several sites at once: what fits where and why not, what would run there instead, how long, and what it costs.

Nothing of this machine is looked at: no disk, no driver that earlier runs met, no queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.cli.line import Wish, read
from launcher.cli.replan import Way, own_way, unremedied, variant_way
from launcher.cli.show import drawable
from launcher.errors import Finding, FtlaunchError
from launcher.hardware.fits import UNOBSERVED
from launcher.plan import Plan
from launcher.preset.reading import locate
from launcher.preset.site import Site
from launcher.remedies import refusals

HEADER = ("site", "partition", "runs", "step", "total", "lives", "GPU-hours", "cost")


@dataclass(frozen=True)
class Compared:
    """A preset on a site."""

    preset: str
    site: str
    findings: tuple[Finding, ...]
    plan: Plan | None
    """Of the preset as it is; None where it cannot be read."""
    way: Way | None
    """What would run there: the preset as it is, changed, or a variant; None where nothing was found."""
    cost: float | None = None
    cost_unit: str | None = None

    @property
    def fits(self) -> bool:
        return self.plan is not None and not refusals(self.findings)

    @property
    def refusal(self) -> Finding | None:
        """The first reason why not."""
        errors = [finding for finding in self.findings if finding.level == "error"]
        return next(iter(refusals(self.findings)), None) or next(iter(errors), None)

    @property
    def ok(self) -> bool:
        return self.plan is not None and self.refusal is None

    @property
    def runs(self) -> Literal["as it is", "changed", "variant", "no"]:
        if self.way is None:
            return "no"
        return "as it is" if self.fits else "changed" if self.way.preset == self.preset else "variant"

    @property
    def to_do(self) -> list[str]:
        """What is no matter of the plan: an account, a site that is closed."""
        if self.plan is None:
            return []
        told = [finding for finding in self.findings if finding.level == "error" and finding not in refusals(self.findings)]
        told += [finding for finding in self.findings if finding.code == "site-closed"]
        return [finding.message for finding in told]

    def to_json(self) -> dict[str, Any]:
        """``runs``: of what would run, the figures; null where nothing was found."""
        way, refusal = self.way, self.refusal
        return {
            "preset": self.preset,
            "site": self.site,
            "partition": None if self.plan is None else self.plan.slurm.get("partition"),
            "ok": self.ok,
            "fits": self.fits,
            "refusal": None if refusal is None else refusal.to_json(),
            "to_do": self.to_do,
            "findings": [finding.to_json() for finding in self.findings],
            "runs": None if way is None else {**_figures(way), "cost": self.cost, "cost_unit": self.cost_unit},
        }


def compare(presets: Sequence[str], sites: Sequence[str], wish: Wish) -> list[Compared]:
    """Every preset on every site. ``wish``: the options and settings that were typed, for all of them."""
    return [_compared(Wish(preset, site, wish.settings, wish.options, wish.allowed)) for preset in presets for site in sites]


def show_compared(rows: Sequence[Compared], console: Console) -> None:
    """For each preset a table of the sites, with the figures of what would run there; then why not as it is, and what to type."""
    for preset in dict.fromkeys(row.preset for row in rows):
        own = [row for row in rows if row.preset == preset]
        console.print(Text(drawable(f"── {preset} ──", console), style="bold"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in HEADER:
            table.add_column(name, no_wrap=True)
        for row in own:
            table.add_row(*(Text(drawable(value, console), style=style) for value, style in _cells(row)))
        console.print(table)
        for row in own:
            for line in _words(row):
                console.print(drawable(line, console), markup=False, soft_wrap=True)
        console.print()


def _compared(wish: Wish) -> Compared:
    assert wish.site is not None
    try:
        line = read(wish)
        plan, findings = unremedied(line, UNOBSERVED)
    except FtlaunchError as error:
        return Compared(wish.preset, wish.site, error.findings, None, None)
    findings = locate(findings, line.preset)
    way = own_way(line, plan, findings, UNOBSERVED) or variant_way(line, plan, UNOBSERVED)
    cost = None if way is None else _cost(way.plan, line.site.value)
    return Compared(wish.preset, line.site.value.name, tuple(findings), plan, way, cost, line.site.value.cost_unit)


def _cost(plan: Plan, site: Site) -> float | None:
    """In the site's unit: GPU-hours, of the whole node where the site gives no less."""
    partition = site.partitions.get(plan.slurm.get("partition", ""))
    if partition is None or partition.cost is None or plan.time is None or plan.time.total_h is None or not plan.layout.gpus_per_node:
        return None
    gpus = int(plan.hardware["gpus"]) if site.whole_nodes else plan.layout.gpus_per_node
    return plan.layout.nodes * gpus * plan.time.total_h * partition.cost


def _figures(way: Way) -> dict[str, Any]:
    plan, time = way.plan, way.plan.time
    return {
        "command": f"ftlaunch check {way.arguments}",
        "change": dict(way.change),
        "name": plan.name,
        "partition": plan.slurm.get("partition"),
        "nodes": plan.layout.nodes,
        "gpus_per_node": plan.layout.gpus_per_node,
        "gpu": plan.hardware["gpu"]["kind"] if plan.hardware["gpu"] else None,
        "step_s": None if time is None else time.step_s,
        "total_h": None if time is None else time.total_h,
        "gpu_hours": None if time is None else time.gpu_hours,
        "lives": None if time is None or time.continuations is None else time.continuations + 1,
        "not_executed": way.not_executed,
    }


def _cells(row: Compared) -> list[tuple[str, str]]:
    plan = row.plan if row.way is None else row.way.plan
    partition = (None if plan is None else plan.slurm.get("partition")) or "–"
    if row.way is None:
        return [(row.site, ""), (partition, ""), ("no", "bold red"), *[("–", "dim")] * 5]
    figures = _figures(row.way)
    return [
        (row.site, ""),
        (partition, ""),
        (row.runs, "green" if row.fits else "yellow"),
        (_number(figures["step_s"], " s"), ""),
        (_number(figures["total_h"], " h"), ""),
        (_number(figures["lives"]), ""),
        (_number(figures["gpu_hours"]), ""),
        (_number(row.cost, f" {row.cost_unit}"), ""),
    ]


def _words(row: Compared) -> Iterator[str]:
    if not row.fits:
        assert row.refusal is not None
        yield f"{row.site}: {row.refusal.message}"
        if row.way is not None:
            yield f"  → ftlaunch check {row.way.arguments} --site {row.site}"
        elif row.plan is not None:
            yield "  → nothing that trains the same was found to pass"
    if row.way is not None and row.way.not_executed:
        yield f"{row.site}: not executed yet, submit refuses: {', '.join(row.way.not_executed)}"
    yield from row.to_do


def _number(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"
