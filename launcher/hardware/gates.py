"""What the node, the site, the software and the model forbid, found before anything queues. Pure: a plan in, findings out."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import Finding
from launcher.hardware import compatibility as known
from launcher.hardware.adapters import check_adapter
from launcher.hardware.attention import attention_problems, choose_attention
from launcher.hardware.fits import Observed, check_fits
from launcher.hardware.speedups import check_speedups
from launcher.hardware.time import missing_fact
from launcher.plan import Plan
from launcher.preset.complaints import nearest
from launcher.preset.fields import duration_min, duration_text
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Lora, Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack
from launcher.supported import EXECUTED, choices, sharding_refusal

GATES = frozenset(
    {
        "driver-too-old", "time-above-partition", "gpu-memory", "host-memory", "disk-too-small", "no-checkpoint-in-time", "gated-model",
    }
)  # fmt: skip
"""Codes of errors that are a refusal (exit code 3); every other error is a wrong preset or command line (2)."""

ALLOWED_BY = {
    "driver-too-old": "driver", "time-above-partition": "time", "no-checkpoint-in-time": "time", "gpu-memory": "memory",
    "host-memory": "memory",
}  # fmt: skip
"""What ``--allow`` must name to make a warning of the error. A full disk and a gated model cannot be argued with."""

NOT_EXECUTED_YET = "not-executed-yet"
"""Code of the warning that a plan is right but the training cannot run it yet: ``submit`` must refuse it before anything queues."""


def check_plan(
    plan: Plan, preset: Preset, hardware: Hardware, site: Site, stack: Stack | None, facts: ModelFacts | None, observed: Observed
) -> list[Finding]:
    """Everything there is to say: errors first, then warnings, then advice. ``plan.allowed`` turns its gates into warnings."""
    found = [
        *_node(plan, preset, hardware),
        *_site(plan, preset, site),
        *_site_without_effect(site),
        *_gpu(preset, hardware),
        *_attention(plan, preset, hardware, stack, facts),
        *_stack(plan, preset, hardware, stack),
        *_optimizer(preset),
        *check_speedups(plan, preset, hardware, stack),
        *_model(preset, facts),
        *check_adapter(preset, facts, stack),
        *_not_executed(plan, preset, stack),
        *_batch(plan),
        *_never_run(preset),
        *check_fits(plan, preset, site, facts, observed),
        *_not_predicted(plan, preset, hardware, facts),
    ]
    softened = [
        Finding("warning", finding.code, f"{finding.message}; allowed", None, None, finding.key, finding.hint)
        if finding.level == "error" and ALLOWED_BY.get(finding.code) in plan.allowed
        else finding
        for finding in found
    ]
    return sorted(softened, key=lambda finding: ("error", "warning", "advice").index(finding.level))


def _error(code: str, message: str, key: str, hint: str | None = None) -> Finding:
    return Finding("error", code, message, key=key, hint=hint)


def _warning(code: str, message: str, key: str, hint: str | None = None) -> Finding:
    return Finding("warning", code, message, key=key, hint=hint)


def _node(plan: Plan, preset: Preset, hardware: Hardware) -> Iterator[Finding]:
    layout = plan.layout
    if layout.gpus_per_node > hardware.gpus:
        message = f"{layout.gpus_per_node} GPUs, but a node of {hardware.name} has {hardware.gpus or 'none'}"
        yield _error("gpus-above-node", message, "gpus", f"gpus: {hardware.gpus}" + (" and more nodes" if hardware.gpus else ""))
    if layout.cpus_per_node > hardware.cpus:
        message = f"{layout.cpus_per_node} CPUs, but a node of {hardware.name} has {hardware.cpus}"
        yield _error("cpus-above-node", message, "cpus_per_node", f"cpus_per_node: {hardware.cpus}")
    if layout.memory_per_node_gib > hardware.memory_gib:
        message = f"{layout.memory_per_node_gib} GiB of RAM, but a node of {hardware.name} has {hardware.memory_gib}"
        yield _error("memory-above-node", message, "memory_per_node_gib", f"memory_per_node_gib: {hardware.memory_gib}")
    ranks, gpus = layout.ranks_per_node, layout.gpus_per_node
    if gpus and ranks > gpus:
        yield _error(
            "ranks-above-gpus",
            f"{ranks} ranks on {gpus} GPUs of a node: each rank needs its own",
            "ranks_per_node",
            f"ranks_per_node: {gpus}",
        )
    if gpus > ranks and preset.parallelism != "device_map":
        yield _warning("idle-gpus", f"{gpus - ranks} of {gpus} GPUs of a node get no rank", "ranks_per_node", "leave ranks_per_node out")


def _site(plan: Plan, preset: Preset, site: Site) -> Iterator[Finding]:
    if site.scheduler == "none":
        if preset.nodes > 1:
            yield _error(
                "nodes-without-scheduler",
                f"{preset.nodes} nodes, but site {site.name} is this machine alone",
                "nodes",
                "nodes: 1, or --site",
            )
        if any(value is not None for value in preset.slurm.model_dump().values()):
            yield Finding("advice", "slurm-unused", f"site {site.name} has no scheduler: nothing below slurm is used", key="slurm")
        return
    if site.account == "required" and "account" not in plan.slurm:
        yield _error("account-missing", f"site {site.name} wants an account", "slurm.account", "--account, or slurm.account")
    if site.closed is not None:
        yield Finding("warning", "site-closed", f"site {site.name} is closed since {site.closed}: nothing runs there any more")
    name = plan.slurm.get("partition")
    if name is None or not site.partitions:
        return
    if name not in site.partitions:
        hint = nearest(name, site.partitions) or f"known: {', '.join(site.partitions)}"
        yield _error("unknown-partition", f"site {site.name} knows no partition {name}", "slurm.partition", hint)
        return
    partition = site.partitions[name]
    if partition.gpus_per_node is not None and plan.hardware["gpus"] >= preset.gpus > partition.gpus_per_node:
        message = f"{preset.gpus} GPUs a node, but partition {name} has {partition.gpus_per_node}"
        yield _error("gpus-above-partition", message, "gpus", f"gpus: {partition.gpus_per_node}")
    most, cpus, memory_gib = partition.max_memory_per_cpu_mib, plan.layout.cpus_per_node, plan.layout.memory_per_node_gib
    if most is not None and 1024 * memory_gib > most * cpus and site.memory != "none" and not site.whole_nodes:
        message = f"{memory_gib} GiB for {cpus} CPUs, but partition {name} gives a CPU {most} MiB"
        hint = f"cpus_per_node: {-(-1024 * memory_gib // most)}, or less RAM"
        yield _error("memory-above-cpus", message, "memory_per_node_gib", hint)
    if site.whole_nodes and 0 < preset.gpus < (partition.gpus_per_node or 0):
        idle = (partition.gpus_per_node or 0) - preset.gpus
        message = f"site {site.name} gives whole nodes: {idle} of {partition.gpus_per_node} GPUs of each wait, and are paid"
        yield Finding("advice", "whole-node", message, key="gpus", hint=f"gpus: {partition.gpus_per_node}")
    if partition.max_nodes is not None and preset.nodes > partition.max_nodes:
        message = f"{preset.nodes} nodes, but partition {name} gives a job {partition.max_nodes}"
        yield _error("nodes-above-partition", message, "nodes", f"nodes: {partition.max_nodes}")
    if partition.max_time is not None and plan.time_limit_min is not None and plan.time_limit_min > duration_min(partition.max_time):
        message = f"{duration_text(plan.time_limit_min)}, but partition {name} allows {partition.max_time}"
        yield _error("time-above-partition", message, "slurm.time", f"time: {partition.max_time}; the run continues in a next life")


def _gpu(preset: Preset, hardware: Hardware) -> Iterator[Finding]:
    dtype, tf32 = preset.training.dtype, preset.training.tf32
    if not preset.gpus or hardware.gpu is None:
        if tf32:
            yield _warning("tf32-unused", "there is no TF32 on CPU", "training.tf32", "tf32: false")
        if dtype == "fp16":
            yield _error("dtype-not-on-gpu", "fp16 needs a GPU", "training.dtype", "dtype: fp32 or bf16")
        return
    gpu, capability = hardware.gpu.kind, hardware.gpu.compute_capability
    if not known.at_least(capability, known.DTYPE_CAPABILITY[dtype]):
        message = f"{dtype} needs compute capability {known.DTYPE_CAPABILITY[dtype]}, {gpu} has {capability}"
        yield _error("dtype-not-on-gpu", message, "training.dtype", "dtype: fp32 or fp16")
    if tf32 and not known.at_least(capability, known.TF32_CAPABILITY):
        yield _warning("tf32-unused", f"{gpu} has no TF32", "training.tf32", "tf32: false")


def _attention(plan: Plan, preset: Preset, hardware: Hardware, stack: Stack | None, facts: ModelFacts | None) -> Iterator[Finding]:
    yield from attention_problems(plan.attention, preset, hardware, stack, facts)
    if preset.attention == "auto":
        why = choose_attention(preset, hardware, stack, facts).why
        yield Finding("advice", "attention-chosen", f"auto is {plan.attention}: {why}", key="attention")


def _stack(plan: Plan, preset: Preset, hardware: Hardware, stack: Stack | None) -> Iterator[Finding]:
    if stack is None:
        yield _warning("stack-unknown", "an image of your own: its software is not checked here", "stack")
        return
    if preset.gpus and stack.cuda is None:
        yield _error(
            "stack-without-cuda", f"{preset.gpus} GPUs, but stack {stack.name} is for CPU", "stack", "a stack with CUDA, or gpus: 0"
        )
    if plan.attention not in stack.attention and plan.attention not in known.HALF_ONLY_ATTENTION:
        yield _error(
            "attention-not-in-stack", f"stack {stack.name} has no {plan.attention}", "attention", f"it has {', '.join(stack.attention)}"
        )
    if preset.parallelism not in stack.parallelism:
        hint = f"it has {', '.join(stack.parallelism)}"
        yield _error("parallelism-not-in-stack", f"stack {stack.name} has no {preset.parallelism}", "parallelism", hint)
    elif preset.parallelism == "fsdp" and not known.at_least(stack.packages["torch"], known.FSDP2_TORCH):
        message = f"fsdp needs torch {known.FSDP2_TORCH} or newer, stack {stack.name} has {stack.packages['torch']}"
        yield _error("parallelism-not-in-stack", message, "parallelism", "a newer stack, or parallelism: ddp")
    elif preset.parallelism.startswith("zero") and "deepspeed" not in stack.packages:
        message = f"{preset.parallelism} needs deepspeed, which stack {stack.name} is without"
        yield _error("parallelism-not-in-stack", message, "parallelism", "a stack with it, or parallelism: fsdp")
    yield from _libraries(plan, preset, hardware, stack)
    if not preset.gpus or stack.cuda is None:
        return
    if hardware.gpu is not None and not known.at_least(hardware.gpu.compute_capability, known.minimum_capability(stack)):
        needed = f"compute capability {known.minimum_capability(stack)}, {hardware.gpu.kind} has {hardware.gpu.compute_capability}"
        yield _error("gpu-older-than-stack", f"torch of stack {stack.name} needs {needed}", "stack", "an older stack: torch2.3-cu121")
    minimum = known.minimum_driver(stack)
    if minimum is None:
        yield _warning("driver-unknown", f"nothing is known about the driver that CUDA {stack.cuda} needs", "stack")
    elif hardware.driver is None and hardware.cuda is not None and stack.minimum_driver is None:
        if known.version(hardware.cuda)[0] < known.version(stack.cuda)[0]:
            message = f"stack {stack.name} (CUDA {stack.cuda}) needs driver {minimum}, {hardware.name}'s announces CUDA {hardware.cuda}"
            yield _error("driver-too-old", message, "stack", "a stack for an older CUDA, or --allow driver")
    elif hardware.driver is None:
        message = f"the driver of {hardware.name} is not known; stack {stack.name} needs {minimum} or newer"
        yield _warning("driver-unknown", message, "hardware", "nvidia-smi on a node says it; write driver: into your hardware file")
    elif not known.at_least(hardware.driver, minimum):
        message = f"stack {stack.name} (CUDA {stack.cuda}) needs driver {minimum}, {hardware.name} has {hardware.driver}"
        yield _error("driver-too-old", message, "stack", "a stack for an older CUDA, or --allow driver")


def _libraries(plan: Plan, preset: Preset, hardware: Hardware, stack: Stack) -> Iterator[Finding]:
    """Libraries that the choices need in the stack, in a version that goes with its torch, on a GPU that they know."""
    wants = [("training.optimizer", "adamw_8bit")] if preset.training.optimizer == "adamw_8bit" else []
    if isinstance(preset.adapter, Lora) and preset.adapter.kind == "qlora":
        wants.append(("adapter.kind", "qlora"))
    for key, wish in wants:
        if "bitsandbytes" not in stack.packages:
            yield _error("library-missing", f"{wish} needs bitsandbytes, which stack {stack.name} is without", key, "a stack with it")
        elif hardware.gpu is not None and not known.at_least(hardware.gpu.compute_capability, known.BITSANDBYTES_CAPABILITY):
            needed = f"compute capability {known.BITSANDBYTES_CAPABILITY}, {hardware.gpu.kind} has {hardware.gpu.compute_capability}"
            yield _error("library-not-on-gpu", f"{wish} needs {needed}", key, "adamw or adafactor, or adapter kind lora")
    for tracker in preset.tracking.to:
        if not {tracker, f"{tracker}-skinny"} & stack.packages.keys():
            hint = "a stack with it; metrics.jsonl has everything all the same"
            yield _warning("tracker-missing", f"{tracker} is not in stack {stack.name}: nothing goes there", "tracking.to", hint)


def _optimizer(preset: Preset) -> Iterator[Finding]:
    refusal = sharding_refusal(preset.model_dump(mode="json"))
    if refusal is not None:
        yield _error(refusal.code, refusal.message, refusal.key, refusal.hint)


def _model(preset: Preset, facts: ModelFacts | None) -> Iterator[Finding]:
    if facts is None:
        return
    length = preset.training.sequence_length
    if length > facts.context:
        message = f"{length} tokens, but the model's context is {facts.context}"
        yield _error("sequence-too-long", message, "training.sequence_length", f"sequence_length: {facts.context}")


def _site_without_effect(site: Site) -> Iterator[Finding]:
    """A site's findings have no key: what they are about is not in the preset."""
    if site.build.on == "elsewhere":
        message = f"site {site.name} builds no images: submit takes the one that it finds in the folder of images"
        yield Finding("warning", "build-elsewhere", message, hint="ftlaunch build on another machine, or --print-only, and copy it")


