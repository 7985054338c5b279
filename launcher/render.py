"""Plan → {file name: text}: what a run folder is made of, for a dry run to show and for a submission to write. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.plan import Plan, to_json
from launcher.preset.fields import slurm_time
from launcher.run import Run
from launcher.templating import render_template

Directive = tuple[str, str]
"""Name and value of an ``#SBATCH`` line."""

_PLAN_OPTIONS = ("account", "partition", "qos", "constraint", "reservation", "exclude")


def render(plan: Plan, run: Run, *, python: str, definition: str | None = None, template: Path | None = None) -> dict[str, str]:
    """The files of ``run``. ``python`` is the interpreter that supervises on the nodes, ``definition`` the image's (None without one of
    ours), ``template`` the user's own in the place of the batch script's.

    Errors: UsageError when a template cannot be rendered.
    """
    files = {"plan.json": json.dumps(to_json(plan), indent=2, allow_nan=False) + "\n"}
    if plan.site["scheduler"] == "slurm":
        files["job.sbatch"] = job_script(plan, run, python=python, template=template)
    if definition is not None:
        files["image.def"] = definition
    if plan.preset["parallelism"].startswith("zero"):
        files["ds_config.json"] = deepspeed_config(plan)
    return files


def job_script(plan: Plan, run: Run, *, python: str, template: Path | None = None) -> str:
    """The batch script, which ``cd RUN && sbatch job.sbatch`` submits by hand as well."""
    site = plan.site
    container_module = site["container"]["module"]
    return render_template(
        "slurm/job.sbatch.j2",
        own=template,
        version=__version__,
        run_id=run.id,
        preset_name=plan.name,
        run=run.root,
        python=python,
        directives=directives(plan, run),
        modules=[*site["modules"], *([container_module] if container_module else [])],
        plan=to_json(plan),
    )


def deepspeed_config(plan: Plan) -> str:
    """DeepSpeed is told the micro batch and the accumulation and must not rescale. It writes none of its checkpoints."""
    training, on_gpu = plan.preset["training"], plan.layout.gpus_per_node > 0
    return render_template(
        "deepspeed/zero.json.j2",
        micro_batch=plan.batch.micro_batch,
        micro_steps=plan.batch.micro_steps,
        max_grad_norm=json.dumps(training["max_grad_norm"]),
        bf16=json.dumps(training["dtype"].startswith("bf16")),
        fp16=json.dumps(training["dtype"] == "fp16"),
        stage=plan.preset["parallelism"][-1],
        offload=plan.preset["offload"],
        pinned=json.dumps(on_gpu),
        overlapped=json.dumps(on_gpu),
    )


def directives(plan: Plan, run: Run) -> list[Directive]:
    """The ``#SBATCH`` lines: what the site asks for and the user named, nothing else.

    No ``--requeue``: it would overrule JobRequeue=0, with which an administrator forbids it. Where it is refused, a job follows.
    """
    site, layout = plan.site, plan.layout
    asked: list[Directive] = [
        ("job-name", plan.name),
        ("output", f"{run.submitit}/%j_0_log.out"),
        ("open-mode", "append"),
        ("propagate", "NONE"),
        ("nodes", str(layout.nodes)),
        ("ntasks-per-node", str(1 if _per_task(plan) else layout.ranks_per_node)),
    ]
    if not site["whole_nodes"]:
        asked += [("cpus-per-task", str(layout.cpus_per_node if _per_task(plan) else layout.cpus_per_rank)), *_memory(plan)]
    asked += _gpus(plan)
    if plan.time_limit_min is not None:
        asked.append(("time", slurm_time(plan.time_limit_min)))
    receiver = "B:" if site["signal"] == "batch" else ""
    asked.append(("signal", f"{receiver}USR2@{plan.signal_lead_s}"))
    asked += [(name, plan.slurm[name]) for name in _PLAN_OPTIONS if plan.slurm.get(name)]
    if plan.slurm.get("mail"):
        asked += [("mail-user", plan.slurm["mail"]), ("mail-type", "END,FAIL")]
    return asked


def _per_task(plan: Plan) -> bool:
    """One task a node holds everything, since GPUs asked for per task are bound to it and ranks need to see each other's."""
    return plan.site["gpu_request"] == "gpus_per_task" and plan.layout.gpus_per_node > 0


def _memory(plan: Plan) -> list[Directive]:
    total_mib, layout = plan.layout.memory_per_node_gib * 1024, plan.layout
    form = plan.site["memory"]
    if form == "mem":
        return [("mem", f"{layout.memory_per_node_gib}G")]
    if form == "per_cpu":
        cpus = layout.cpus_per_node if _per_task(plan) else layout.cpus_per_rank * layout.ranks_per_node
        return [("mem-per-cpu", f"{total_mib // cpus}M")]
    if form == "per_gpu" and layout.gpus_per_node:
        return [("mem-per-gpu", f"{total_mib // layout.gpus_per_node}M")]
    return []


def _gpus(plan: Plan) -> list[Directive]:
    """GPUs are asked for per node, per job, or for the one task of a node."""
    site, layout = plan.site, plan.layout
    gpu: dict[str, Any] = plan.hardware["gpu"] or {}
    kind = site["gpu_type"] or (gpu.get("gres_type") if site["gpu_typed"] else None)
    prefix = f"{kind}:" if kind else ""
    count, form = layout.gpus_per_node, site["gpu_request"]
    resources = [f"gpu:{prefix}{count}"] if count and form == "gres" else []
    resources += [site["local_disk_request"]] if site["local_disk_request"] else []
    asked: list[Directive] = [("gres", ",".join(resources))] if resources else []
    if count and form == "gpus_per_node":
        asked.append(("gpus-per-node", f"{prefix}{count}"))
    if _per_task(plan):
        asked.append(("gpus-per-task", f"{prefix}{count}"))
    if count and form == "gpus":
        asked.append(("gpus", f"{prefix}{count * layout.nodes}"))
    return asked
