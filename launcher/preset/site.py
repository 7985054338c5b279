"""The Site: a cluster (or this machine) as data. ``presets/sites/<name>.yaml``. Code branches on these fields, never on names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.preset.fields import Bind, Duration, EnvName, Frozen, Name, Text, Word


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
    """Our name of the GPU kind. This and the rest of a partition are for people to read: nothing depends on them yet."""
    preemptible: bool = False
    grace_s: Annotated[int, Field(ge=0)] | None = None
    """Seconds between the notice of a preemption and the kill."""
    preempted_every: Duration | None = None
    """Mean time between two preemptions of a job, as its users see it."""
    internet: bool | None = None
    """Whether its nodes reach the Internet; none when unknown."""


class Work(Frozen):
    """Where building or staging happens. Only ``here`` is built: the planner refuses the others."""

    on: Literal["here", "slurm", "elsewhere"] = "here"
    partition: Name | None = None


class Network(Frozen):
    ifname: Word | None = None
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."""
    host_suffix: Word | None = None
    env: dict[EnvName, Text] = {}
    binds: list[Bind] = []
    """As ``container.binds``."""


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
    scheduler: Literal["none", "slurm"]
    """none: this machine."""
    container: SiteContainer = SiteContainer()
    gpu_request: Literal["gres", "gpus_per_node", "gpus", "none"] = "gres"
    """gres: ``--gres=gpu[:type]:n``."""
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
    account: Literal["required", "optional"] = "optional"
    default_account: Name | None = None
    default_qos: Name | None = None
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
    """Folders on the node, first usable one wins."""
    local_disk_request: Word | None = None
    """Added to the GRES request: ``nvme:200``."""
    runs: Text | None = None
    images: Text | None = None
    data: Text | None = None
    cache: Text | None = None
    """No effect yet: the libraries' caches of a run lie in its folder."""
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
    """Jobs that a user may have in the queue. No effect yet."""
