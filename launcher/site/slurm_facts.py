"""What Slurm's programs print → facts. Pure: it parses texts of Slurm 20.11 to 25 (key=value and ``-P`` tables, which all of them
print; not JSON, which few do). What follows from the facts is ``launcher.site.conclude``'s business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_KEY = re.compile(r"(?:^|\s)([A-Za-z][A-Za-z0-9_/:\[\]]*)=")
_LINE = re.compile(r"^(\S+)\s*= (.*)$", re.MULTILINE)
_COUNT = re.compile(r"(\d+)([KMGT]?)", re.IGNORECASE)

NOTHING = ("", "(null)", "N/A", "NONE", "None", "UNLIMITED", "unlimited", "INFINITE", "n/a")
"""How Slurm writes that something is not set or not limited."""

_FACTOR = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Gres:
    """One generic resource of a node: ``gpu:a100:4``."""

    name: str
    type: str | None
    count: int


@dataclass(frozen=True)
class Node:
    name: str
    partitions: tuple[str, ...]
    gres: tuple[Gres, ...]
    features: tuple[str, ...]
    cores: int
    """CPU cores that jobs may have; a core with two hardware threads counts once."""
    memory_mib: int
    """That jobs may have."""
    tmp_disk_mib: int


@dataclass(frozen=True)
class PartitionFacts:
    name: str
    default: bool
    state: str
    max_time_min: int | None
    default_time_min: int | None
    max_nodes: int | None
    num_nodes: int | None
    exclusive: bool
    preempt_mode: str
    grace_s: int
    tier: int
    qos: str | None
    """The QoS whose limits hold for every job in it."""
    accounts: frozenset[str] | None
    """None: all."""
    denied_accounts: frozenset[str]
    allowed_qos: frozenset[str] | None
    denied_qos: frozenset[str]
    groups: frozenset[str] | None
    root_only: bool
    needs_reservation: bool
    cpus_per_gpu: int | None
    memory_per_gpu_mib: int | None
    max_memory_per_node_mib: int | None
    max_memory_per_cpu_mib: int | None
    num_gpus: int
    """Of all its nodes, as its TRES count them."""


@dataclass(frozen=True)
class Qos:
    name: str
    priority: int
    grace_s: int
    preempts: tuple[str, ...]
    preempt_mode: str
    max_wall_min: int | None
    max_submit: int | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Association:
    """What lets this user submit: an account, in all partitions or in one."""

    account: str
    partition: str | None
    qos: tuple[str, ...]
    default_qos: str | None
    max_submit: int | None
    max_wall_min: int | None


@dataclass(frozen=True)
class Reservation:
    name: str
    start: str
    end: str
    nodes: str
    flags: tuple[str, ...]


def config(text: str) -> dict[str, str]:
    """``scontrol show config``: name → value, as it is written."""
    return {match[1]: match[2].strip() for match in _LINE.finditer(text)}


def records(text: str) -> list[dict[str, str]]:
    """The ``Key=value`` blocks of scontrol: one a line (``-o``), or several lines with an empty one between. Values may hold spaces."""
    blocks = re.split(r"\n\s*\n|\n(?=\S)", text.strip())
    return [record for block in blocks if (record := _record(block))]


def table(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """``sacctmgr -n -P … format=COLUMNS``."""
    lines = [line.split("|") for line in text.splitlines() if "|" in line or (line.strip() and len(columns) == 1)]
    return [dict(zip(columns, [*line, *[""] * len(columns)])) for line in lines]


def partitions(text: str) -> list[PartitionFacts]:
    """``scontrol show partition``."""
    return [_partition(record) for record in records(text) if record.get("PartitionName")]


def nodes(text: str) -> list[Node]:
    """``scontrol -o show node``."""
    return [_node(record) for record in records(text) if record.get("NodeName")]


def reservations(text: str) -> list[Reservation]:
    """``scontrol -o show reservation``."""
    return [
        Reservation(
            record["ReservationName"],
            record.get("StartTime", ""),
            record.get("EndTime", ""),
            record.get("Nodes", ""),
            _words(record.get("Flags", "")),
        )
        for record in records(text)
        if record.get("ReservationName")
    ]


QOS_COLUMNS = ("Name", "Priority", "GraceTime", "Preempt", "PreemptMode", "Flags", "MaxWall", "MaxSubmitPU")
ASSOCIATION_COLUMNS = ("Account", "Partition", "QOS", "DefaultQOS", "MaxSubmit", "MaxWall")


def qualities(text: str) -> list[Qos]:
    """``sacctmgr -n -P show qos format=QOS_COLUMNS``."""
    return [
        Qos(
            row["Name"],
            number(row["Priority"]) or 0,
            _seconds(row["GraceTime"]),
            _words(row["Preempt"]),
            row["PreemptMode"].lower(),
            minutes(row["MaxWall"]),
            number(row["MaxSubmitPU"]),
            _words(row["Flags"]),
        )
        for row in table(text, QOS_COLUMNS)
        if row["Name"]
    ]


def associations(text: str) -> list[Association]:
    """``sacctmgr -n -P show assoc where user=… format=ASSOCIATION_COLUMNS``."""
    return [
        Association(
            row["Account"],
            row["Partition"] or None,
            _words(row["QOS"]),
            row["DefaultQOS"] or None,
            number(row["MaxSubmit"]),
            minutes(row["MaxWall"]),
        )
        for row in table(text, ASSOCIATION_COLUMNS)
        if row["Account"]
    ]


def gres(text: str) -> tuple[Gres, ...]:
    """``gpu:a100:4(S:0-1),nvme:1`` or ``gpu:4``; a count with a unit (``localtmp:3800G``) is given in full."""
    if text in NOTHING:
        return ()
    found = []
    for word in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = word.strip().split(":")
        count = _COUNT.fullmatch(rest[-1]) if rest else None
        kind = ":".join(rest[:-1] if count else rest)
        found.append(Gres(name, kind or None, int(count[1]) * _FACTOR[count[2].upper()] if count else 1))
    return tuple(found)


def minutes(text: str) -> int | None:
    """Of Slurm's ``[days-]hours:minutes:seconds``, ``minutes:seconds`` or ``minutes``, rounded up; None where there is no limit."""
    seconds = _seconds(text)
    return -(-seconds // 60) or None


def number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def mode(numbers: Sequence[int]) -> int:
    """The most frequent one, of several the smallest. ``numbers`` is not empty."""
    counted = Counter(numbers)
    return min(counted, key=lambda value: (-counted[value], value))


def _record(block: str) -> dict[str, str]:
    found = list(_KEY.finditer(block))
    ends = [*(match.start() for match in found[1:]), len(block)]
    record: dict[str, str] = {}
    for match, end in zip(found, ends):
        record.setdefault(match[1], block[match.end() : end].strip())
    return record


def _partition(record: Mapping[str, str]) -> PartitionFacts:
    defaults = _pairs(record.get("JobDefaults", ""))
    tres = _pairs(record.get("TRES", ""))
    typed = [number(value) or 0 for name, value in tres.items() if name.startswith("gres/gpu:")]
    return PartitionFacts(
        name=record["PartitionName"],
        default=record.get("Default") == "YES",
        state=record.get("State", "UP"),
        max_time_min=minutes(record.get("MaxTime", "")),
        default_time_min=minutes(record.get("DefaultTime", "")),
        max_nodes=number(record.get("MaxNodes", "")),
        num_nodes=number(record.get("TotalNodes", "")),
        exclusive=record.get("OverSubscribe", record.get("Shared", "")).startswith("EXCLUSIVE"),
        preempt_mode=record.get("PreemptMode", "").upper(),
        grace_s=number(record.get("GraceTime", "")) or 0,
        tier=number(record.get("PriorityTier", "")) or 0,
        qos=_named(record.get("QoS", "")),
        accounts=_set(record.get("AllowAccounts", "ALL")),
        denied_accounts=_set(record.get("DenyAccounts", "")) or frozenset(),
        allowed_qos=_set(record.get("AllowQos", "ALL")),
        denied_qos=_set(record.get("DenyQos", "")) or frozenset(),
        groups=_set(record.get("AllowGroups", "ALL")),
        root_only=record.get("RootOnly") == "YES",
        needs_reservation=record.get("ReqResv") == "YES",
        cpus_per_gpu=number(defaults.get("DefCpuPerGPU", "")),
        memory_per_gpu_mib=number(defaults.get("DefMemPerGPU", "")),
        max_memory_per_node_mib=number(record.get("MaxMemPerNode", "")),
        max_memory_per_cpu_mib=number(record.get("MaxMemPerCPU", "")),
        num_gpus=number(tres.get("gres/gpu", "")) or sum(typed),
    )


def _node(record: Mapping[str, str]) -> Node:
    threads = number(record.get("ThreadsPerCore", "")) or 1
    cpus = number(record.get("CPUEfctv", "")) or number(record.get("CPUTot", "")) or 0
    return Node(
        name=record["NodeName"],
        partitions=_words(record.get("Partitions", "")),
        gres=gres(record.get("Gres", "")),
        features=_words(record.get("ActiveFeatures", record.get("AvailableFeatures", ""))),
        # Where a CPU is a hardware thread CPUTot counts both threads of a core; elsewhere it is the number of cores already.
        cores=min(cpus, cpus // threads if cpus > _cores(record) else cpus),
        memory_mib=(number(record.get("RealMemory", "")) or 0) - (number(record.get("MemSpecLimit", "")) or 0),
        tmp_disk_mib=number(record.get("TmpDisk", "")) or 0,
    )


def _cores(record: Mapping[str, str]) -> int:
    return (number(record.get("Sockets", "")) or 1) * (number(record.get("CoresPerSocket", "")) or 1)


def _seconds(text: str) -> int:
    """0 for no limit and what is no time."""
    days, dash, rest = text.strip().rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", rest) or not (days or "0").isdigit():
        return 0
    parts = [int(part) for part in rest.split(":")]
    if dash:  # days-hours, days-hours:minutes, days-hours:minutes:seconds
        hours, middle, last = [*parts, 0, 0][:3]
    else:  # minutes, minutes:seconds, hours:minutes:seconds
        hours, middle, last = parts if len(parts) == 3 else (0, *[*parts, 0][:2])
    return ((int(days or 0) * 24 + hours) * 60 + middle) * 60 + last


def _words(text: str) -> tuple[str, ...]:
    return () if text in NOTHING else tuple(word for word in text.split(",") if word)


def _named(text: str) -> str | None:
    return None if text in NOTHING else text


def _set(text: str) -> frozenset[str] | None:
    """None for ALL and for what is not said."""
    return None if text == "ALL" or text in NOTHING else frozenset(text.split(","))


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split(",") if "=" in word)
