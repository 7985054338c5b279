"""Facts of Slurm and of the machine → what a site file says, each with its source. Pure: no clock, no programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.preset.fields import duration_text
from launcher.preset.hardware import Hardware
from launcher.site.ask import Cluster
from launcher.site.gpus import PartitionGpus, Request, gpus_of, request_of
from launcher.site.machine_facts import Machine
from launcher.site.rights import Rights, rights_of
from launcher.site.slurm_facts import NOTHING, PartitionFacts, mode

CONFIG, PARTITION, NODE = "scontrol show config", "scontrol show partition", "scontrol show node"
ASSOCIATION, QOS = "sacctmgr show assoc", "sacctmgr show qos"

TEST_MAX_MIN = 240
"""A partition whose name says test and that gives no more than this is one for tests."""

_TEST_NAME = re.compile(r"debug|test|devel|interactive|(^|[-_.])dev($|[-_.])", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9@%+=:,./|&*\[\]_-]{0,254}")

MAX_DAYS_MIN = 366 * 1440
"""A longer limit is none."""

_DISK_GRES = re.compile(r"nvme|ssd|disk|tmp|scratch|local", re.IGNORECASE)


@dataclass
class Draft:
    """A site file in the making."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Dotted key → comments for people, above it; the empty key: above everything."""

    def say(self, key: str | tuple[str, ...], value: Any, source: str) -> None:
        names = (key,) if isinstance(key, str) else key
        place = self.values
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
        self.sources[".".join(names)] = source

    def doubt(self, *keys: str) -> None:
        """Nobody knows yet."""
        self.unknown += [key for key in keys if key not in self.unknown]

    def note(self, key: str, text: str) -> None:
        self.notes.setdefault(key, []).append(text)


def conclude(cluster: Cluster, machine: Machine, hardware: Sequence[Hardware], *, name: str | None, today: str) -> Draft:
    """``hardware``: the files that a partition may name. ``today``: ISO date."""
    draft = Draft()
    called = cluster.config.get("ClusterName", "(null)")
    called = machine.host if called in NOTHING else called
    draft.values["name"] = name or re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "-", called).strip("-")[:64] or "mycluster"
    version = cluster.config.get("SLURM_VERSION")
    draft.values["description"] = f"Slurm {version or 'of an unknown version'}, as {machine.host} showed it to {machine.user}"
    draft.values["source"] = f"ftlaunch site discover on {machine.host}, {today}"
    draft.values["scheduler"] = "slurm"
    for command, reason in cluster.failed.items():
        draft.note("", f"{command} failed: {reason}")
    rights = rights_of(cluster, machine.groups)
    _folders(draft, machine)
    _container(draft, machine)
    gpus = {one.name: gpus_of(one, cluster, hardware) for one in rights.partitions}
    _requests(draft, cluster, rights, request_of(list(gpus.values()), hardware))
    _account(draft, cluster, rights)
    _partitions(draft, cluster, rights, gpus)
    _qualities(draft, cluster, rights)
    _continuation(draft, cluster)
    _local_disk(draft, cluster)
    _maintenance(draft, cluster)
    draft.sources = {key: f"{source}, {today}" for key, source in draft.sources.items()}
    return draft


def _folders(draft: Draft, machine: Machine) -> None:
    """Runs, images and data in the first room; the others are named for people."""
    for room in machine.small_rooms:
        draft.note("runs", f"{room.written} ({room.filesystem}) has {_gib(room.free_bytes)} free only: not taken")
    if not machine.rooms:
        draft.doubt("runs", "images", "data")
        draft.note("runs", "No shared file system outside home was found. Fill these in, on one that all nodes see:")
        for name in ("runs", "images", "data"):
            draft.note("runs", f"{name}: /FOLDER/ON/THE/SHARED/FILE/SYSTEM/{name}")
        return
    first, *others = machine.rooms
    for name in ("runs", "images", "data"):
        draft.say(name, f"{first.written}/ftlaunch/{name}", f"writable here, {first.filesystem}, {_gib(first.free_bytes)} free")
    if not first.shared:
        draft.note("runs", f"{first.written} lies on {first.filesystem}: ftlaunch doctor --probe says whether nodes see it")
    for room in others:
        draft.note("runs", f"also writable: {room.written} ({room.filesystem}, {_gib(room.free_bytes)} free)")


