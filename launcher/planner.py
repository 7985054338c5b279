"""Preset, hardware, site and stack → the Plan and what there is to say about it. Pure: no clock, environment, file or process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from launcher.errors import Finding
from launcher.files import digest
from launcher.hardware.attention import choose_attention
from launcher.hardware.cadence import signal_lead_s
from launcher.hardware.disk import predict_disk
from launcher.hardware.fits import UNOBSERVED, Observed
from launcher.hardware.gates import check_plan
from launcher.hardware.lengths import lengths_of
from launcher.hardware.memory import largest_micro_batch, predict_memory
from launcher.hardware.time import missing_fact, predict_step, predict_time
from launcher.plan import Batch, Container, Disk, Layout, Memory, Plan, Staged, Time, sizes
from launcher.preset.choose import SLURM_KEYS
from launcher.preset.fields import duration_min
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import OwnImage, Preset
from launcher.preset.site import Partition, Qos, Site
from launcher.preset.stack import Stack

T = TypeVar("T", Memory, Time)

DEFAULT_TIME_MIN = 24 * 60
"""Walltime of one life when neither the user nor the partition says one. A run that needs longer continues in the next life."""

MAX_THREADS = 8
"""More threads seldom make a rank's CPU work faster."""

NOT_IN_IDENTITY = frozenset(
    {
        "name", "description", "site", "hardware", "nodes", "gpus", "ranks_per_node", "cpus_per_node", "memory_per_node_gib",
        "threads_per_rank", "slurm", "limits", "checkpoint", "tracking", "training.micro_batch", "evaluation.micro_batch",
    }
)  # fmt: skip
"""Keys of the preset that do not determine the weights: they may change between the lives of a run."""

EXCHANGEABLE = {"single": "ddp", "fsdp": "ddp"}
"""Parallelism → the one whose runs it may continue, and which may continue its: the same weights but for rounding."""

NOT_IN_PLAN = {"mirrors", "sources", "unknown", "closed", "cost_unit"}
"""Of a site: of no use to a run, and a pip index may hold a password."""


def make_plan(
    preset: Preset,
    hardware: Hardware,
    site: Site,
    stack: Stack | None,
    *,
    container: Container,
    slurm: Mapping[str, str] | None = None,
    staged: Staged | None = None,
    model_facts: ModelFacts | None = None,
    allowed: Collection[str] = (),
    observed: Observed = UNOBSERVED,
) -> tuple[Plan, list[Finding]]:
    """The plan, and findings: those of level error forbid to go on (``launcher.hardware.gates.GATES`` says which exit code).

    ``stack``: None for an image that the user brings and nobody has looked into. ``slurm``: the options that
    ``choose_slurm`` resolved; default: the preset's own. ``allowed``: gates that the user overrides: memory, driver, time.
    """
    if hardware.driver is None and observed.driver is not None:
        hardware = hardware.model_copy(update={"driver": observed.driver})
    options = _options(preset, site, slurm)
    partition = site.partitions.get(options.get("partition", ""))
    layout, attention = _layout(preset, hardware, site, partition), choose_attention(preset, hardware, stack, model_facts).kind
    ram_disk_gib = _ram_disk_gib(container, site, observed)
    batch = _batch(preset, model_facts, hardware, layout, attention, stack, ram_disk_gib)
    memory = None
    if model_facts is not None:
        memory = predict_memory(preset, model_facts, hardware, layout, batch, attention, stack, ram_disk_gib=ram_disk_gib)
    disk = None if model_facts is None else predict_disk(preset, model_facts)
    limit_min = _time_limit_min(site, options, partition)
    time, lead_s = None, _signal_lead_s(site, limit_min, disk, 0.0)
    if model_facts is not None and missing_fact(preset, hardware) is None:
        lengths = lengths_of(staged)
        step_s = predict_step(preset, model_facts, hardware, layout, batch, attention, lengths, stack=stack)
        lead_s = _signal_lead_s(site, limit_min, disk, step_s)
        samples, eval_samples = num_samples(preset, staged)
        time = predict_time(
            preset, model_facts, hardware, site, layout, batch, attention,
            num_samples=samples,
            eval_samples=eval_samples or 0,
            lengths=lengths,
            stack=stack,
            checkpoint_gib=0.0 if disk is None else disk.checkpoint_gib,
            time_limit_min=limit_min,
            signal_lead_s=lead_s,
            preempted_every_min=_preempted_every_min(preset, site.preempting(options)),
        )  # fmt: skip
    plan = Plan(
        identity=identity(preset, stack, container, staged, observed.fingerprints),
        preset=preset.model_dump(mode="json"),
        hardware=hardware.model_dump(mode="json"),
        site=site.model_dump(mode="json", exclude=NOT_IN_PLAN),
        stack={} if stack is None else stack.model_dump(mode="json"),
        layout=layout,
        batch=batch,
        attention=attention,
        container=container,
        time_limit_min=limit_min,
        signal_lead_s=lead_s,
        slurm={key: value for key, value in options.items() if key != "time"},
        staged=staged,
        memory=None if memory is None else _rounded(memory),
        time=None if time is None else _rounded(time),
        disk=disk,
        allowed=tuple(sorted(allowed)),
    )
    return plan, check_plan(plan, preset, hardware, site, stack, model_facts, observed)


