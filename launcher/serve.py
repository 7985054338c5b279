"""Being a child process of a command, in the container or not: a request in, an answer out. ``launcher.stage.child`` starts it.

Standard library only (Python 3.9).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import ActionError, FtlaunchError

Say = Callable[[str], None]
"""Takes one line of progress."""
Work = Callable[[dict[str, Any], Say], dict[str, Any]]

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def serve(work: Work, doing: str = "staging") -> int:
    """The main function of a child: request in, answer out, no traceback outside the log. Gives the exit code.

    ``doing``: what is said to have failed.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print belongs into the log
    if not sys.stdin.isatty():  # somebody trying it by hand has no parent to die with
        threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        answers.write(_redact(json.dumps(message)) + "\n")
        answers.flush()

    try:
        request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        send(result=work(request, lambda text: send(progress=text)))
        return 0
    except FtlaunchError as error:
        send(error={"class": type(error).__name__, "findings": [finding.to_json() for finding in error.findings]})
        return error.exit_code
    except Exception as error:
        sys.stderr.write(_redact(traceback.format_exc()))
        failure = _action_error(error, doing)
        send(error={"class": "ActionError", "findings": [finding.to_json() for finding in failure.findings]})
        return failure.exit_code


def _end_with_parent() -> None:
    """The parent holds the other end of stdin and never writes: end of file means that it is gone, however it went."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _action_error(error: Exception, doing: str) -> ActionError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ActionError(f"no space left, {doing} failed: {error.strerror}", file=error.filename, code="disk-full")
    if isinstance(error, MemoryError):
        return ActionError(f"memory ran out, {doing} failed", code="out-of-memory")
    if isinstance(error, ImportError):
        return ActionError(
            f"{doing} failed: the interpreter lacks a package: {error}", code="missing-package", hint="pip install 'ftlaunch[train]'"
        )
    return ActionError(f"{doing} failed: {type(error).__name__}: {_first_line(str(error))}")


def _redact(text: str) -> str:
    for name in TOKENS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"<{name}>")
    return text


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:500]