def _never_run(preset: Preset) -> Iterator[Finding]:
    if preset.parallelism == "device_map" and preset.gpus > 1:
        message = "no model was split over GPUs by ftlaunch yet, nor any run made on a GPU: only the plan of the split was tested"
        yield _warning("not-executed-here", message, "parallelism", "watch the first steps")
    elif preset.gpus:
        yield Finding("advice", "not-executed-here", "no run of ftlaunch was made on a GPU yet", key="gpus", hint="watch the first steps")


def _not_executed(plan: Plan, preset: Preset, stack: Stack | None) -> Iterator[Finding]:
    for key, value in choices(plan.preset, plan.attention).items():
        if key != "data.packing" and value not in EXECUTED[key]:
            message = f"{value} is planned and rendered, but the training does not run it yet: submit refuses"
            yield _warning(NOT_EXECUTED_YET, message, key, f"runs now: {', '.join(EXECUTED[key])}")
    if stack is not None and plan.attention in known.HALF_ONLY_ATTENTION and plan.attention not in stack.attention:
        message = f"stack {stack.name} is without flash-attn, which needs a compiler image and was not built here: submit refuses"
        yield _warning(NOT_EXECUTED_YET, message, "stack", "attention: xformers, or a stack of your own")


def _batch(plan: Plan) -> Iterator[Finding]:
    idle = plan.batch.samples_per_rank.count(0)
    if idle:
        message = f"{plan.batch.effective_batch} samples for {plan.world_size} ranks: {idle} of them only compute dummies"
        yield _warning("idle-ranks", message, "training.effective_batch", f"at most {plan.batch.effective_batch} ranks")


