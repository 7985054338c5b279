"""How a site is asked for the probe's job: as for a run, of one task with as few resources as the site gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from launcher.cli.line import Wish, read
from launcher.plan import Container, Plan
from launcher.planner import make_plan
from launcher.preset.choose import Chosen
from launcher.preset.site import Site


def probe_plan(name: str | None, site: Site, asked: Mapping[str, str | None]) -> tuple[Plan, Mapping[str, Chosen]]:
    """The plan, and what was chosen of Slurm's options. Errors: UsageError.

    Without --partition: the first one for tests that has GPUs, else the first one with GPUs, else the site's default.
    """
    partition = asked.get("partition") or _with_gpus(site)
    entry = site.partitions.get(partition or "")
    most = None if entry is None else entry.gpus_per_node
    gpus = (most if site.whole_nodes else min(most, 1)) if most else 0
    settings = [f"gpus={gpus}"]
    if entry is not None and entry.hardware is not None:
        settings.append(f"hardware={entry.hardware}")
    options = {**{key: value for key, value in asked.items() if value is not None}, **({"partition": partition} if partition else {})}
    line = read(Wish("presets/tiny.yaml", name, tuple(settings), options))
    plan, _ = make_plan(
        line.preset.value,
        line.node,
        line.site.value,
        None if line.stack is None else line.stack.value,
        container=Container("none"),
        slurm={key: chosen.value for key, chosen in line.slurm.items()},
    )
    layout = replace(plan.layout, nodes=1, ranks_per_node=1, cpus_per_node=1, memory_per_node_gib=1, gpus_per_node=gpus)
    return replace(plan, layout=layout), line.slurm


def _with_gpus(site: Site) -> str | None:
    having = [name for name, entry in site.partitions.items() if entry.gpus_per_node]
    return next((name for name in having if site.partitions[name].test), next(iter(having), site.default_partition))
