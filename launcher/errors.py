"""The errors that a user can meet, and their exit codes. Standard library only.

    FtlaunchError
    ├── UsageError      2   the preset or the command line is wrong
    ├── GateError       3   a gate refused: does not fit, driver too old, time, disk
    ├── MissingError    4   something the command needs is missing on this machine
    ├── ActionError     5   submission, build or staging failed
    ├── RunFailed       6   the run failed
    └── RunStopped      7   the run was stopped and can be resumed

Ranks (processes of the training) end with 0, ``EXIT_STOPPED`` or ``EXIT_DO_NOT_RETRY``; anything else is a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

EXIT_STOPPED = 85
"""A rank saved a checkpoint (or had nothing to save) and stopped because it was asked to."""

EXIT_DO_NOT_RETRY = 93
"""A rank met something that another life would meet again: configuration, wrong device count, no checkpoint that verifies."""

Level = Literal["error", "warning", "advice"]


@dataclass(frozen=True)
class Finding:
    """One thing to say about a preset, a site or a machine: where, what, and what would be right."""

    level: Level
    code: str
    """Short and stable, for programs: ``unknown-key``, ``driver-too-old``."""
    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    """Dotted path of the value: ``training.learning_rate``."""
    hint: str | None = None
    """What would be right, or the command to type next."""
    column: int | None = None
    """Of the key, from 1."""

    def __str__(self) -> str:
        place = [part for part in (self.file, self.line, self.column) if part]
        where = f"{':'.join(map(str, place))}: " if self.file else ""
        key = f"{self.key}: " if self.key else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{where}{key}{self.message}{hint}"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class FtlaunchError(Exception):
    """Every error meant for a user. Carries one finding or more; ``str()`` gives one line for each."""

    exit_code = 1
    default_code = "error"

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        hint: str | None = None,
        column: int | None = None,
        findings: Sequence[Finding] = (),
    ) -> None:
        own = Finding("error", code or self.default_code, message, file, line, key, hint, column)
        self.findings: tuple[Finding, ...] = tuple(findings) or (own,)
        super().__init__("\n".join(str(finding) for finding in self.findings))


class UsageError(FtlaunchError):
    exit_code = 2
    default_code = "usage"


class GateError(FtlaunchError):
    exit_code = 3
    default_code = "gate"


class MissingError(FtlaunchError):
    exit_code = 4
    default_code = "missing"


class ActionError(FtlaunchError):
    exit_code = 5
    default_code = "action-failed"


class RunFailed(FtlaunchError):
    exit_code = 6
    default_code = "run-failed"


class RunStopped(FtlaunchError):
    exit_code = 7
    default_code = "run-stopped"
