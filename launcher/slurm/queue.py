"""What Slurm's queue says of jobs: squeue, then sacct for those that left it. Bounded, tolerant, never a guess. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.slurm.tools import call
from launcher.state import JobState, Known

TIMEOUT_S = 20

STATES: dict[str, JobState] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"), "pending"),
    **dict.fromkeys(("RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"), "running"),
    **dict.fromkeys(("COMPLETING", "STAGE_OUT"), "ending"),
    **dict.fromkeys(("CANCELLED", "REVOKED"), "cancelled"),
    **dict.fromkeys(("FAILED", "BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "PREEMPTED"), "failed"),
    "COMPLETED": "completed",
}
"""Slurm's job states and what they mean for a run. What is not here is ``unknown``."""


def look_up(job_ids: Sequence[str], tools: Mapping[str, str]) -> dict[str, Known]:
    """What Slurm knows of each job, with one call of squeue and, for those it does not list, one of sacct.

    A job that squeue denies is ``gone`` when accounting, which many clusters lack, cannot say more.
    """
    wanted = [job_id for job_id in dict.fromkeys(job_ids) if job_id.isdigit()]
    if not wanted:
        return {}
    listed = _squeue(wanted, tools)
    rest = [job_id for job_id in wanted if job_id not in (listed or {})]
    told = _sacct(rest, tools) if rest else {}
    if listed is not None and told:
        # The queue does not have it: what accounting still calls alive (REQUEUED, after a scancel) ended without a record.
        told = {job_id: known for job_id, known in told.items() if known.state not in ("pending", "running", "ending")}
    # Only the queue can say that there is no such job: accounting may be missing or late.
    nothing = Known("gone") if listed is not None else Known("unknown", "Slurm could not be asked")
    return {job_id: (listed or {}).get(job_id) or (told or {}).get(job_id) or nothing for job_id in wanted}


def _squeue(job_ids: Sequence[str], tools: Mapping[str, str]) -> dict[str, Known] | None:
    """None when it could not be asked. Jobs that left the queue a while ago make it fail when they are named alone."""
    if "squeue" not in tools:
        return None
    answer = call([tools["squeue"], "--noheader", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(job_ids)}"], timeout_s=TIMEOUT_S)
    if answer.code != 0 and "Invalid job id" not in answer.reason:
        return None
    return _parse(answer.stdout)


def _sacct(job_ids: Sequence[str], tools: Mapping[str, str]) -> dict[str, Known] | None:
    """None when there is no accounting."""
    if "sacct" not in tools:
        return None
    options = ["--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={','.join(job_ids)}"]
    answer = call([tools["sacct"], *options], timeout_s=TIMEOUT_S)
    return _parse(answer.stdout) if answer.code == 0 else None


def _parse(text: str) -> dict[str, Known]:
    known = {}
    for line in text.splitlines():
        job_id, _, rest = line.strip().partition("|")
        word, _, reason = rest.partition("|")
        state = STATES.get((word.split() or [""])[0].rstrip("+"), "unknown")  # CANCELLED by 1000, CANCELLED+
        known[job_id] = Known(state, reason if state == "pending" and reason not in ("", "None") else word)
    return known
