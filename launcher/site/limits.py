"""How long a job may be, asked when it is submitted: the limits of partition, QoS and account, and the maintenance that comes.

``ask_limits`` asks four or five small questions; ``choose_time`` is pure and holds the rule. Neither has a part in a plan that is only
checked or rendered, which must come out the same everywhere.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from launcher.errors import Finding
from launcher.site import ask, slurm_facts
from launcher.site.slurm_facts import NOTHING

TIMEOUT_S = 10.0

USEFUL_MIN = 30
"""A life shorter than this is not worth its place in the queue, unless the run is over by then."""
MARGIN_MIN, MARGIN_SHARE = 10, 0.1
"""A job does not start at once: this much of the time before a maintenance is left for the queue."""
ROUND_MIN = 5


@dataclass(frozen=True)
class Maintenance:
    name: str
    start: datetime
    end: datetime
    """In the cluster's local time, as Slurm prints it."""


@dataclass(frozen=True)
class Limits:
    """What Slurm said; nothing where it did not."""

    longest_min: int | None = None
    by: str = ""
    """Who allows no more: ``partition gpu``, ``QoS debug``, ``account ml``."""
    maintenances: tuple[Maintenance, ...] = ()
    """Those to come that leave the partition fewer nodes than the job wants, the next one first."""


@dataclass(frozen=True)
class Choice:
    time_min: int
    findings: tuple[Finding, ...] = ()


def ask_limits(options: Mapping[str, str], nodes: int, user: str, *, timeout_s: float = TIMEOUT_S) -> Limits:
    """``options``: those of the job. Never an error: what does not answer limits nothing here, and Slurm itself refuses what it must."""
    columns = ",".join(slurm_facts.ASSOCIATION_COLUMNS)
    partitions = ("scontrol", "show", "partition")
    config = slurm_facts.config(ask.texts([ask.CONFIG], timeout_s, {})[ask.CONFIG])
    cluster = ask.Cluster(config)
    here = [f"cluster={config['ClusterName']}"] if "ClusterName" in config else []
    associations = ("sacctmgr", "-n", "-P", "show", "assoc", "where", f"user={user}", *here, f"format={columns}")
    accounting = [associations, ask.QOS] if {"limits", "qos", "safe"} & cluster.enforced else []
    said = ask.texts([partitions, ask.RESERVATIONS, *accounting], timeout_s, {})
    return limits_of(options, nodes, said[partitions], said[ask.RESERVATIONS], said.get(associations, ""), said.get(ask.QOS, ""))


def limits_of(options: Mapping[str, str], nodes: int, partitions: str, reservations: str, associations: str = "", qos: str = "") -> Limits:
    """From what Slurm's programs print. ``associations`` and ``qos``: empty where their limits are not enforced."""
    records = [record for record in slurm_facts.records(partitions) if record.get("PartitionName")]
    asked = options["partition"].split(",") if "partition" in options else None
    mine = [one for one in records if (one.get("Default") == "YES" if asked is None else one["PartitionName"] in asked)]
    found = [(slurm_facts.minutes(record.get("MaxTime", "")), f"partition {record['PartitionName']}") for record in mine]
    found.append(_wall(options, [record.get("QoS", "") for record in mine], associations, qos))
    limited = [(limit, by) for limit, by in found if limit is not None]
    longest, by = min(limited) if limited else (None, "")
    there = {name for record in mine for name in hostnames(record.get("Nodes", ""))}
    coming = _maintenances(reservations, there, nodes, options.get("reservation")) if there else []
    return Limits(longest, by, tuple(coming))


