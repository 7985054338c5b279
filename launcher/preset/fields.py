"""Field types that the schemas share: patterns that keep shell, newlines and control characters out, durations, sizes."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from launcher.plan import BIND


class Frozen(BaseModel):
    """Base of every schema: unknown keys are errors, values are never written into, ill-typed values are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Names of presets, hardware, sites, stacks, partitions, accounts: letters, digits, ``.``, ``_``, ``-``; at most 64."""

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9@%+=:,./|&*\[\]_-]{0,254}$")]
"""One argument for a Slurm option: constraints, node lists, mail addresses. No space, quote, ``$`` or control character."""

Partitions = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(,[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})*$", max_length=255)
]
"""A partition, or several with commas between: Slurm takes the one that starts first."""

Text = Annotated[
    str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]*$", max_length=4096)
]
"""Free text on one line: no control characters, line separators or direction marks."""


def _bind(value: str) -> str:
    if not BIND.fullmatch(re.sub(r"(^|:)\$", r"\1/", value)):
        raise ValueError(f"{value!r} is no bind; write source[:target[:options]], paths absolute or beginning with $VARIABLE")
    return value


Bind = Annotated[Text, AfterValidator(_bind)]
"""A folder or file that a container sees."""

EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

_DURATION = re.compile(
    r"^(?:(?P<days>\d{1,9})-)?(?P<hours>\d{1,9}):(?P<minutes>[0-5]?\d)(?::(?P<seconds>[0-5]?\d))?$|^(?P<number>\d{1,9}(?:\.\d{1,9})?)\s*(?P<unit>[smhd])$"
)


MAX_DAYS = 366


def duration_min(value: Any) -> Any:
    """Minutes from ``48h``, ``90m``, ``2d``, ``1-12:00:00`` or ``24:00:00`` (Slurm's days-hours:minutes:seconds), rounded up.

    A bare number is refused: nobody agrees on its unit. Errors: ValueError.
    """
    if type(value) is int and value > 0:
        raise ValueError(f"{value} has no unit: write {value}m or {value}h, or 'days-hours:minutes:seconds'")
    if not isinstance(value, str):
        raise ValueError("write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'")
    match = _DURATION.match(value.strip())
    if match is None:
        raise ValueError(f"{value[:60]!r} is not a duration: write 48h, 90m, 2d or 'days-hours:minutes:seconds'")
    if match["unit"]:
        seconds = float(match["number"]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match["unit"]]
    else:
        parts = {name: int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds")}
        seconds = ((parts["days"] * 24 + parts["hours"]) * 60 + parts["minutes"]) * 60 + parts["seconds"]
    if seconds <= 0:
        raise ValueError("a duration must be above zero")
    if seconds > MAX_DAYS * 86400:
        raise ValueError(f"a duration must be at most {MAX_DAYS}d")
    return int(-(-seconds // 60))


def slurm_time(minutes: int) -> str:
    """``D-HH:MM:00`` as sbatch takes it."""
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:00"


def duration_text(minutes: int) -> str:
    """Minutes as this schema reads them back: ``48h``, ``90m``."""
    return f"{minutes // 60}h" if minutes % 60 == 0 else f"{minutes}m"


def _keep_duration(value: Any) -> Any:
    return duration_text(duration_min(value))


DURATION_PATTERN = r"^\s*(([0-9]+-)?[0-9]+:[0-5]?[0-9](:[0-5]?[0-9])?|[0-9]+(\.[0-9]+)?\s*[smhd])\s*$"
SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*[MGT]i?B\s*$"

Duration = Annotated[str, BeforeValidator(_keep_duration), WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN})]
"""A duration above zero, kept as text with its unit; ``duration_min`` gives minutes."""

_SIZE = re.compile(r"^(?P<number>\d{1,9}(?:\.\d{1,9})?)\s*(?P<unit>[MGT]i?B)$")
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def size_gib(value: Any) -> Any:
    """Whole GiB from ``80GiB``, ``80GB``, ``1.5TiB``, rounded up; a number is GiB already. Errors: ValueError."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value.strip())
    if match is None:
        raise ValueError(f"{value[:60]!r} is not a size: write 80 (GiB), or 80GiB, 80GB, 1.5TiB")
    return math.ceil(float(match["number"]) * _BYTES[match["unit"]] / 2**30)


SizeGib = Annotated[
    int,
    BeforeValidator(size_gib),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": SIZE_PATTERN}]}),
]
"""GiB as a number, or a size with its unit."""