def summary(plan: Plan) -> dict[str, object]:
    """What ``check --json`` prints under ``plan``."""
    preset, training = plan.preset, plan.preset["training"]
    model, stack, adapter = preset["model"], preset["stack"], preset["adapter"]
    config = model["config"] or {}
    return {
        "name": plan.name,
        "model": model["name"] or model["path"] or f"{config.get('model_type')} (random)",
        "site": plan.site["name"],
        "stack": stack if isinstance(stack, str) else stack["image"],
        "nodes": plan.layout.nodes,
        "gpus_per_node": plan.layout.gpus_per_node,
        "world_size": plan.world_size,
        "effective_batch": plan.batch.effective_batch,
        "micro_batch": plan.batch.micro_batch,
        "gradient_accumulation": plan.batch.micro_steps,
        "samples_per_rank": list(plan.batch.samples_per_rank),
        "samples_per_micro_step": [list(steps) for steps in plan.batch.samples_per_micro_step],
        "sequence_length": training["sequence_length"],
        "attention": plan.attention,
        "adapter": adapter if isinstance(adapter, str) else adapter["kind"],
        "parallelism": preset["parallelism"],
        "dtype": training["dtype"],
        "time_limit_min": plan.time_limit_min,
        "signal_lead_s": plan.signal_lead_s,
        "memory": None if plan.memory is None else dict(vars(plan.memory)),
        "time": None if plan.time is None else dict(vars(plan.time)),
        "disk": None if plan.disk is None else dict(vars(plan.disk)),
    }


def identity(
    preset: Preset, stack: Stack | None, container: Container, staged: Staged | None, fingerprints: Mapping[str, str] | None = None
) -> str:
    """The hash of what determines the weights, 64 hex digits.

    Of a local model, of local data and of an image that the user brings the content counts once it is known, not the path. Where a job
    stages, nobody has read the content when the run is named: ``fingerprints`` of ``data`` and ``model`` take its place, also later.
    """
    content: dict[str, Any] = {"preset": _determining(preset.model_dump(mode="json"))}
    if stack is not None:
        content["stack"] = _of_stack(stack.model_dump(mode="json"))
    elif isinstance(preset.stack, OwnImage):
        content["stack"] = {"image": container.identity or preset.stack.image}
        del content["preset"]["stack"]
    if fingerprints is not None:
        for name, value in fingerprints.items():
            content[f"{name}_fingerprint"] = value
            content["preset"][name] = _without_paths(content["preset"][name])
        staged = None
    if staged is not None and (preset.data.path is not None or preset.data.sources is not None):
        content["data_sha"] = staged.data_sha
        content["preset"]["data"] = _without_paths(content["preset"]["data"])
    if staged is not None and staged.model_sha:
        content["model_sha"] = staged.model_sha
        content["preset"]["model"]["path"] = None
    return digest(content)


