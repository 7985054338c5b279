"""The GPUs of a partition's nodes, and how a site's GPUs are asked for. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.preset.hardware import Hardware
from launcher.site.ask import Cluster
from launcher.site.kinds import SLICE, Kind, kind_of
from launcher.site.slurm_facts import Gres, Node, PartitionFacts


@dataclass(frozen=True)
class PartitionGpus:
    per_node: int | None = None
    """None: Slurm knows none."""
    types: frozenset[str | None] = frozenset()
    """As Slurm has them; None: untyped."""
    kind: str | None = None
    hardware: str | None = None
    constraint: str | None = None
    """A feature that only the nodes of ``kind`` have, where the partition has others as well."""
    nodes: tuple[Node, ...] = ()
    """Those that these facts are about."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    form: Literal["gres", "none"]
    why: str
    type: str | None = None
    typed: bool = False
    open: bool = False
    """Whether a type has to be written depends on the partition."""


def gpus_of(partition: PartitionFacts, cluster: Cluster, hardware: Sequence[Hardware]) -> PartitionGpus:
    members = [node for node in cluster.nodes if partition.name in node.partitions]
    if not members:
        if partition.num_gpus and partition.num_nodes:
            note = f"{partition.num_gpus} GPUs on {partition.num_nodes} nodes; which nodes have them is not shown"
            return PartitionGpus(-(-partition.num_gpus // partition.num_nodes), frozenset([None]), notes=(note,))
        return PartitionGpus()
    having = {node: whole for node in members if (whole := _gpus(node, slices=False))}
    if not having:
        return _slices(members)
    types = frozenset(gres.type for whole in having.values() for gres in whole)
    kinds = {node: kind_of(whole[0].type, node.features, hardware) for node, whole in having.items()}
    families = {None if kind is None else kind.family for kind in kinds.values()}
    notes = list(_notes(kinds))
    if len(families) > 1:
        per_node = max(_count(whole) for whole in having.values())
        return PartitionGpus(per_node, types, nodes=tuple(having), notes=tuple(notes))
    chosen = _best([kind for kind in kinds.values() if kind is not None])
    group = [node for node in having if kinds[node] == chosen] if chosen is not None else list(having)
    others = [node for node in members if node not in group]
    constraint = None
    if chosen is not None and chosen.name is not None and len(group) < len(having):
        constraint = _distinct(group, others)
        if constraint is None:
            notes.append("no feature tells its nodes apart")
            chosen = Kind(chosen.family, None)
    counts = Counter(_count(having[node]) for node in group)
    per_node = max(counts)
    same = tuple(node for node in group if _count(having[node]) == per_node)
    kind = None if chosen is None else chosen.name
    return PartitionGpus(per_node, types, kind, None if chosen is None else chosen.hardware, constraint, same, tuple(notes))


def request_of(gpus: Sequence[PartitionGpus], hardware: Sequence[Hardware]) -> Request:
    """Untyped where no type is known; one type for a cluster of one; the hardware's own where Slurm's types are called so."""
    types = set().union(*(one.types for one in gpus)) if gpus else set()
    if not types:
        return Request("none", "no node has a GRES gpu")
    if types == {None}:
        return Request("gres", "GRES gpu without a type")
    whole = {kind for kind in types if kind is not None and not SLICE.search(kind)}
    listed = ", ".join(sorted(whole))
    if len(whole) == 1 and None not in types:
        return Request("gres", f"GRES gpu of one type, {listed}", type=next(iter(whole)))
    ours = {one.gpu.gres_type for one in hardware if one.gpu is not None}
    if whole and None not in types and whole <= ours:
        return Request("gres", f"GRES gpu of the types {listed}", typed=True)
    mixed = any(len(one.types) > 1 for one in gpus) or not whole
    return Request("gres", f"GRES gpu of the types {listed}, asked for without", open=mixed)


def _gpus(node: Node, *, slices: bool) -> tuple[Gres, ...]:
    """Its whole GPUs, or the slices of GPUs that it is cut into."""
    found = [gres for gres in node.gres if gres.name == "gpu" and gres.count]
    return tuple(gres for gres in found if (gres.type is not None and SLICE.search(gres.type) is not None) == slices)


def _slices(members: Sequence[Node]) -> PartitionGpus:
    """A training gets one slice at most: they do not see each other."""
    having = {node: found for node in members if (found := _gpus(node, slices=True))}
    types = frozenset(gres.type for found in having.values() for gres in found)
    if not having:
        return PartitionGpus()
    return PartitionGpus(1, types, nodes=tuple(having), notes=(f"slices of GPUs: {', '.join(sorted(map(str, types)))}",))


def _count(gpus: Sequence[Gres]) -> int:
    return max(gres.count for gres in gpus)


def _best(kinds: Sequence[Kind]) -> Kind | None:
    """One that we have a hardware file of, else one with a name; among them the most frequent one."""
    counted = Counter(kinds)
    return max(counted, key=lambda kind: (kind.hardware is not None, kind.name is not None, counted[kind]), default=None)


def _distinct(group: Sequence[Node], others: Sequence[Node]) -> str | None:
    """A feature that all of ``group`` and none of ``others`` have."""
    common = set(group[0].features).intersection(*(node.features for node in group))
    alone = common.difference(*(node.features for node in others))
    return min(alone, key=lambda feature: (len(feature), feature), default=None)


def _notes(kinds: dict[Node, Kind | None]) -> list[str]:
    """What people should know: several kinds, or one whose memory could not be told."""
    counted = Counter(kinds.values())
    names = {kind: "unknown GPU" if kind is None else kind.name or " or ".join(kind.possible) or kind.family for kind in counted}
    notes = []
    if len(counted) > 1:
        notes.append("its nodes differ: " + ", ".join(f"{count} × {names[kind]}" for kind, count in counted.most_common()))
    notes += [
        f"{kind.family}: {names[kind]}? ftlaunch doctor --probe asks a node; then write gpu and hardware"
        for kind in counted
        if kind is not None and kind.name is None
    ]
    return notes
