"""Variables of the environment in a site's folders, binds and values: ``$NAME`` and ``${NAME}``, replaced when the site is read."""

from __future__ import annotations

import re
from collections.abc import Mapping

_VARIABLE = r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))"


def with_variables(text: str, environ: Mapping[str, str], *, bind: bool = False) -> str:
    r"""``text`` with each variable's value in its place. ``bind``: ``\$`` is no variable, and what is special in a bind
    is escaped in the values.

    Errors: LookupError whose argument is the name of a variable that is not set or empty.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is None:
            return match[0]
        if not environ.get(name):
            raise LookupError(name)
        return re.sub(r"([:\\])", r"\\\1", environ[name]) if bind else environ[name]

    return re.sub(rf"\\.|{_VARIABLE}" if bind else _VARIABLE, replaced, text)