def choose_time(
    wanted_min: int, limits: Limits, *, typed: bool, now: datetime, needed_min: float | None = None, overhead_min: float = 0.0
) -> Choice:
    """The time limit to ask for. What a person ``typed`` is kept, and warned about.

    Nobody typed one: no more than partition, QoS and account allow; and where a maintenance would come in between, so much that the job
    ends before it with a tenth of the time until then (at least ``MARGIN_MIN``) left for the queue. That is done if it leaves a useful
    life: twice what the whole run is predicted to need (``needed_min``), or ``USEFUL_MIN`` and four times what a life costs
    (``overhead_min``: start-up and notice). Otherwise the limit stays, and the job starts after the maintenance.
    """
    found: list[Finding] = []
    time_min = wanted_min
    if limits.longest_min is not None and wanted_min > limits.longest_min:
        most, asked = _text(limits.longest_min), _text(wanted_min)
        if typed:
            message = f"time limit {asked}, but {limits.by} allows {most}: Slurm refuses the job or never starts it"
            found.append(Finding("warning", "time-above-limit", message, key="slurm.time", hint=f"--time {limits.longest_min}m"))
        else:
            time_min = limits.longest_min
            message = f"time limit {most} instead of {asked}: {limits.by} allows no more"
            found.append(Finding("advice", "time-above-limit", message, key="slurm.time"))
    start, hit = _earliest(time_min, limits, now)
    if hit is None:
        return Choice(time_min, tuple(found))
    until_min = (hit.start - now).total_seconds() / 60
    room_min = int(until_min - max(MARGIN_MIN, MARGIN_SHARE * until_min)) // ROUND_MIN * ROUND_MIN
    useful_min = max(USEFUL_MIN, 4 * overhead_min)
    useful_min = useful_min if needed_min is None else min(2 * needed_min, useful_min)
    when = f"maintenance {hit.name} ({_clock(hit.start)} to {_clock(hit.end)})"
    if not typed and room_min > 0 and room_min >= useful_min:
        message = f"time limit {_text(room_min)} instead of {_text(time_min)}, to end before {when}"
        hint = "--time TIME for another; ftlaunch resume takes the whole limit again"
        return Choice(room_min, (*found, Finding("advice", "maintenance", message, key="slurm.time", hint=hint)))
    message = f"a time limit of {_text(time_min)} reaches into {when}: the job starts {_clock(start)} at the earliest"
    short = f"--time {room_min}m would end before it" if room_min >= MARGIN_MIN else None
    return Choice(time_min, (*found, Finding("warning", "maintenance", message, key="slurm.time", hint=short)))


def hostnames(expression: str) -> list[str]:
    """``node[1-2,7],login`` as names."""
    if expression in NOTHING:
        return []
    return [name for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", expression) for name in _expanded(word)]


def _expanded(word: str) -> list[str]:
    parts = [[part] if not part.startswith("[") else _numbers(part[1:-1]) for part in re.findall(r"\[[^\]]*\]|[^\[]+", word)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _numbers(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return found


def _wall(options: Mapping[str, str], partition_qos: list[str], associations: str, qos: str) -> tuple[int | None, str]:
    """MaxWall of the partition's QoS, else of the job's, else of the account: the first that says one counts (resource_limits.html)."""
    rows = [one for one in slurm_facts.associations(associations) if options.get("account") in (None, one.account)]
    known = {one.name: one.max_wall_min for one in slurm_facts.qualities(qos)}
    defaults = {one.default_qos for one in rows} if len({one.default_qos for one in rows}) == 1 else set()
    for name in (*partition_qos, options.get("qos") or next(iter(defaults), None)):
        if name is not None and known.get(name) is not None:
            return known[name], f"QoS {name}"
    # one row for each partition that has one of its own; without an account named nothing tells which of several Slurm takes
    return (rows[0].max_wall_min, f"account {rows[0].account}") if len(rows) == 1 else (None, "")


def _maintenances(text: str, there: set[str], nodes: int, own: str | None) -> list[Maintenance]:
    found = []
    for one in slurm_facts.reservations(text):
        if "MAINT" not in one.flags or one.name == own or len(there - set(hostnames(one.nodes))) >= max(nodes, 1):
            continue
        try:
            found.append(Maintenance(one.name, datetime.fromisoformat(one.start), datetime.fromisoformat(one.end)))
        except ValueError:
            continue
    return sorted(found, key=lambda one: one.start)


def _earliest(time_min: int, limits: Limits, now: datetime) -> tuple[datetime, Maintenance | None]:
    """When a job of this length could start at the earliest, and the first maintenance in its way."""
    start, hit = now, None
    for one in limits.maintenances:
        if one.end > start and start + timedelta(minutes=time_min) > one.start:
            start, hit = one.end, hit or one
    return start, hit


def _text(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    return f"{hours}h{rest:02d}" if hours and rest else f"{hours}h" if hours else f"{rest}m"


def _clock(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M")
