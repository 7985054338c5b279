"""What this user may use: partitions, accounts, QoS, and what has to be named. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.site.ask import Cluster
from launcher.site.slurm_facts import PartitionFacts, Qos


@dataclass(frozen=True)
class QosChoice:
    ask: str | None = None
    """Has to be written; None: Slurm's own choice is accepted."""
    open: tuple[str, ...] = ()
    """One of these has to be named, and nothing tells which."""


@dataclass(frozen=True)
class Rights:
    partitions: tuple[PartitionFacts, ...]
    left_out: Mapping[str, str]
    """Partition → why this user cannot submit there."""
    accounts: frozenset[str] = frozenset()
    """Those that the partitions admit."""
    account: str | None = None
    account_required: bool = False
    account_why: str = ""
    unknown_user: bool = False
    """Accounting is enforced and has nothing of this user."""
    qualities: frozenset[str] = frozenset()
    """QoS that this user may ask for; empty where nothing says."""
    default_qos: str | None = None
    enforces_qos: bool = False
    submit_limit: int | None = None
    known_qualities: Mapping[str, Qos] = field(default_factory=dict)
    preempted: frozenset[str] = frozenset()
    max_wall_min: int | None = None
    """Of the only account that there is to take."""

    def max_wall(self, partition: PartitionFacts) -> int | None:
        """Minutes that the partition's own QoS, else the one that a job there has, else its account leaves of the partition's limit."""
        names = [name for name in (partition.qos, self.qos_for(partition).ask or self.default_qos) if name]
        limits = [self.known_qualities[name].max_wall_min for name in names if name in self.known_qualities]
        return next((limit for limit in limits if limit is not None), self.max_wall_min)

    def qos_for(self, partition: PartitionFacts) -> QosChoice:
        """What has to be written for a job there. A QoS that others preempt is taken only where there is no other."""
        if not self.qualities or (not self.enforces_qos and partition.allowed_qos is None):
            return QosChoice()
        admitted = _admitted(self.qualities, partition)
        if self.default_qos in admitted or not admitted:
            return QosChoice()
        safe = sorted(admitted - self.preempted) or sorted(admitted)
        return QosChoice(ask=safe[0]) if len(safe) == 1 else QosChoice(open=tuple(safe))


def rights_of(cluster: Cluster, groups: frozenset[str]) -> Rights:
    enforced = "associations" in cluster.enforced or bool({"limits", "qos", "safe"} & cluster.enforced)
    mine = frozenset(one.account for one in cluster.associations)
    qualities = frozenset(name.lstrip("+-") for one in cluster.associations for name in one.qos)
    defaults = {one.default_qos for one in cluster.associations if one.default_qos}
    default_qos = next(iter(defaults)) if len(defaults) == 1 else None
    if default_qos is None and not defaults and (qualities == {"normal"} or len(qualities) == 1):
        default_qos = next(iter(qualities))  # Slurm takes the only one
    known = {one.name: one for one in cluster.qualities}
    usable, left_out = [], {}
    for partition in cluster.partitions:
        reason = _refusal(partition, cluster, mine, groups, qualities)
        if reason is None:
            usable.append(partition)
        else:
            left_out[partition.name] = reason
    admitted = frozenset(name for name in mine if any(_admits(partition, name) for partition in usable)) or mine
    account, required, why = _account(cluster, usable, admitted, enforced)
    limits = [one.max_submit for one in cluster.associations] + [known[default_qos].max_submit if default_qos in known else None]
    rights = Rights(
        partitions=tuple(usable),
        left_out=left_out,
        accounts=admitted,
        account=account,
        account_required=required,
        account_why=why,
        unknown_user=enforced and not mine and not any(name.startswith("sacctmgr") for name in cluster.failed),
        qualities=qualities,
        default_qos=default_qos,
        enforces_qos="qos" in cluster.enforced,
        submit_limit=min((limit for limit in limits if limit), default=None),
        known_qualities=known,
        preempted=frozenset(name for one in cluster.qualities for name in one.preempts),
        max_wall_min=_account_wall(cluster, account),
    )
    return rights


def _account_wall(cluster: Cluster, account: str | None) -> int | None:
    limits = [one.max_wall_min for one in cluster.associations if one.account == account and one.partition is None]
    return limits[0] if limits and {"limits", "qos", "safe"} & cluster.enforced else None


def _account(cluster: Cluster, usable: list[PartitionFacts], admitted: frozenset[str], enforced: bool) -> tuple[str | None, bool, str]:
    """The account to write, whether one has to be written, and who says so."""
    config = f"scontrol show config: AccountingStorageEnforce={cluster.config.get('AccountingStorageEnforce', 'none')}"
    default = cluster.default_account
    only = next(iter(admitted)) if len(admitted) == 1 and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", next(iter(admitted))) else None
    if not enforced and all(partition.accounts is None for partition in usable):
        return only, False, config
    if default is not None and usable and not any(_admits(partition, default) for partition in usable):
        return only, True, f"sacctmgr show user, scontrol show partition: AllowAccounts leaves your default account {default} out"
    if default is None and enforced:
        return only, True, f"{config}; you have no default account"
    return only, False, f"{config}; without one Slurm takes your default account {default}" if default else config


def _refusal(
    partition: PartitionFacts, cluster: Cluster, accounts: frozenset[str], groups: frozenset[str], qualities: frozenset[str]
) -> str | None:
    """Why this user cannot submit to a partition, as far as Slurm shows it."""
    if partition.state.upper() != "UP":
        return f"State={partition.state}"
    if partition.root_only:
        return "RootOnly=YES"
    if partition.needs_reservation:
        return "jobs there need a reservation (ReqResv=YES)"
    if partition.groups is not None and not partition.groups & groups:
        return f"AllowGroups={_some(partition.groups)}"
    # From 23.11 on the list holds sub-accounts as well, which are not shown to everybody.
    flat = _version(cluster) < (23, 11)
    if accounts and flat and not any(_admits(partition, name) for name in accounts):
        return f"AllowAccounts={_some(partition.accounts)}"
    if qualities and not _admitted(qualities, partition):
        return f"AllowQos={_some(partition.allowed_qos)}"
    return None


def _admits(partition: PartitionFacts, account: str) -> bool:
    return account not in partition.denied_accounts and (partition.accounts is None or account in partition.accounts)


def _admitted(qualities: frozenset[str], partition: PartitionFacts) -> frozenset[str]:
    allowed = qualities if partition.allowed_qos is None else qualities & partition.allowed_qos
    return allowed - partition.denied_qos


def _version(cluster: Cluster) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", cluster.config.get("SLURM_VERSION", ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _some(names: frozenset[str] | None) -> str:
    listed = sorted(names or ())
    return ",".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "") if listed else "none"
