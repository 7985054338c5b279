"""Why a job waits, in a line, and the command that releases or mends it: Slurm's reason codes put into words. Pure, asks nothing.

The codes are those of Slurm 20.11 to 25 (job_reason_codes.html), as ``squeue`` and ``scontrol`` print them. What is not here is passed on
in Slurm's own word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """One line about a job that waits."""

    text: str
    command: str | None = None
    """What to type; None where time alone helps."""
    stuck: bool = False
    """Whether it never starts unless somebody does something."""

    def __str__(self) -> str:
        return f"{self.text}: {self.command}" if self.command else self.text


RELEASE = "scontrol release {job}"
MINUTES = "MINUTES"
"""Stands for a number in a command, where only Slurm can tell it."""
SHORTER = "scontrol update JobId={job} TimeLimit=" + MINUTES
OTHERWISE = "ftlaunch cancel {run}, then ftlaunch resume {run} with "

_HELD_BY_ADMIN = "held by an administrator, who alone can release it; ask the centre about this job"
_CENTRE = "ask the centre, or " + OTHERWISE
_NOT_THERE = "what it asks for is not there (nodes down, drained or reserved)"
_UNTIL_OTHERS = "has as much in use as it may: it starts when other jobs end"
_MAINTENANCE = "its time limit reaches into a maintenance: it starts after it, or before if shorter"
_UNRESERVED = "scontrol update JobId={job} ReservationName= && " + RELEASE

_REASONS: tuple[tuple[str, str, str | None, bool], ...] = (
    # held
    ("jobhelduser", "held, by you or for you", RELEASE, True),
    ("jobheldadmin", _HELD_BY_ADMIN, "scontrol show job {job}", True),
    ("launch_failed_requeued_held|joblaunchfailure", "Slurm could not start it on its nodes and holds it", RELEASE, True),
    ("job_requeued_in_held_state", "requeued and held, by you or an administrator", RELEASE, True),
    (r"job_?hold_?\w*requeue|max\w*requeue\w*", "requeued more often than this cluster allows, and held", RELEASE, True),
    ("systemfailure|front_?enddown", "Slurm failed to start it", RELEASE, True),
    ("reservationdeleted|reservationinvalid", "its reservation is gone", _UNRESERVED, True),
    ("burstbufferoperation", "its burst buffer failed", RELEASE, True),
    # never, as it is
    (r"badconstraints\w*|constraints", "no node has what it asks for", OTHERWISE + "--constraint, --partition, --gpus or --nodes", True),
    ("partitionconfig", "its partition has no nodes for what it asks for", OTHERWISE + "--partition, --gpus or --nodes", True),
    ("partitionnodelimit", "more nodes than its partition gives, or they are down", OTHERWISE + "--nodes or --partition", True),
    ("partitiontimelimit", "its time limit is above its partition's", SHORTER, True),
    (r"(assoc|qos)maxwalldurationperjob\w*", "its time limit is above what the {who} allows", SHORTER, True),
    (r"(assoc|qos)max\w*minutesperjob\w*", "GPUs × time limit are above what the {who} allows a job", SHORTER, True),
    (r"(assoc|qos)max\w*per(job|node)\w*", "it asks for more than the {who} allows a job", OTHERWISE + "--gpus, --nodes or --qos", True),
    (r"qosmin\w*", "it asks for less than its QoS wants", OTHERWISE + "--qos or more --gpus", True),
    ("maxmemperlimit", "it asks for more memory than its partition gives", OTHERWISE + "--set memory_per_node_gib=…", True),
    ("invalidaccount|accountnotallowed", "its account is not admitted there", OTHERWISE + "--account or --partition", True),
    ("invalidqos|qosnotallowed", "its QoS is not admitted there", OTHERWISE + "--qos or --partition", True),
    ("deadline", "its deadline is over", OTHERWISE + "another --time", True),
    ("dependencyneversatisfied", "the job that it waits for ended otherwise", "scontrol update JobId={job} Dependency=", True),
    # budgets and partitions: not by themselves, or not soon
    (r"(assoc|qos)grp(?!\w*run)\w*minutes\w*|(assoc|qos)grpwall\w*", "the budget of its {who} is used up", _CENTRE + "--account", True),
    ("(qos|assoc)usagethreshold", "its {who} has used too much lately", _CENTRE + "--account or --qos", True),
    ("partitiondown|partitioninactive", "its partition is closed at the moment", OTHERWISE + "--partition", False),
    # until others end
    (r"(assoc|association)(grp|max|job|resource|time)\w*", "your account " + _UNTIL_OTHERS, None, False),
    (r"qos(grp|max|job|resource|time)\w*", "its QoS " + _UNTIL_OTHERS, None, False),
    (r"max\w+per(account|user)\w*|accountingpolicy", "your account " + _UNTIL_OTHERS, None, False),
    (r"reqnodenotavail.*maintenance.*", _MAINTENANCE, SHORTER, False),
    (r"reqnodenotavail.*|nodedown|node_?fail.*|powernotavail|powerreserved", _NOT_THERE, None, False),
    ("reservation", "waits for its reservation to begin", None, False),
    ("dependency", "waits for another job to end", None, False),
    ("begintime", "Slurm lets a requeued job wait for a moment", None, False),
    ("resources", "waits for nodes to become free", None, False),
    ("priority|none|", "waits for jobs that come first", None, False),
    ("licenses", "waits for licences", None, False),
    ("cleaning", "its last life is still being cleaned up", None, False),
    ("prolog|scheddefer|fedjoblock|burstbufferstagein|burstbufferresources|jobarraytasklimit", "Slurm is preparing it", None, False),
)  # fmt: skip
"""Pattern of the reason (small letters, ``_`` for blanks, matched whole), text, command, whether it is stuck. The first one counts."""


def explain(reason: str, *, job: str, run: str) -> Waiting:
    """``reason`` as ``squeue --format=%r`` prints it; ``run``: what a person types for the run."""
    said = re.sub(r"[\s,]+", "_", reason.strip().strip("()").lower())
    for pattern, text, command, stuck in _REASONS:
        if re.fullmatch(pattern, said):
            who = "QoS" if said.startswith("qos") else "account"
            return Waiting(text.format(who=who), command and command.format(job=job, run=run), stuck)
    return Waiting(f"Slurm says {reason}", f"scontrol show job {job}")


def holds(reason: str) -> bool:
    """Whether somebody has to do something before the job can start."""
    return explain(reason, job="", run="").stuck
