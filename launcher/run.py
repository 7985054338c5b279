"""The Run: one folder on disk. Every path in it is a property here; state is files, never memory. Standard library only (Python 3.9).

<name>-<8 hex of the identity>[-n]/
  run.json  preset.yaml  plan.json  image.def  job.sbatch  code/  events.jsonl  metrics.jsonl
  lives/<n>/  plan.json and job.sbatch where changed, supervisor.log, lease.json, rank-<r>.log, rank-<r>.json (exit records)
  checkpoints/  model/  report/  submitit/
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from launcher.errors import EXIT_DO_NOT_RETRY, EXIT_STOPPED
from launcher.files import append_line, read_json_lines, write_json
from launcher.plan import Plan, read_plan

State = Literal["created", "staging", "queued", "running", "stopping", "stopped", "continuing", "finished", "failed", "cancelled", "lost"]


@dataclass(frozen=True)
class Run:
    """A run folder, which may not exist yet. Nothing is cached: every read looks at the disk."""

    root: Path

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def record_file(self) -> Path:
        """``run.json``: identity, name, site, version, when and where it was created; written once."""
        return self.root / "run.json"

    @property
    def preset_file(self) -> Path:
        return self.root / "preset.yaml"

    @property
    def definition_file(self) -> Path:
        return self.root / "image.def"

    @property
    def code(self) -> Path:
        """Holds ``launcher/`` as submitted; first on the path of the supervisor and of the ranks."""
        return self.root / "code"

    @property
    def events_file(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def submitit(self) -> Path:
        """submitit's own folder: pickles, results and the batch step's log."""
        return self.root / "submitit"

    @property
    def cache(self) -> Path:
        """Caches of the libraries that the ranks use, so that no home is written to."""
        return self.root / "cache"

    def life(self, life: int) -> Path:
        return self.root / "lives" / str(life)

    def plan_file(self, life: int = 0) -> Path:
        """The plan that ``life`` goes by: that of the newest life up to it which changed the plan, else that of the submission."""
        for number in range(life, -1, -1):
            changed = self.life(number) / "plan.json"
            if changed.exists():
                return changed
        return self.root / "plan.json"

    def job_file(self, life: int = 0) -> Path:
        """The batch script that ``life`` goes by, chosen as the plan is."""
        for number in range(life, -1, -1):
            changed = self.life(number) / "job.sbatch"
            if changed.exists():
                return changed
        return self.root / "job.sbatch"

    def deepspeed_file(self, life: int = 0) -> Path:
        """DeepSpeed's configuration, beside the plan that ``life`` goes by."""
        return self.plan_file(life).with_name("ds_config.json")

    def rank_log(self, life: int, rank: int | str) -> Path:
        return self.life(life) / f"rank-{rank}.log"

    def lease_file(self, life: int) -> Path:
        """Written by that life alone."""
        return self.life(life) / "lease.json"

    def supervisor_log(self, life: int) -> Path:
        """A supervisor claims its life by creating it."""
        return self.life(life) / "supervisor.log"

    def unpack_log(self, life: int) -> Path:
        """What the nodes said when they made the image ready."""
        return self.life(life) / "unpack.log"

    def exit_record_file(self, life: int, rank: int) -> Path:
        return self.life(life) / f"rank-{rank}.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def plan(self, life: int = 0) -> Plan:
        return read_plan(self.plan_file(life))

    def record(self) -> dict[str, Any]:
        value = json.loads(self.record_file.read_text(encoding="utf-8"))
        assert isinstance(value, dict)
        return value

    def append_event(self, event: str, *, life: int | None = None, job_id: str | None = None, **details: Any) -> None:
        record: dict[str, Any] = {"time": now(), "event": event, "life": life, "job_id": job_id, **details}
        append_line(self.events_file, json.dumps({key: value for key, value in record.items() if value is not None}))

    def events(self, *names: str) -> list[dict[str, Any]]:
        """All events in order, or those of these names."""
        records = [record for record in read_json_lines(self.events_file) if "event" in record]
        return [record for record in records if not names or record["event"] in names]

    def lives_started(self) -> int:
        """How many lives began, those included that failed before their ``started`` event; the number of the next one."""
        claimed = _lives_with(self, "supervisor.log")
        started = [int(event["life"]) for event in self.events("started")]
        return max([*claimed, *started], default=-1) + 1


def _lives_with(run: Run, name: str) -> list[int]:
    """The lives whose folder holds a file of this name, in no order."""
    found = (path.parent.name for path in (run.root / "lives").glob(f"*/{name}"))
    return [int(life) for life in found if life.isdecimal()]


