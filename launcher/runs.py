"""Run folders among run folders: created whole, found again by identity or by what a person types. Nothing is submitted here."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.errors import ActionError, UsageError
from launcher.files import digest, hash_file, write_json, write_text
from launcher.plan import Plan, write_plan
from launcher.run import Run, now
from launcher.shipped import PACKAGE
from launcher.slurm.tools import find_tools

_FORBIDDEN = re.compile(r"[:,%\\\x00-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""In a run folder's path: PYTHONPATH and binds split at ``:`` and ``,``, Slurm's log patterns read ``%`` and a backslash."""

_DATA_FOLDERS = ("templates", "containers", "presets")
"""Beside the code in a wheel; a run needs what was rendered from them, not them."""


class RunExists(ActionError):
    """Somebody else created this run between our look and our attempt."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"{run.root} was created by another submission just now", code="run-exists", hint="see ftlaunch status")
        self.run = run


def find_existing(plan: Plan, runs: Path) -> Run | None:
    """The newest run of this identity; None when there is none."""
    found = [run for run in _named(plan, runs) if _record(run).get("identity") == plan.identity]
    return max(found, key=lambda run: _number(run, plan), default=None)


def create_run(plan: Plan, files: Callable[[Run], Mapping[str, str]], preset_text: str, runs: Path, *, new: bool = False) -> Run:
    """Create the run folder, whole or not at all. ``files`` renders its files for the run that it is given (name → text).

    Errors: UsageError when the folder's path cannot be used, MissingError (4) when the site wants Slurm and this machine has none,
    RunExists when a run of this identity is there already (and not ``new``), ActionError when something else has its name.
    """
    runs = runs.expanduser().absolute()
    if bad := _FORBIDDEN.search(str(runs)):
        raise UsageError(f"the runs folder {str(runs)!r} holds {bad[0]!r}", code="runs-folder", hint="choose another with FTLAUNCH_RUNS")
    tools = find_tools() if plan.site["scheduler"] == "slurm" else {}
    runs.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        run = _free(plan, runs) if new else Run(runs / _base(plan))
        if run.root.exists():
            if new:  # made by somebody else since we looked for a free name
                continue
            if not run.record_file.is_file():
                hint = "remove it or move it away, or submit with --new"
                raise ActionError(f"{run.root} is in the way: it is no run, for it has no run.json", code="run-folder", hint=hint)
            raise RunExists(run)
        stage = Path(tempfile.mkdtemp(prefix=f".{run.id}.", dir=runs))  # mode 0700
        try:
            _fill(Run(stage), run, plan, files(run), preset_text, tools)
            os.rename(stage, run.root)
            return run
        except OSError as error:
            if not run.root.exists():
                raise ActionError(f"{run.root} could not be created: {error.strerror}", code="create-run") from error
            if not new:
                raise RunExists(run) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def find_run(runs: Path, text: str) -> Run:
    """By folder, id, unambiguous prefix, or ``last``. Errors: UsageError that names the candidates."""
    if "/" in text or (Path(text) / "run.json").is_file():
        run = Run(Path(text).expanduser().absolute())
        if not run.record_file.is_file():
            raise UsageError(f"{run.root} is not a run folder", code="no-run", hint="it has no run.json")
        return run
    there = [run for run in all_runs(runs) if text == "last" or run.id.startswith(text)]
    if text == "last" and there:
        return there[-1]
    exact = [run for run in there if run.id == text]
    if exact or len(there) == 1:
        return (exact or there)[0]
    known = ", ".join(run.id for run in there or all_runs(runs)[-5:])
    what = f"{text!r} could be {known}" if there else f"no run {text!r} in {runs}"
    raise UsageError(what, code="no-run", hint=None if there or not known else f"there are: {known}")


def all_runs(runs: Path) -> list[Run]:
    """Every run in a folder, in the order of creation."""
    found = [Run(record.parent) for record in runs.expanduser().absolute().glob("[!.]*/run.json")]
    return sorted(found, key=lambda run: (str(_record(run).get("created", "")), run.id))


def copy_code(target: Path) -> None:
    """Copy the code that runs now to ``target``, which must not exist: ``launcher/`` without caches."""

    def skipped(folder: str, names: list[str]) -> set[str]:
        data = _DATA_FOLDERS if Path(folder) == PACKAGE else ()
        return {name for name in names if name == "__pycache__" or name.endswith(".pyc") or name in data}

    shutil.copytree(PACKAGE, target, ignore=skipped)


def code_sha(run: Run) -> str:
    """SHA-256 over the files of ``code/launcher``: which code a life ran."""
    files = (path for path in run.code.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest({path.relative_to(run.code).as_posix(): hash_file(path) for path in files})


def _fill(stage: Run, run: Run, plan: Plan, files: Mapping[str, str], preset_text: str, tools: Mapping[str, str]) -> None:
    for name, text in files.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), name
        write_text(stage.root / name, text)
    write_text(stage.preset_file, preset_text)
    write_plan(plan, stage.plan_file())
    for folder in (stage.submitit, stage.checkpoints, stage.root / "lives", stage.code):
        folder.mkdir(mode=0o700)
    copy_code(stage.code / "launcher")
    record: dict[str, Any] = {
        "id": run.id,
        "identity": plan.identity,
        "name": plan.name,
        "site": plan.site["name"],
        "scheduler": plan.site["scheduler"],
        "created": now(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "version": __version__,
        "code": code_sha(stage),
        "python": sys.executable,
        "tools": dict(tools),
    }
    write_json(stage.record_file, record)


def _base(plan: Plan) -> str:
    return f"{plan.name}-{plan.identity[:8]}"


def _named(plan: Plan, runs: Path) -> list[Run]:
    """Whatever has the name of a run of this identity: also what is left of one that was removed while its job lived."""
    named = re.compile(rf"{re.escape(_base(plan))}(-\d+)?")
    return [Run(path) for path in runs.expanduser().absolute().glob(f"{_base(plan)}*") if named.fullmatch(path.name)]


def _number(run: Run, plan: Plan) -> int:
    return int(run.id[len(_base(plan)) + 1 :] or 1)


def _free(plan: Plan, runs: Path) -> Run:
    """The next run of this identity: the bare name, then ``-2``, ``-3``."""
    number = max((_number(run, plan) for run in _named(plan, runs)), default=0) + 1
    return Run(runs / (_base(plan) if number == 1 else f"{_base(plan)}-{number}"))


def _record(run: Run) -> dict[str, Any]:
    """What a run says of itself; nothing when its record cannot be read."""
    try:
        return run.record()
    except (OSError, ValueError, AssertionError):
        return {}