def _not_predicted(plan: Plan, preset: Preset, hardware: Hardware, facts: ModelFacts | None) -> Iterator[Finding]:
    """Which number is missing where a prediction is."""
    if facts is None:
        message = "no facts of this model: memory, time, disk, context and LoRA targets are not checked"
        hint = "a file of its shapes in ~/.config/ftlaunch/models, or model.path with its config.json"
        yield Finding("advice", "model-facts-unknown", message, key="model", hint=hint)
        if preset.training.micro_batch == "auto":
            message = "auto needs the facts of the model, which are not known"
            yield _error("micro-batch-unknown", message, "training.micro_batch", "a number")
        return
    missing = missing_fact(preset, hardware)
    if plan.time is None:
        message = f"how long it takes is not predicted: {hardware.name} says no {missing}"
        yield Finding("advice", "time-not-predicted", message, key="hardware")
    elif plan.time.steps is None:
        blocks = preset.data.packing in ("concatenate", "documents")
        message = "the number of blocks is" if blocks else "the number of samples (data.num_samples) is"
        message = f"how long the run takes is not predicted, only a step: {message} not known before staging"
        yield Finding("advice", "samples-unknown", message, key="data", hint="ftlaunch stage")
    elif plan.staged is None and preset.evaluation.every != "never" and preset.data.eval_share == 0:
        message = "the time of evaluations is not in the prediction: how many samples they take is not known before staging"
        yield Finding("advice", "samples-unknown", message, key="evaluation", hint="ftlaunch stage")