def _container(draft: Draft, machine: Machine) -> None:
    found = machine.apptainer
    if found.path is None and found.module is None:
        draft.doubt("container")
        draft.note("container", "Neither apptainer nor singularity is on PATH here, and no module has its name. Nodes may have it.")
        draft.say(("build", "on"), "slurm", "no Apptainer on this machine")
    else:
        where = f"module load {found.module}" if found.module else "command -v"
        draft.say(("container", "command"), found.command, f"{where}: {found.path or 'not on this machine'} {found.version or ''}".strip())
        if found.module:
            draft.say(("container", "module"), found.module, "module avail")
    if found.setuid is not None:
        way = "setuid: images are mounted by the kernel" if found.setuid else "no setuid: images are mounted by FUSE, so unpacked per node"
        draft.note("container", f"{found.command} {found.version or ''} on {machine.host}: {way}")
    if found.path is not None:
        facts = {"user namespaces": found.user_namespaces, "subuid and subgid": found.subordinate_ids, "/dev/fuse": found.fuse}
        draft.note("container", ", ".join(f"{name} {_word(value)}" for name, value in facts.items()) + ", here; nodes may differ")
    if found.path is None and found.module is not None:
        draft.say(("build", "on"), "slurm", "Apptainer's module does not bring it on this machine")
    draft.doubt("build.on")
    draft.note("build", "Whether building is allowed here is a rule of the site that no program tells.")
    if machine.has_modules:
        draft.note("container", "modules: there is a module command here")


def _requests(draft: Draft, cluster: Cluster, rights: Rights, request: Request) -> None:
    """How GPUs, memory and nodes are asked for."""
    if cluster.nodes or request.form != "none":
        draft.say("gpu_request", request.form, f"{NODE}: {request.why}")
        if request.type is not None:
            draft.say("gpu_type", request.type, f"{NODE}: {request.why}")
        if request.typed:
            draft.say("gpu_typed", True, f"{NODE}: {request.why}")
        if request.open:
            draft.doubt("gpu_type")
    else:
        draft.doubt("gpu_request")
    if "SelectType" in cluster.config:
        selects = cluster.config.get("SelectTypeParameters", "")
        draft.say("memory", "mem" if "MEMORY" in selects.upper() else "none", f"{CONFIG}: SelectTypeParameters={selects}")
    else:
        draft.doubt("memory")
    whole = [one.name for one in rights.partitions if one.exclusive]
    if "linear" in cluster.config.get("SelectType", ""):
        draft.say("whole_nodes", True, f"{CONFIG}: SelectType={cluster.config['SelectType']}")
    elif whole and len(whole) == len(rights.partitions):
        draft.say("whole_nodes", True, f"{PARTITION}: OverSubscribe=EXCLUSIVE")
    elif whole:
        draft.note("whole_nodes", f"only some partitions give whole nodes: {', '.join(whole)}")
        draft.doubt("whole_nodes")
    for name in ("JobSubmitPlugins", "CliFilterPlugins"):
        value = cluster.config.get(name, "(null)")
        if value not in ("(null)", ""):
            draft.note("gpu_request", f"{name}={value}: the site's own rules may refuse what Slurm's configuration allows")
            draft.doubt("gpu_request")


def _account(draft: Draft, cluster: Cluster, rights: Rights) -> None:
    if not cluster.config:
        draft.doubt("account")
        return
    draft.say("account", "required" if rights.account_required else "optional", rights.account_why)
    if rights.account is not None:
        draft.say("default_account", rights.account, rights.account_why)
    elif len(rights.accounts) > 1:
        listed = f"yours: {', '.join(sorted(rights.accounts))}"
        draft.note("account", f"{listed}; without --account Slurm takes {cluster.default_account or 'none'}")
        draft.doubt("default_account")
    if rights.unknown_user:
        draft.note("account", "Accounting knows no account of yours: ask your centre for one before you submit.")
    if "wckeys" in cluster.enforced:
        draft.note("account", "jobs need a WCKey here, which ftlaunch does not write: set SBATCH_WCKEY")
    if rights.submit_limit is not None:
        draft.say("submit_limit", rights.submit_limit, f"{ASSOCIATION} and {QOS}: MaxSubmit")


