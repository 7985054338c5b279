"""The Site: a cluster (or this machine) as data. ``presets/sites/<name>.yaml``. Code branches on these fields, never on names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from launcher.preset.fields import Bind, Duration, EnvName, Frozen, Name, Text, Word

Interfaces = Annotated[str, Field(pattern=r"^\^?=?[A-Za-z0-9_.@-]{1,15}(,[A-Za-z0-9_.@-]{1,15}){0,15}$")]
Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]


class SiteContainer(Frozen):
    use: Literal["apptainer", "none"] = "apptainer"
    command: Text = "apptainer"
    """Name or path: ``apptainer``, ``singularity``, ``/opt/apptainer/bin/apptainer``."""
    module: Word | None = None
    """Module that brings the command."""
    mount: Literal["auto", "file", "unpack"] = "auto"
    """How a node uses the image. file: directly (setuid Apptainer, kernel mount). unpack: to a folder on node disk first.
    auto: unpack where the mount would be a FUSE process inside the job step, which dies of the stop signal."""
    binds: list[Bind] = []
    """``source[:target[:options]]``; ``$VARIABLES`` are replaced when the site is read, as those in ``env`` are."""
    env: dict[EnvName, Text] = {}


class Partition(Frozen):
    max_time: Duration | None = None
    max_nodes: Annotated[int, Field(gt=0)] | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    gpu: Name | None = None
    """Our name of the GPU kind: ``a100-40gb``. A preset for another kind is refused where no ``hardware`` describes this one."""
    hardware: Name | None = None
    """``presets/hardware/<name>.yaml``, whose GPU its nodes have: they take the place of the preset's hardware in the plan. What the
    partition says of a node (GPUs, CPUs, memory, driver) replaces what the file says. Without it ftlaunch never chooses a GPU partition."""
    cpus_per_node: Annotated[int, Field(gt=0)] | None = None
    """CPU cores of a node; none: the share of the hardware file's that the GPUs are."""
    memory_per_node_gib: Annotated[int, Field(gt=0)] | None = None
    """RAM of a node that jobs can ask for, GiB; none: as for CPUs."""
    cpus_per_gpu: Annotated[int, Field(gt=0)] | None = None
    """As the site's, for this partition alone."""
    memory_per_gpu_gib: Annotated[int, Field(gt=0)] | None = None
    """As the site's, for this partition alone."""
    max_memory_per_cpu_mib: Annotated[int, Field(gt=0)] | None = None
    """Slurm's MaxMemPerCPU, or what the site's own rules allow: more RAM for each CPU that is asked for is refused."""
    driver: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")] | None = None
    """Version of its nodes' NVIDIA driver."""
    cuda: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    """CUDA version that the driver announces."""
    constraint: Word | None = None
    """Node features that are asked for where the user says none: those of the nodes that ``hardware`` describes."""
    qos: Name | None = None
    """Asked for where the user says none; the site's ``default_qos`` else."""
    test: bool = False
    """For short tests: a smoke run goes here, a run is never sent here by itself."""
    cost: Annotated[float, Field(ge=0)] | None = None
    """What a GPU-hour costs, in the site's ``cost_unit``."""
    preemptible: bool = False
    grace_s: Annotated[int, Field(ge=0)] | None = None
    """Seconds between the notice of a preemption and the kill."""
    preempted_every: Duration | None = None
    """Mean time between two preemptions of a job, as its users see it."""
    internet: bool | None = None
    """Whether its nodes reach the Internet; none when unknown."""


class Qos(Frozen):
    """What a quality of service changes, whatever the partition."""

    preemptible: bool = False
    grace_s: Annotated[int, Field(ge=0)] | None = None
    """As a partition's, as ``preempted_every``."""
    preempted_every: Duration | None = None


class Work(Frozen):
    """Where building or staging happens, and what a job for it asks for."""

    on: Literal["here", "slurm", "elsewhere"] = "here"
    """here: where the command is typed. slurm: a job, on which the training's job depends. elsewhere: on another machine, by hand."""
    partition: Name | None = None
    """Default: the training's."""
    cpus: Annotated[int, Field(gt=0)] = 4
    memory_gib: Annotated[int, Field(gt=0)] = 16
    """RAM, GiB."""
    time: Duration = "2h"


class Network(Frozen):
    ifname: Interfaces | None = None
    """The interface between the nodes, as NCCL_SOCKET_IFNAME has it: prefixes (``ib,eth``), ``=ib0`` exactly, ``^docker`` all others.
    gloo, which takes whole names only, is told the first that a node has. None: NCCL's own choice; gloo's is the way to the first node."""
    host_suffix: Suffix | None = None
    """What makes a node's name (``node1``) one of the fast network: ``-ib``, ``.cluster``. None: the address that Slurm has for it."""
    env: dict[EnvName, Text] = {}
    """Variables of every rank: ``NCCL_``, ``UCX_``, ``FI_`` settings, a path of libraries that ``binds`` bring."""
    binds: list[Bind] = []
    """As ``container.binds``: libraries of the fabric (Slingshot's libfabric)."""
    rendezvous_s: Annotated[int, Field(gt=0)] = 60
    """Seconds in which every node must have reached the first one. Default: nodes start within seconds of each other, a slow one within a
    minute; torch itself would wait half an hour."""


class Mirrors(Frozen):
    """Where a build takes its packages from; default: what pip and apt of the building machine are configured with. May hold passwords:
    it is left out of plans."""

    debian: Text | None = None
    pip_index: Text | None = None
    pip_extra_indexes: list[Text] = []
    pip_find_links: Text | None = None
    ca_bundle: Text | None = None


