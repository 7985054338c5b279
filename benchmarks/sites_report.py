"""Write docs/sites.md: what each shipped site is, supports and costs, and where each fact comes from. All from the files of the sites.

python -m benchmarks.sites_report [--print]
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.cli.compare import Compared, compare
from launcher.cli.line import Wish
from launcher.preset.reading import Loaded, read_site, shipped_presets
from launcher.preset.site import Partition, Site
from launcher.shipped import shipped

OUT = Path(__file__).parent.parent / "docs" / "sites.md"

ENVIRON = {"USER": "ada", "SCRATCH": "/scratch/ada", "SBATCH_ACCOUNT": "project"}

RUNS = {"as it is": "yes", "changed": "changed", "variant": "a variant", "no": "no"}

OVERVIEW: Sequence[tuple[str, str]] = (
    ("GPUs asked for by", "gpu_request"),
    ("their type", "gpu_type"),
    ("memory asked for by", "memory"),
    ("whole nodes", "whole_nodes"),
    ("account", "account"),
    ("partition", "partition"),
    ("after a stop", "continuation"),
    ("images are built", "build.on"),
    ("model and data are staged", "stage.on"),
    ("module for containers", "container.module"),
    ("disk of a node", "local_disk"),
    ("asked for by", "local_disk_request"),
    ("runs", "runs"),
    ("jobs in the queue", "submit_limit"),
)
"""What of a site stands beside the others: words and dotted key."""

STAR = " \\*"

NOT_FACTS = ("name", "description", "source", "sources", "unknown", "scheduler")


def clusters() -> list[str]:
    """The shipped sites that are a real cluster: those that describe partitions."""
    names = sorted(file.stem for file in (shipped("presets") / "sites").glob("*.yaml"))
    return [name for name in names if read_site(f"presets/sites/{name}", environ={}).value.partitions]


@contextmanager
def fixed_environment() -> Iterator[None]:
    """Nobody's configuration, account or folders: what is read follows from the shipped files alone."""
    before, here = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as home:
        try:
            os.environ.clear()
            os.environ.update(ENVIRON, HOME=home, PATH=home)
            os.chdir(home)
            yield
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


def text() -> str:
    sites = [read_site(f"presets/sites/{name}", environ={}) for name in clusters()]
    values = [site.value for site in sites]
    return "\n".join([*_head(), *_overview(values), *_presets(values), *(line for site in sites for line in _site(site))])


def _head() -> Iterator[str]:
    yield "# Clusters that ship"
    yield ""
    yield "Made by `python -m benchmarks.sites_report` from `presets/sites/`; do not edit. No run of ftlaunch was made on any of them: what"
    yield "stands here was read, with the source beside each fact. `?` means that nobody found it, `–` that there is none."
    yield ""
    yield "Yours is not among them, or differs: `ftlaunch site discover` writes a file, and a file of yours may `extends:` one of these."


def _overview(sites: Sequence[Site]) -> Iterator[str]:
    yield from ("", "## Side by side", "")
    rows = [("closed", *(site.closed or "–" for site in sites))]
    rows += [(words, *(_value(site, key) for site in sites)) for words, key in OVERVIEW]
    rows += [("GPU nodes reach the Internet", *(_internet(site) for site in sites))]
    yield from _table(("", *(site.name for site in sites)), rows)


def _presets(sites: Sequence[Site]) -> Iterator[str]:
    yield from ("", "## What fits where", "")
    yield "yes: as it is. changed: with fewer GPUs on more nodes, a smaller micro batch and the like, which `ftlaunch check PRESET --site"
    yield f"{','.join(site.name for site in sites)}` names. a variant: another preset of the same training. GPU-hours and cost are of what"
    yield "would run, predicted. \\*: planned and rendered, but the training does not run it yet."
    yield ""
    names = shipped_presets()
    with fixed_environment():
        found = {(row.preset, row.site): row for row in compare(names, [site.name for site in sites], Wish(""))}
    yield from _table(
        ("preset", *(site.name for site in sites)), ((name, *(_runs(found[name, site.name]) for site in sites)) for name in names)
    )


