"""Which partition of a site suits a preset, and the node that a partition gives: the site's own hardware is what counts.

Not what Slurm's options are in the end: that is ``launcher.preset.choose``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from launcher.errors import Finding
from launcher.preset.hardware import Gpu, Hardware
from launcher.preset.schema import Preset
from launcher.preset.site import Partition, Site

AS_LARGE = 0.99
"""Share of the wanted GPU's memory from which another GPU counts as as large: drivers report it a little differently."""


def nodes_of(site: Site, read: Callable[[str], Hardware]) -> dict[str, Hardware]:
    """Partition → its node, for those whose hardware is named. ``read`` gives the file of a name."""
    files: dict[str, Hardware] = {}
    nodes = {}
    for name, partition in site.partitions.items():
        if partition.hardware is not None:
            if partition.hardware not in files:
                files[partition.hardware] = read(partition.hardware)
            nodes[name] = _node(site, name, partition, files[partition.hardware])
    return nodes


def suiting(preset: Preset, wanted: Hardware, site: Site, nodes: Mapping[str, Hardware]) -> list[str]:
    """The partitions that suit best; several where nothing tells them apart, none where the site describes none that could.

    Those of the wanted GPU, else of the smallest that is as large, else of the largest; among them the smallest nodes that hold the run,
    else those with the most GPUs. Without GPUs the first that has none. Never one for tests.
    """
    if preset.gpus == 0:
        return [name for name, entry in site.partitions.items() if entry.gpus_per_node == 0 and not entry.test][:1]
    found = [name for name in nodes if not site.partitions[name].test]
    if wanted.gpu is not None and found:
        found = _of_kind(found, wanted.gpu, nodes)
    held = [name for name in found if _holds(preset, site.partitions[name], nodes[name])]
    number = min(nodes[name].gpus for name in held) if held else max((nodes[name].gpus for name in found), default=0)
    return [name for name in held or found if nodes[name].gpus == number]


def node_for(preset: Preset, wanted: Hardware, site: Site, partition: str | None, nodes: Mapping[str, Hardware]) -> Hardware:
    """The node to plan for: the partition's where it is described, else the preset's own."""
    return wanted if preset.gpus == 0 or partition is None else nodes.get(partition, wanted)


def partition_findings(
    preset: Preset, wanted: Hardware, site: Site, partition: str | None, suits: Sequence[str], nodes: Mapping[str, Hardware]
) -> list[Finding]:
    """What there is to say about the choice: none made among several, another GPU than the preset's, a GPU that nothing describes."""
    if site.scheduler == "none":
        return []
    if partition is None:
        if len(suits) < 2 and site.partition == "optional":
            return []
        listed = ", ".join(f"{name} ({_gpus_text(nodes[name])})" for name in suits)
        message = f"site {site.name} has several partitions for this: {listed}"
        if not suits:
            message = f"site {site.name} wants a partition, and none is described here that has {'such GPUs' if preset.gpus else 'no GPU'}"
        return [Finding("error", "partition-missing", message, key="slurm.partition", hint="--partition, or slurm.partition")]
    entry, wanted_kind = site.partitions.get(partition), wanted.gpu.kind if wanted.gpu is not None else "none"
    if entry is None or preset.gpus == 0:
        return []
    if partition in nodes:
        gpu = nodes[partition].gpu
        if gpu is None or gpu.kind == wanted_kind:
            return []
        message = f"planned for {gpu.kind}, which partition {partition} of site {site.name} has, not for {wanted_kind}"
        return [Finding("advice", "hardware-of-site", message, key="hardware")]
    if entry.gpu is not None and entry.gpu != wanted_kind:
        message = f"partition {partition} of site {site.name} has {entry.gpu}, the preset is planned for {wanted_kind}"
        hint = f"a hardware file of yours with kind: {entry.gpu}, named by hardware in the preset or in the site's partition"
        return [Finding("error", "gpu-not-in-partition", message, key="hardware", hint=hint)]
    return []


def _node(site: Site, name: str, partition: Partition, file: Hardware) -> Hardware:
    """The file's node with what the partition says of it; CPUs and memory of a node with fewer GPUs are that share of the file's."""
    gpus = file.gpus if partition.gpus_per_node is None else partition.gpus_per_node
    share = gpus / file.gpus if file.gpus else 1.0
    return file.model_copy(
        update={
            "name": f"{site.name}-{name}"[:64],
            "gpus": gpus,
            "cpus": partition.cpus_per_node or max(1, int(file.cpus * share)),
            "memory_gib": partition.memory_per_node_gib or max(1, int(file.memory_gib * share)),
            "driver": partition.driver or file.driver,
            "cuda": partition.cuda or file.cuda,
        }
    )


def _of_kind(names: Sequence[str], wanted: Gpu, nodes: Mapping[str, Hardware]) -> list[str]:
    kinds = {name: gpu for name in names if (gpu := nodes[name].gpu) is not None}
    same = [name for name, gpu in kinds.items() if gpu.kind == wanted.kind]
    if same or not kinds:
        return same
    large = [gpu.memory_gib for gpu in kinds.values() if gpu.memory_gib >= AS_LARGE * wanted.memory_gib]
    memory_gib = min(large) if large else max(gpu.memory_gib for gpu in kinds.values())
    return [name for name, gpu in kinds.items() if gpu.memory_gib == memory_gib]


def _holds(preset: Preset, partition: Partition, node: Hardware) -> bool:
    return preset.gpus <= node.gpus and (partition.max_nodes is None or preset.nodes <= partition.max_nodes)


def _gpus_text(node: Hardware) -> str:
    return "no GPU" if node.gpu is None else f"{node.gpus} × {node.gpu.kind}"