def identity_keys_changed(old: Plan, new: Plan) -> list[str]:
    """Dotted keys of the preset that differ and belong to the identity; ``stack`` when the pins behind its name or an image of the user
    differ, ``data`` and ``model`` when the content behind a local path does. Empty: ``new`` may continue the run of ``old``.
    """
    before, after = _flat(_determining(old.preset)), _flat(_determining(new.preset))
    local_data = new.preset["data"]["path"] is not None or new.preset["data"].get("sources") is not None
    if old.staged is not None and new.staged is not None and local_data:
        for keys, plan in ((before, old), (after, new)):
            keys.update(_flat(_without_paths(plan.preset["data"]), "data."))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if _of_stack(old.stack) != _of_stack(new.stack) and "stack" not in changed:
        changed.append("stack")
    if old.container.identity and new.container.identity and _own_image(old) and _own_image(new):
        changed = [key for key in changed if key != "stack.image"]
        if old.container.identity != new.container.identity:
            changed.append("stack")
    if old.staged is not None and new.staged is not None and local_data and old.staged.data_sha != new.staged.data_sha:
        changed.append("data")
    if old.staged is not None and new.staged is not None and old.staged.model_sha and new.staged.model_sha:
        changed = [key for key in changed if key != "model.path"]
        if old.staged.model_sha != new.staged.model_sha:
            changed.append("model")
    return changed