def _runs(row: Compared) -> str:
    if row.way is None:
        return "no"
    time = row.way.plan.time
    hours = f", {_number(time.gpu_hours)} GPU-h" if time is not None and time.gpu_hours else ""
    cost = f", {_number(row.cost)} {row.cost_unit}" if row.cost is not None else ""
    return f"{RUNS[row.runs]}{STAR if row.way.not_executed else ''}{hours}{cost}"


def _site(loaded: Loaded[Site]) -> Iterator[str]:
    site = loaded.value
    yield from ("", f"## {site.name}", "", f"{site.description}. {site.source}.")
    yield from ("", "| partition | GPUs of a node | nodes of a job | time | CPUs, GiB of a node | driver | asks for | a GPU-hour |")
    yield "|---|---|---|---|---|---|---|---|"
    for name, partition in site.partitions.items():
        yield f"| {' | '.join(_partition(site, name, partition))} |"
    yield ""
    facts = _facts(loaded)
    by_source: dict[str, list[str]] = {}
    for key, value in facts.items():
        by_source.setdefault(site.source_of(key) or "", []).append(f"`{key}`" if key.startswith("partitions.") else f"`{key}: {value}`")
    for key, source in site.sources.items():
        if not any(fact == key or fact.startswith(f"{key}.") for fact in facts):
            by_source.setdefault(source, []).append(f"`{key}`")
    for source, said in by_source.items():
        yield f"- {', '.join(_short(said))}: {source}"
    yield ""
    yield f"Not known: {', '.join(f'`{key}`' for key in site.unknown)}."


def _partition(site: Site, name: str, partition: Partition) -> Iterator[str]:
    def told(field: str, words: object) -> str:
        return str(words) if words is not None else "?" if site.is_unknown(f"partitions.{name}.{field}") else "–"

    gpus = "–" if partition.gpus_per_node == 0 else f"{told('gpus_per_node', partition.gpus_per_node)} × {told('gpu', partition.gpu)}"
    asked = [
        words for words in (partition.constraint and f"-C {partition.constraint}", partition.qos and f"--qos {partition.qos}") if words
    ]
    cost = None if partition.cost is None else f"{partition.cost:g} {site.cost_unit}"
    yield f"{name} (test)" if partition.test else name
    yield gpus
    yield told("max_nodes", partition.max_nodes)
    yield told("max_time", partition.max_time)
    yield f"{told('cpus_per_node', partition.cpus_per_node)}, {told('memory_per_node_gib', partition.memory_per_node_gib)}"
    yield "–" if partition.gpus_per_node == 0 else told("driver", partition.driver)
    yield ", ".join(asked) or "–"
    yield told("cost", cost)


def _facts(loaded: Loaded[Site]) -> dict[str, Any]:
    """Dotted key → value of everything that the file says; a list is one fact."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, child in value.items():
                walk(child, f"{key}.{name}" if key else name)
        elif key in loaded.provenance and key.partition(".")[0] not in NOT_FACTS:
            found[key] = ", ".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value

    walk(loaded.value.model_dump(mode="json"), "")
    return found


def _short(said: Sequence[str]) -> list[str]:
    """Facts of one partition as one: ``partitions.gpu`` for all that the file says of it."""
    return list(dict.fromkeys(f"`{'.'.join(one.strip('`').split('.')[:2])}`" if one.startswith("`partitions.") else one for one in said))


def _value(site: Site, key: str) -> str:
    value: Any = site.model_dump(mode="json")
    for name in key.split("."):
        value = value[name]
    if site.is_unknown(key):
        return "?"
    if isinstance(value, list):
        return ", ".join(value)
    return (
        {None: "–", True: "yes", False: "no"}.get(value, str(value))
        if not isinstance(value, int) or isinstance(value, bool)
        else str(value)
    )


def _internet(site: Site) -> str:
    said = {site.partitions[name].internet for name in site.partitions if site.partitions[name].gpu is not None}
    return {frozenset({True}): "yes", frozenset({False}): "no"}.get(frozenset(said), "?")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    if "--print" in sys.argv:
        print(text())
    else:
        OUT.write_text(text() + "\n")


if __name__ == "__main__":
    main()
