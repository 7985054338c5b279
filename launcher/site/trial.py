"""Whether Slurm would take a job asked for as a draft of a site says: ``sbatch --test-only``, which submits nothing but asks the site's
own rules (job_submit, cli_filter) too. Where it would not, the other ways of asking are tried.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.site.conclude import Draft
from launcher.slurm.tools import NO_ANSWER, NO_PROGRAM, call, clean_environment

TIMEOUT_S = 20.0

FORMS = {"gres": "--gres=gpu:{}", "gpus_per_node": "--gpus-per-node={}", "gpus_per_task": "--gpus-per-task={}", "gpus": "--gpus={}"}
"""Ways of asking for GPUs, the one of Slurm's own documentation first."""


def try_requests(draft: Draft, sbatch: str, *, today: str) -> None:
    """Keep of ``draft`` what is accepted, or say why nothing is. At most a dozen questions, most often one."""
    name = _partition(draft.values.get("partitions", {}))
    if name is None or (draft.values.get("account") == "required" and "default_account" not in draft.values):
        return
    refusals: list[str] = []
    for form, memory in _ways(draft, name):
        options = _options(draft.values, name, form, memory)
        environ = clean_environment(os.environ)
        answer = call([sbatch, "--test-only", *options, "--wrap=true"], environ=environ, timeout_s=TIMEOUT_S)
        if answer.code in (NO_ANSWER, NO_PROGRAM) or answer.unreachable:
            return
        if answer.code == 0:
            _keep(draft, form, memory, f"sbatch --test-only {' '.join(options)} is accepted, {today}")
            break
        refusals.append(f"{' '.join(options)}: {answer.reason}")
    else:
        draft.doubt("gpu_request", "memory")
        draft.note("", f"Slurm refuses {refusals[0]}")
        return
    for refusal in refusals:
        draft.note("gpu_request", f"refused: {refusal}")


def _ways(draft: Draft, partition: str) -> Iterator[tuple[str, str]]:
    """Ways of asking for GPUs and memory: what was concluded, then other forms, each also without memory."""
    form, memory = draft.values.get("gpu_request", "none"), draft.values.get("memory", "none")
    has_gpus = bool(draft.values["partitions"][partition].get("gpus_per_node"))
    forms = [form, *(other for other in FORMS if other != form)] if has_gpus else [form]
    yield from ((one, memory) for one in forms)
    if memory != "none" and not draft.values.get("whole_nodes"):
        yield from ((one, "none") for one in forms)


def _options(values: Mapping[str, Any], partition: str, form: str, memory: str) -> list[str]:
    entry = values["partitions"][partition]
    asked = ["--nodes=1", "--ntasks=1", "--time=1", f"--partition={partition}"]
    for option, value in (("account", values.get("default_account")), ("qos", entry.get("qos")), ("constraint", entry.get("constraint"))):
        asked += [f"--{option}={value}"] if value else []
    if form in FORMS and entry.get("gpus_per_node"):
        kind = values.get("gpu_type")
        asked.append(FORMS[form].format(f"{kind}:1" if kind else "1"))
    if memory == "mem" and not values.get("whole_nodes"):
        asked.append("--mem=1G")
    return asked


def _keep(draft: Draft, form: str, memory: str, source: str) -> None:
    draft.note("", source.replace("sbatch --test-only ", "Slurm takes a job asked for by ").replace(" is accepted", ""))
    if "gpu_request" in draft.values:
        draft.values["gpu_request"] = form
        draft.sources["gpu_request"] = source
        draft.unknown[:] = [key for key in draft.unknown if key != "gpu_request"]
    if draft.values.get("memory", memory) != memory:
        draft.values["memory"] = memory
        draft.sources["memory"] = source


def _partition(partitions: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The one that runs would go to: with GPUs, and not for tests."""
    order = sorted(partitions, key=lambda name: (not partitions[name].get("gpus_per_node"), bool(partitions[name].get("test"))))
    return next(iter(order), None)
