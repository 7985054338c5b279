"""From a plan to the processes that train: argument lists and environments, with Slurm or without, in a container or not.

Pure and standard library only (Python 3.9). Nothing is started here; ``launcher.processes`` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.caches import MAKE_CACHE, NARROWER, cache_environment
from launcher.image.enter import bind
from launcher.image.rank import rank_command as enter_on_node
from launcher.plan import Plan
from launcher.run import Run

TRAINING_MODULE = "launcher.train"

RANK_STUB = 'trap "" TERM USR2; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
"""Every task of the step starts as this shell: it gives Slurm's numbers their torch names, and ignores a stop until Python has handlers."""

SCRUBBED_PREFIXES = ("SLURM_", "SBATCH_", "PMI", "SUBMITIT_", "PYTHON", "APPTAINERENV_", "SINGULARITYENV_", "TORCHELASTIC_", "ACCELERATE_")
SCRUBBED_NAMES = NARROWER | {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("LD_PRELOAD", "LD_AUDIT", "FTLAUNCH_SUBMITIT", "FTLAUNCH_CACHE"),
}
"""What a rank outside a container must not inherit from whoever submitted."""


PER_TASK = frozenset(["SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"])
"""What ``--gpus-per-task`` of the job leaves behind for ``srun``, which would ask for as many GPUs again for every rank."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of one life run: what only the node can know."""

    life: int
    master_addr: str
    master_port: int
    python: str
    """The host's interpreter: that of the supervisor."""
    job: str
    """The name under which this life's image is unpacked on a node: the job id, or the run and the supervisor's pid."""
    srun: str | None = None
    """Absolute path; None on this machine, without Slurm."""
    cache: str | None = None
    """The folder of the libraries' caches that the site names; None: the run's own."""


def shared_folder(run: Run, place: Place) -> Path:
    """Where a life unpacks its image on nodes that have no disk for it."""
    return run.life(place.life) / "nodes"


def rank_environment(run: Run, plan: Plan, place: Place) -> dict[str, str]:
    """What every rank's process must find in its environment, wherever it runs; RANK and LOCAL_RANK differ and are not among it."""
    layout = plan.layout
    threads = str(layout.threads_per_rank)
    values = {
        "PYTHONPATH": str(run.code),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "FTLAUNCH_LIFE": str(place.life),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_WORLD_SIZE": str(layout.ranks_per_node),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **cache_environment(run.cache if place.cache is None else Path(place.cache)),
    }
    if place.cache is not None:
        values["FTLAUNCH_CACHE"] = place.cache
    if layout.gpus_per_node == 0:
        values["ACCELERATE_USE_CPU"] = "true"
    interface = plan.site["network"]["ifname"] or ("lo" if place.srun is None else None)
    if interface:
        values |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return {**values, **plan.site["network"]["env"], **plan.container.env}


def rank_command(run: Run, plan: Plan, place: Place) -> list[str]:
    """The program of one rank: Python with ``launcher.train``, in the image that its node unpacked or in the host's own interpreter."""
    training = ["-m", TRAINING_MODULE, str(run.root)]
    if plan.container.use == "none":
        return [place.python, *training]
    return enter_on_node(
        place.python,
        plan.container,
        ["python3", *training],
        job=place.job,
        life=place.life,
        shared=str(shared_folder(run, place)),
        binds=binds(run, plan, place),
        env=rank_environment(run, plan, place),
        gpus=plan.layout.gpus_per_node > 0,
        cwd=str(run.code),
    )


def binds(run: Run, plan: Plan, place: Place) -> list[str]:
    """The folders that a rank in a container sees beside the image's own: run folder, caches, staged folders (read-only), the site's."""
    staged = [] if plan.staged is None else [plan.staged.model, plan.staged.data]
    written = [str(run.root), *([place.cache] if place.cache is not None else [])]
    return [*(bind(folder) for folder in written), *(bind(folder, read_only=True) for folder in staged), *plan.site["network"]["binds"]]


def local_environment(run: Run, plan: Plan, place: Place, rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of one rank on this machine. ``environ`` is the supervisor's."""
    assert plan.layout.nodes == 1, "several nodes need a scheduler"
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return {**scrubbed(environ), **rank_environment(run, plan, place), **own}


def step_environment(run: Run, plan: Plan, place: Place, environ: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of ``srun``, which all ranks inherit. Slurm's own variables stay: ``srun`` needs them."""
    slurm = {name: value for name, value in environ.items() if name.startswith("SLURM_") and name not in PER_TASK}
    return {**scrubbed(environ), **slurm, **rank_environment(run, plan, place)}


def step_command(run: Run, plan: Plan, place: Place) -> list[str]:
    """One ``srun`` for all ranks. GPUs stay bound to the node: a rank that sees one device loses peer access."""
    assert place.srun is not None
    layout = plan.layout
    bound = ["--gpu-bind=none"] if layout.gpus_per_node else []
    return [
        place.srun,
        f"--nodes={layout.nodes}",
        f"--ntasks={layout.world_size}",
        f"--ntasks-per-node={layout.ranks_per_node}",
        f"--cpus-per-task={layout.cpus_per_rank}",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--mpi=none",
        *bound,
        "--export=ALL",
        f"--chdir={run.code}",
        f"--output={run.life(place.life)}/rank-%t.log",
        "--open-mode=append",
        "sh",
        "-c",
        RANK_STUB if place.cache is None else MAKE_CACHE + RANK_STUB,
        "rank",
        *rank_command(run, plan, place),
    ]


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what another scheduler, launcher or Python environment left in it. SLURM_CONF stays: it says where Slurm is."""
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name in SCRUBBED_NAMES or name.startswith(SCRUBBED_PREFIXES))
    }


def slurm_port(job_id: str, life: int) -> int:
    """MASTER_PORT of a life: below the ports that systems hand out by themselves, and another one after a clash."""
    return 15000 + (int(job_id) * 7 + life * 1009) % 15000