class Site(Frozen):
    name: Name
    description: Text = ""
    source: Text
    """Where the facts come from, and their date."""
    sources: dict[Text, Text] = {}
    """Dotted key → source and date of that fact and of everything below it. A key that is not set may have one: there is none, says it."""
    unknown: list[Text] = []
    """Dotted keys that nobody knows yet, or that depend on the user; ``*`` stands for every partition."""
    closed: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day since which nothing runs there any more."""
    scheduler: Literal["none", "slurm"]
    """none: this machine."""
    container: SiteContainer = SiteContainer()
    gpu_request: Literal["gres", "gpus_per_node", "gpus_per_task", "gpus", "none"] = "gres"
    """gres: ``--gres=gpu[:type]:n``. gpus_per_task: for one task a node, in which all ranks are started. gpus: of the whole job.
    none: GPUs come with the node."""
    gpu_type: Word | None = None
    """The type in the request; ``none`` here means untyped unless ``gpu_typed``."""
    gpu_typed: bool = False
    """Write the hardware's ``gres_type`` into the request."""
    memory: Literal["mem", "per_cpu", "per_gpu", "none"] = "mem"
    whole_nodes: bool = False
    """Nodes are given whole: CPUs and memory are not asked for."""
    cpus_per_gpu: Annotated[int, Field(gt=0)] | None = None
    memory_per_gpu_gib: Annotated[int, Field(gt=0)] | None = None
    partitions: dict[Word, Partition] = {}
    default_partition: Word | None = None
    """Written into the batch script when the user names none; none: the scheduler's own default."""
    partition: Literal["required", "optional"] = "optional"
    """required: jobs that name none are refused."""
    account: Literal["required", "optional"] = "optional"
    default_account: Name | None = None
    default_qos: Name | None = None
    qos: dict[Word, Qos] = {}
    """What is known of the qualities of service that a user may ask for."""
    cost_unit: Text | None = None
    """The unit of the partitions' ``cost``: ``SU``."""
    continuation: Literal["requeue", "resubmit", "manual"] = "requeue"
    """After a stop: ``scontrol requeue`` (a follow-up job where it is refused), a follow-up job at once, or nothing."""
    signal: Literal["batch", "steps"] = "batch"
    """Who gets the notice before the time limit: ``--signal=B:USR2@…`` or ``--signal=USR2@…``."""
    signal_lead_s: Annotated[int, Field(gt=0)] = 60
    """Notice before the time limit, s, beside the time of one step and twice the time of a save: the way of the signal, the end of the
    ranks, cleaning up."""
    build: Work = Work()
    stage: Work = Work()
    local_disk: list[Text] = ["$LOCAL_SCRATCH", "$SLURM_TMPDIR", "$TMPDIR", "/tmp"]
    """Folders on the node: the first one on a disk with room for the unpacked image wins; where there is none, the first in memory (tmpfs)
    that leaves the ranks what they need; where that is none either, the run's own folder. A variable at the beginning is the node's."""
    local_disk_request: Word | None = None
    """Added to the GRES request: ``nvme:200``."""
    runs: Text | None = None
    images: Text | None = None
    data: Text | None = None
    cache: Text | None = None
    """Folder in which the libraries of all runs with the same image keep what they compile and download, so that only the first one does;
    in it a folder of each user and image. Shared, or on the nodes' own disks: its variables are those of the node, and every node makes
    it. None: each run has its own in its folder."""
    modules: list[Word] = []
    """Loaded in the batch script, never purged."""
    checkpoint_write_gb_s: Annotated[float, Field(gt=0)] = 1.0
    """How fast one run writes a checkpoint to the folder of runs, GB/s, all ranks together. Default: a guess for a shared file system in
    use; measure yours, since the notice before the time limit and the advice on ``checkpoint.minutes`` come from it."""
    checkpoint_read_gb_s: Annotated[float, Field(gt=0)] = 1.0
    """How fast a life reads weights and checkpoints back, GB/s. Default: as for writing."""
    batch_template: Text | None = None
    """A jinja2 file in the place of ``templates/slurm/job.sbatch.j2``; a relative path counts from the site's file."""
    network: Network = Network()
    mirrors: Mirrors = Mirrors()
    submit_limit: Annotated[int, Field(gt=0)] | None = None
    """Jobs that a user may have in the queue. For people to read: nothing depends on it yet."""

    def preempting(self, options: Mapping[str, str]) -> Partition | Qos | None:
        """What lets others preempt a job with these options of Slurm; None where nothing does."""
        qos, partition = self.qos.get(options.get("qos", "")), self.partitions.get(options.get("partition", ""))
        return next((one for one in (qos, partition) if one is not None and one.preemptible), None)

    def source_of(self, key: str) -> str | None:
        """Who says the fact at a dotted key: its own source, else that of the nearest mapping around it."""
        while key:
            if key in self.sources:
                return self.sources[key]
            key = key.rpartition(".")[0]
        return None

    def is_unknown(self, key: str) -> bool:
        """Whether the fact at a dotted key, or a mapping around it, is said to be unknown."""
        parts = key.split(".")
        if parts[0] == "partitions" and len(parts) > 2 and ".".join(["partitions", "*", *parts[2:]]) in self.unknown:
            return True
        return any(".".join(parts[:length]) in self.unknown for length in range(1, len(parts) + 1))