def _partitions(draft: Draft, cluster: Cluster, rights: Rights, gpus: Mapping[str, PartitionGpus]) -> None:
    for name, reason in rights.left_out.items():
        draft.note("partitions", f"not listed: {name}: {reason}")
    for partition in rights.partitions:
        if not _WORD.fullmatch(partition.name):
            draft.note("partitions", f"not listed: {partition.name!r}: a name that ftlaunch cannot write into a batch script")
            continue
        found = gpus[partition.name]
        draft.values.setdefault("partitions", {})[partition.name] = dict(_entry(draft, partition, cluster, rights, found))
    if "partitions" in draft.values:
        draft.sources["partitions"] = f"{PARTITION}; nodes: {NODE}"
        draft.doubt("partitions.*.internet", *(["partitions.*.driver"] if any(one.per_node for one in gpus.values()) else []))
        usable = list(draft.values["partitions"])
        default = next((one.name for one in rights.partitions if one.default and one.name in usable), None)
        if default is not None:
            draft.note("partitions", f"Slurm's default: {default}")
        elif len(usable) == 1:
            draft.say("default_partition", usable[0], f"{PARTITION}: the only one, and not Slurm's default")
    else:
        draft.doubt("partitions")


def _entry(draft: Draft, partition: PartitionFacts, cluster: Cluster, rights: Rights, gpus: PartitionGpus) -> Iterator[tuple[str, Any]]:
    """The keys of one partition, in the order of the schema."""
    key = f"partitions.{partition.name}"
    limits = [limit for limit in (partition.max_time_min, rights.max_wall(partition)) if limit is not None and limit <= MAX_DAYS_MIN]
    if limits:
        yield "max_time", duration_text(min(limits))
    alike = len(gpus.nodes) if gpus.constraint is not None else None
    counts = [count for count in (partition.max_nodes, partition.num_nodes, alike) if count]
    if counts:
        yield "max_nodes", min(counts)
    if gpus.per_node is not None:
        yield "gpus_per_node", gpus.per_node
    elif re.search("gpu", partition.name, re.IGNORECASE):
        draft.doubt(f"{key}.gpus_per_node", f"{key}.hardware")
        draft.note(key, "Slurm shows no GPUs of its nodes, as its name has them: write gpus_per_node and hardware")
    elif cluster.nodes:
        yield "gpus_per_node", 0
    if gpus.kind is not None:
        yield "gpu", gpus.kind
    if gpus.hardware is not None:
        yield "hardware", gpus.hardware
    elif gpus.per_node:
        draft.doubt(f"{key}.hardware")
    for note in gpus.notes:
        draft.note(key, note)
    members = gpus.nodes or tuple(node for node in cluster.nodes if partition.name in node.partitions)
    if members:
        cores = min(node.cores for node in members)
        memory_gib = _memory_mib(partition, cores, min(node.memory_mib for node in members)) // 1024
        if cores:
            yield "cpus_per_node", cores
        if memory_gib:
            yield "memory_per_node_gib", memory_gib
        if gpus.per_node and (partition.cpus_per_gpu or (gpus.hardware is None and cores >= gpus.per_node)):
            yield "cpus_per_gpu", partition.cpus_per_gpu or cores // gpus.per_node
        if gpus.per_node and (partition.memory_per_gpu_mib or (gpus.hardware is None and memory_gib >= gpus.per_node)):
            yield "memory_per_gpu_gib", max(1, (partition.memory_per_gpu_mib or memory_gib * 1024 // gpus.per_node) // 1024)
        disks = [node.tmp_disk_mib for node in members if node.tmp_disk_mib]
        if disks:
            draft.note(key, f"TmpDisk of a node: {mode(disks) // 1024} GiB")
    if gpus.constraint is not None:
        yield "constraint", gpus.constraint
    qos = rights.qos_for(partition)
    if qos.ask is not None:
        yield "qos", qos.ask
    if qos.open:
        draft.doubt(f"{key}.qos")
        draft.note(key, f"a QoS must be named: {', '.join(qos.open)}")
    if _TEST_NAME.search(partition.name) and partition.max_time_min is not None and partition.max_time_min <= TEST_MAX_MIN:
        yield "test", True
    if preemptible(partition, cluster):
        yield "preemptible", True
        yield "grace_s", partition.grace_s
        draft.note(key, f"preempted jobs: PreemptMode={partition.preempt_mode}")
    own = rights.known_qualities.get(partition.qos or "")
    if own is not None and own.max_submit is not None:
        draft.note(key, f"at most {own.max_submit} jobs of yours in its queue")
    if partition.default_time_min is not None and partition.max_time_min != partition.default_time_min:
        draft.note(key, f"without --time a job gets {duration_text(partition.default_time_min)}")


def _memory_mib(partition: PartitionFacts, cores: int, node_mib: int) -> int:
    """What one job may ask of a node."""
    limits = [partition.max_memory_per_node_mib, partition.max_memory_per_cpu_mib and partition.max_memory_per_cpu_mib * cores]
    return min([node_mib, *(limit for limit in limits if limit)])


def _qualities(draft: Draft, cluster: Cluster, rights: Rights) -> None:
    """QoS of this user that others preempt."""
    if "qos" not in cluster.config.get("PreemptType", "") or cluster.config.get("PreemptMode", "OFF").upper().startswith("OFF"):
        return
    for one in cluster.qualities:
        above = [other.name for other in cluster.qualities if one.name in other.preempts]
        if above and one.name in rights.qualities and one.preempt_mode != "off" and _WORD.fullmatch(one.name):
            mode_of = one.preempt_mode if one.preempt_mode not in ("", "cluster") else cluster.config["PreemptMode"].lower()
            draft.say(("qos", one.name), {"preemptible": True, "grace_s": one.grace_s}, f"{QOS}: preempted by {', '.join(above)}")
            draft.note("qos", f"{one.name}: a preempted job is handled by {mode_of}")


def _continuation(draft: Draft, cluster: Cluster) -> None:
    requeue = cluster.config.get("JobRequeue")
    if requeue not in ("0", "1"):
        draft.doubt("continuation")
        return
    draft.say("continuation", "requeue" if requeue == "1" else "resubmit", f"{CONFIG}: JobRequeue={requeue}")
    said = cluster.config.get("SlurmctldParameters", "") + cluster.config.get("PreemptParameters", "")
    if not cluster.config.get("PreemptType", "preempt/none").endswith("none"):
        first = "the batch step hears of a preemption first" if "send_user_signal" in said else "the ranks hear of a preemption first"
        draft.note("continuation", f"preemption: {cluster.config.get('PreemptMode', '?')}; {first}")


def _local_disk(draft: Draft, cluster: Cluster) -> None:
    place = cluster.config.get("TmpFS", "/tmp")
    folders = ["$LOCAL_SCRATCH", "$SLURM_TMPDIR", "$TMPDIR", *([place] if place.startswith("/") and place != "/tmp" else []), "/tmp"]
    if len(folders) > 4:
        draft.say("local_disk", folders, f"{CONFIG}: TmpFS={place}, and the usual variables")
    else:
        draft.doubt("local_disk")
    if "tmpfs" in cluster.config.get("JobContainerType", ""):
        draft.note("local_disk", "a job has a /tmp of its own, removed at its end (job_container/tmpfs)")
    disks = {gres.name: gres.count for node in cluster.nodes for gres in node.gres if _DISK_GRES.search(gres.name)}
    for name, count in sorted(disks.items()):
        draft.note("local_disk", f"nodes have GRES {name}:{count}: disk may have to be asked for, as in local_disk_request: {name}:1")
        draft.doubt("local_disk_request")


def _maintenance(draft: Draft, cluster: Cluster) -> None:
    for one in cluster.reservations:
        if "MAINT" in one.flags:
            draft.note("", f"maintenance {one.name}: {one.start} to {one.end} on {one.nodes[:60]}")


def preemptible(partition: PartitionFacts, cluster: Cluster) -> bool:
    """Whether jobs of a higher partition push those of this one away."""
    config = cluster.config
    if "partition_prio" not in config.get("PreemptType", "") or config.get("PreemptMode", "OFF").upper() == "OFF":
        return False
    if partition.preempt_mode in ("", "OFF"):
        return False
    own = {node.name for node in cluster.nodes if partition.name in node.partitions}
    above = [other for other in cluster.partitions if other.tier > partition.tier]
    return any(not cluster.nodes or own & {node.name for node in cluster.nodes if other.name in node.partitions} for other in above)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.0f} GiB".replace(",", " ")


def _word(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]