def _without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` or ``model`` of a preset without where things lie, also in its sources."""
    kept = {**section, "path": None}
    if section.get("sources") is not None:
        kept["sources"] = [{**source, "path": None} for source in section["sources"]]
    return kept


def _own_image(plan: Plan) -> bool:
    return isinstance(plan.preset["stack"], Mapping)


def _options(preset: Preset, site: Site, slurm: Mapping[str, str] | None) -> dict[str, str]:
    if site.scheduler == "none":
        return {}
    typed = {key: value for key in SLURM_KEYS if (value := getattr(preset.slurm, key)) is not None}
    return typed if slurm is None else dict(slurm)


def _layout(preset: Preset, hardware: Hardware, site: Site, partition: Partition | None) -> Layout:
    """CPUs and memory are the share of the node that the GPUs stand for, or the whole node where no GPU is asked for."""
    default = 1 if preset.parallelism == "device_map" else max(preset.gpus, 1)
    ranks = preset.ranks_per_node or default
    share = min(preset.gpus / hardware.gpus, 1.0) if preset.gpus and hardware.gpus and not site.whole_nodes else 1.0
    cpus, memory_gib = max(1, int(hardware.cpus * share)), max(1, int(hardware.memory_gib * share))
    own = Partition() if partition is None else partition
    gpus = min(preset.gpus, hardware.gpus)  # more than there are is refused for that alone
    if gpus and (cpus_per_gpu := own.cpus_per_gpu or site.cpus_per_gpu):
        cpus = cpus_per_gpu * gpus
    if gpus and (memory_per_gpu_gib := own.memory_per_gpu_gib or site.memory_per_gpu_gib):
        memory_gib = memory_per_gpu_gib * gpus
    cpus = preset.cpus_per_node or cpus
    return Layout(
        nodes=preset.nodes,
        gpus_per_node=preset.gpus,
        ranks_per_node=ranks,
        cpus_per_node=cpus,
        memory_per_node_gib=preset.memory_per_node_gib or memory_gib,
        threads_per_rank=preset.threads_per_rank or min(MAX_THREADS, max(1, cpus // ranks)),
    )


def num_samples(preset: Preset, staged: Staged | None) -> tuple[int | None, int | None]:
    """Samples of one epoch, and of one evaluation; None where only staging can tell."""
    if staged is not None:
        return staged.train_samples, staged.eval_samples
    documents = preset.data.num_samples
    if documents is None or preset.data.packing in ("concatenate", "documents") or preset.data.long_documents == "split":
        return None, 0 if preset.evaluation.every == "never" else None
    held_out = round(documents * preset.data.eval_share)
    return documents - held_out, held_out or (0 if preset.evaluation.every == "never" else None)


def _ram_disk_gib(container: Container, site: Site, observed: Observed) -> float:
    """What the unpacked image takes of a node's memory, where earlier lives met nodes whose disk is memory."""
    unpacked = container.use == "apptainer" and site.container.mount != "file"
    return round(observed.ram_disk_gib, 1) if unpacked else 0.0


def _batch(
    preset: Preset,
    facts: ModelFacts | None,
    hardware: Hardware,
    layout: Layout,
    attention: str,
    stack: Stack | None,
    ram_disk_gib: float = 0.0,
) -> Batch:
    """Any effective batch on any number of ranks: shares as even as possible, in as many micro steps as the largest needs.

    ``micro_batch: auto`` is the largest that fits; 1 where none does, or where the memory is not predicted (gates say so).
    """
    effective, wanted = preset.training.effective_batch, preset.training.micro_batch
    shares = tuple(sizes(effective, layout.world_size))
    if wanted == "auto":
        wanted = 1
        if facts is not None:
            found = largest_micro_batch(preset, facts, hardware, layout, shares, attention, stack, ram_disk_gib=ram_disk_gib)
            wanted = found or 1
    micro_steps = -(-max(shares) // min(wanted, max(shares)))
    return Batch(effective, shares, -(-max(shares) // micro_steps), micro_steps)


def _rounded(prediction: T) -> T:
    """Six significant digits: predictions are good for two, and a file that holds them should not change with the last bit."""

    def rounded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: rounded(entry) for name, entry in value.items()}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return replace(prediction, **{name: rounded(value) for name, value in vars(prediction).items()})


def _time_limit_min(site: Site, options: Mapping[str, str], partition: Partition | None) -> int | None:
    """Minutes that the scheduler is asked for: typed, else the partition's limit, else ``DEFAULT_TIME_MIN``."""
    if site.scheduler == "none":
        return None
    if "time" in options:
        return int(duration_min(options["time"]))
    if partition is not None and partition.max_time is not None:
        return int(duration_min(partition.max_time))
    return DEFAULT_TIME_MIN


def _signal_lead_s(site: Site, limit_min: int | None, disk: Disk | None, step_s: float) -> int:
    """At most half of the time limit."""
    lead_s = signal_lead_s(0.0 if disk is None else disk.checkpoint_gib, site.checkpoint_write_gb_s, step_s, site.signal_lead_s)
    return lead_s if limit_min is None else min(lead_s, limit_min * 30)


def _preempted_every_min(preset: Preset, preempting: Partition | Qos | None) -> float | None:
    said = preset.checkpoint.preempted_every or (preempting.preempted_every if preempting is not None else None)
    return None if said is None else float(duration_min(said))


def _determining(preset: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The preset without ``NOT_IN_IDENTITY``."""
    kept: dict[str, Any] = {}
    for name, value in preset.items():
        key = f"{prefix}{name}"
        if key not in NOT_IN_IDENTITY:
            kept[name] = _determining(value, f"{key}.") if isinstance(value, Mapping) else value
    if not prefix and "parallelism" in kept:
        kept["parallelism"] = EXCHANGEABLE.get(kept["parallelism"], kept["parallelism"])
    return kept


def _of_stack(stack: Mapping[str, Any]) -> dict[str, Any]:
    """The stack without its words."""
    return {name: value for name, value in stack.items() if name not in ("description", "notes")}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found.update(_flat(item, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = item
    return found
