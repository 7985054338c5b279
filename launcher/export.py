"""The result of a run, copied out of its folder: the final model or a checkpoint, as it is or merged, with its tokenizer.

What needs torch is done by ``launcher.train.export`` in a process of its own, in the run's image where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.base_model import BASE_MODEL, BaseModel, base_of, fingerprint, read_base, write_base
from launcher.checkpoint import verify
from launcher.errors import ActionError, MissingError, UsageError
from launcher.files import write_json
from launcher.plan import Plan, Staged
from launcher.run import Run
from launcher.stage.child import Where
from launcher.supported import TOKENIZER_FILES

Dtype = Literal["fp32", "bf16", "fp16"]

LEFT_BEHIND = ("README.md", "training_args.bin")
"""Of a final model: a card that peft writes and nobody filled in, with paths of the machine that trained."""


@dataclass(frozen=True)
class Wanted:
    merge: bool = False
    dtype: Dtype | None = None
    """Of the weights that are written. None: the final model's own, or for a merged one the base model's."""
    step: int | None = None
    """The checkpoint of this step instead of the final model."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    kind: Literal["model", "adapter", "merged"]
    base: BaseModel | None
    """What an adapter needs below it; None for a whole model."""
    bytes: int


def export(
    run: Run, folder: Path, wanted: Wanted, *, python: str, environ: Mapping[str, str], say: Callable[[str], None] = lambda line: None
) -> Exported:
    """Write ``folder``, which must not exist yet, whole or not at all.

    ``python``: the interpreter for what needs torch where the run has no container. Errors: UsageError when there is nothing to export or
    the wish makes no sense, MissingError when this machine lacks what it needs, ActionError, RunFailed when files are damaged.
    """
    plan = run.plan(run.lives_started())
    adapter = None if plan.preset["adapter"] == "none" else plan.preset["adapter"]
    _require_sense(run, adapter, wanted)
    source = _source(run, wanted.step)
    folder = folder.expanduser().absolute()
    if folder.exists():
        raise UsageError(f"{folder} is there already", code="out-exists", key="--out", hint="name a folder that is not there yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    made = stage / "model"
    try:
        base = None if adapter is None else _base(run, plan)
        if wanted.step is None and not wanted.merge and wanted.dtype is None:
            say(f"copying {source}")
            shutil.copytree(source, made, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        else:
            _write(run, plan, adapter, source, made, stage, wanted, Process(python, environ, say))
        _tokenizer([source, Path(_staged(plan).model)], made)
        if base is not None and not wanted.merge:
            _name_base(made, base)
        _readable(made)
        os.rename(made, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    kind: Literal["model", "adapter", "merged"] = "model" if adapter is None else "merged" if wanted.merge else "adapter"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(folder, kind, base, size)


@dataclass(frozen=True)
class Process:
    """How the part that needs torch is started."""

    python: str
    environ: Mapping[str, str]
    say: Callable[[str], None]


def _require_sense(run: Run, adapter: Mapping[str, Any] | None, wanted: Wanted) -> None:
    if wanted.merge and adapter is None:
        raise UsageError(f"{run.id} trained all weights: there is nothing to merge", code="nothing-to-merge", key="--merge")
    if wanted.dtype is not None and adapter is not None and not wanted.merge:
        message = "an adapter stays in the fp32 that it was trained in"
        raise UsageError(message, code="adapter-dtype", key="--dtype", hint="--merge writes a whole model in that dtype")


def _source(run: Run, step: int | None) -> Path:
    if step is not None:
        problem = verify(run.checkpoint(step))
        if problem is not None:
            raise ActionError(f"the checkpoint is damaged: {problem}", code="bad-checkpoint", hint="--from another one")
        return run.checkpoint(step)
    if not run.model.is_dir():
        message = f"{run.id} has no final model"
        hint = f"when it is finished: ftlaunch status {run.id}; a checkpoint of it: --from epoch-1"
        raise UsageError(message, code="no-model", hint=hint)
    return run.model


def _staged(plan: Plan) -> Staged:
    assert plan.staged is not None, "what was trained was staged before"
    return plan.staged


def _base(run: Run, plan: Plan) -> BaseModel:
    """What the run noted; of a run that has no note yet, what lies there now."""
    found = read_base(run.root)
    return base_of(plan, _staged(plan)) if found is None else found


def _write(
    run: Run, plan: Plan, adapter: Mapping[str, Any] | None, source: Path, made: Path, stage: Path, wanted: Wanted, process: Process
) -> None:
    """What a copy does not do, in a process that has torch."""
    container, base = plan.container, Path(_staged(plan).model)
    if container.use == "apptainer" and not Path(container.image or "").is_file():
        message = f"the run's image {container.image} is not here any more, and export needs its torch"
        raise MissingError(message, code="no-image", hint="ftlaunch build the run's preset")
    if not base.is_dir():
        raise MissingError(f"the model that the run started from is not here any more: {base}", code="no-base", hint="ftlaunch stage")
    if wanted.merge and fingerprint(base) != _base(run, plan).weights:
        message = f"the weights in {base} are not those that the adapter was trained on"
        raise ActionError(message, code="other-base", hint=f"{run.root / BASE_MODEL} says which they were")
    request = {
        "source": str(source),
        "is_checkpoint": wanted.step is not None,
        "base": str(base),
        "folder": str(made),
        "adapter": adapter,
        "merge": wanted.merge,
        "dtype": wanted.dtype,
        "trained_dtype": "bf16" if plan.preset["training"]["dtype"] == "bf16_pure" else "fp32",
    }
    where = Where(container, process.python, process.environ, stage, process.say)
    log = run.root / "export.log"
    where.run("train.export", request, scratch=stage / "scratch", log=log, reads=[run.root, base], doing="the export")


def _tokenizer(places: list[Path], made: Path) -> None:
    """From the first place that has one: a final model has its own, a checkpoint none."""
    for place in places:
        found = [name for name in TOKENIZER_FILES if (place / name).exists()]
        for name in found:
            shutil.copyfile(place / name, made / name)
        if found:
            return


def _name_base(made: Path, base: BaseModel) -> None:
    """By its name and commit, where it has them: the path of this machine is of no use elsewhere."""
    write_base(base, made)
    config = json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(made / "adapter_config.json", {**config, "base_model_name_or_path": base.name, "revision": base.revision or None})


def _readable(made: Path) -> None:
    """With the rights that the user's other files get, not those of a private temporary folder."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [made, *made.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