@dataclass(frozen=True)
class ExitRecord:
    """What one rank left behind when it ended by itself."""

    rank: int
    exit_code: int
    step: int
    """The last completed optimizer step."""
    reason: str
    """One line: ``finished``, ``stopped``, or the error."""
    host: str
    time: str


def write_exit_record(run: Run, life: int, record: ExitRecord) -> None:
    write_json(run.exit_record_file(life, record.rank), asdict(record))


def read_exit_records(run: Run, life: int) -> list[ExitRecord]:
    """The records of a life in order of rank; ranks that were killed left none."""
    records = []
    for path in sorted(run.life(life).glob("rank-*.json")):
        try:
            records.append(ExitRecord(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            continue
    return sorted(records, key=lambda record: record.rank)


@dataclass(frozen=True)
class Verdict:
    """How one life ended."""

    kind: Literal["finished", "stopped", "failed", "lost"]
    cause: str = ""
    """One line for a person: which rank, what, which log to open."""
    retry: bool = True
    """Whether another life could do better; only looked at when ``kind`` is ``failed``."""


def verdict_of(exit_codes: Mapping[int, int], stop_requested: bool) -> Verdict:
    """The verdict from each rank's exit code (negative: killed by that signal, as ``Popen.returncode`` has it).

    ``stopped`` needs every rank to have agreed (85), or a stop that was asked for before a rank could answer.
    """
    codes = set(exit_codes.values())
    if codes == {0}:
        return Verdict("finished")
    if EXIT_DO_NOT_RETRY in codes:
        return Verdict("failed", _first(exit_codes, EXIT_DO_NOT_RETRY), retry=False)
    if codes == {EXIT_STOPPED}:
        return Verdict("stopped")
    bad = next((code for code in exit_codes.values() if code not in (0, EXIT_STOPPED)), EXIT_STOPPED)
    if stop_requested:
        return Verdict("stopped", f"without a save: {_first(exit_codes, bad)}")
    return Verdict("failed", _first(exit_codes, bad))


def _first(exit_codes: Mapping[int, int], code: int) -> str:
    rank = next(rank for rank, value in exit_codes.items() if value == code)
    return f"rank {rank} was killed by signal {-code}" if code < 0 else f"rank {rank} ended with {code}"


@dataclass(frozen=True)
class Lease:
    """Who may write into the run: one life at a time. A newer life takes it over; an older one may not commit any more.

    Each life has a file of its own and the newest that has one is the owner, so that no life can overwrite another's word.
    """

    life: int
    job_id: str | None
    host: str
    boot_id: str
    pid: int
    pid_start: int
    """Start time of the process in clock ticks since boot (field 22 of ``/proc/PID/stat``): with pid and boot id it names one process."""
    heartbeat: str


def take_lease(run: Run, life: int, job_id: str | None) -> Lease:
    """Errors: RuntimeError when a newer life holds it."""
    owner = _owner(run)
    if owner > life:
        raise RuntimeError(f"life {owner} holds the run, life {life} is older")
    pid = os.getpid()
    lease = Lease(life, job_id, socket.gethostname(), boot_id(), pid, process_start(pid) or 0, now())
    run.life(life).mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(run.lease_file(life), asdict(lease))
    return lease


def renew_lease(run: Run, lease: Lease) -> bool:
    """Write a new heartbeat; False when a newer life has taken over."""
    if not may_commit(run, lease.life):
        return False
    write_json(run.lease_file(lease.life), {**asdict(lease), "heartbeat": now()})
    return True


def read_lease(run: Run) -> Lease | None:
    """That of the newest life which has one."""
    try:
        return Lease(**json.loads(run.lease_file(_owner(run)).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def may_commit(run: Run, life: int) -> bool:
    """Whether no newer life has taken the run over; asked by the rank that is about to commit a checkpoint."""
    return _owner(run) <= life


def _owner(run: Run) -> int:
    """The newest life that has taken a lease; -1 before the first."""
    return max(_lives_with(run, "lease.json"), default=-1)


def is_process_alive(lease: Lease) -> bool | None:
    """Whether the process that holds the lease runs on this machine; None when it belongs to another host or boot."""
    if lease.host != socket.gethostname():
        return None
    if lease.boot_id != boot_id():
        return False
    return process_start(lease.pid) == lease.pid_start


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it does not run (or is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def now() -> str:
    """ISO 8601, UTC, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
