"""Asking Slurm what it is: read-only questions, a handful, bounded in time. What does not answer is left out and said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from launcher.errors import ActionError, MissingError
from launcher.site import slurm_facts
from launcher.site.slurm_facts import Association, Node, PartitionFacts, Qos, Reservation
from launcher.slurm.tools import Answer, call, clean_environment

TIMEOUT_S = 30.0
"""For one question. Slurm's own patience with a busy controller is about as long."""

CONFIG = ("scontrol", "show", "config")
PARTITIONS = ("scontrol", "show", "partition")
NODES = ("scontrol", "-o", "show", "node")
RESERVATIONS = ("scontrol", "-o", "show", "reservation")
QOS = ("sacctmgr", "-n", "-P", "show", "qos", f"format={','.join(slurm_facts.QOS_COLUMNS)}")


@dataclass(frozen=True)
class Cluster:
    """What Slurm said. Empty where it did not: then ``failed`` has the reason."""

    config: Mapping[str, str]
    partitions: tuple[PartitionFacts, ...] = ()
    nodes: tuple[Node, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    associations: tuple[Association, ...] = ()
    qualities: tuple[Qos, ...] = ()
    default_account: str | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    """Command → what it said instead of an answer."""

    @property
    def has_accounting(self) -> bool:
        return "slurmdbd" in self.config.get("AccountingStorageType", "")

    @property
    def enforced(self) -> frozenset[str]:
        """What of accounting a job is refused for: associations, limits, qos, wckeys …"""
        said = self.config.get("AccountingStorageEnforce", "none").lower()
        return frozenset() if said in ("none", "(null)", "") else frozenset(said.replace("all", "associations,limits,qos").split(","))


def ask_cluster(user: str, *, timeout_s: float = TIMEOUT_S) -> Cluster:
    """All questions of ``site discover``. Errors: MissingError without scontrol, ActionError where Slurm says nothing at all."""
    if shutil.which("scontrol") is None:
        hint = "run this on a login node of the cluster, where its Slurm commands are on PATH"
        raise MissingError("scontrol: not found on this machine", code="no-slurm", hint=hint)
    failed: dict[str, str] = {}
    config = slurm_facts.config(texts([CONFIG], timeout_s, failed)[CONFIG])
    mine = [f"cluster={config['ClusterName']}"] if "ClusterName" in config else []
    columns = ",".join(slurm_facts.ASSOCIATION_COLUMNS)
    associations = ("sacctmgr", "-n", "-P", "show", "assoc", "where", f"user={user}", *mine, f"format={columns}")
    users = ("sacctmgr", "-n", "-P", "show", "user", "where", f"name={user}", *mine, "format=User,DefaultAccount")
    cluster = Cluster(config)
    questions = [PARTITIONS, NODES, RESERVATIONS, *([associations, users, QOS] if cluster.has_accounting or not config else [])]
    said = texts(questions, timeout_s, failed)
    if not config and not said[PARTITIONS]:
        raise ActionError(f"Slurm does not answer: {failed[' '.join(CONFIG)]}", code="slurm-silent", hint="try again later")
    accounts = slurm_facts.table(said.get(users, ""), ("User", "DefaultAccount"))
    return Cluster(
        config,
        tuple(slurm_facts.partitions(said[PARTITIONS])),
        tuple(slurm_facts.nodes(said[NODES])),
        tuple(slurm_facts.reservations(said[RESERVATIONS])),
        tuple(slurm_facts.associations(said.get(associations, ""))),
        tuple(slurm_facts.qualities(said.get(QOS, ""))),
        next((row["DefaultAccount"] for row in accounts if row["DefaultAccount"]), None),
        failed,
    )


def texts(questions: Sequence[tuple[str, ...]], timeout_s: float, failed: dict[str, str]) -> dict[tuple[str, ...], str]:
    """What each question was answered with; empty where it failed."""
    environ = {**clean_environment(os.environ), "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    with ThreadPoolExecutor(max_workers=3) as pool:
        answers = list(pool.map(lambda argv: call(argv, environ=environ, timeout_s=timeout_s), questions))
    for argv, answer in zip(questions, answers):
        if answer.code != 0:
            failed[" ".join(argv[:5] if argv[0] == "sacctmgr" else argv)] = _reason(answer)
    return {argv: answer.stdout if answer.code == 0 else "" for argv, answer in zip(questions, answers)}


def _reason(answer: Answer) -> str:
    return answer.reason[:200]
