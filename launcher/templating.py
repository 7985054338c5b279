"""The one jinja2 environment: undefined names are errors, and every value goes through a filter that says where it lands.

``{{ value | sh }}`` is one word for a POSIX shell (and for an ``#SBATCH`` line); ``{{ value | line }}`` is the rest of a line that no
shell reads. A test demands one of them in every expression of every shipped template.
"""

from __future__ import annotations

import shlex
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from launcher.errors import UsageError
from launcher.shipped import shipped


def render_template(name: str, *, own: Path | None = None, **values: Any) -> str:
    """Render ``templates/<name>``, or the user's own file in its place.

    Errors: UsageError when the user's template is missing or wrong, or when a value holds a control character.
    """
    folder, file = (own.parent, own.name) if own else (shipped("templates"), name)
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(sh=shell_word, line=one_line)
    try:
        return environment.get_template(file).render(**values)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UsageError(f"{error.__class__.__name__}: {error.message}", code="template", file=str(folder / file), line=line) from error


def shell_word(value: object) -> str:
    """``value`` as exactly one word of a POSIX shell. Errors: UsageError for control characters."""
    return shlex.quote(one_line(value))


def one_line(value: object) -> str:
    """``str(value)``. Errors: UsageError when it holds a control character, a line separator or a direction mark."""
    text = str(value)
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
            raise UsageError(f"control character U+{ord(character):04X} in {text!r}", code="control-character")
    return text
