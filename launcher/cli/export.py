"""``ftlaunch export``: what a run made, in a folder of one's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import options
from launcher.cli.show import out, say, show_json
from launcher.errors import UsageError


def export(
    run: options.RunName,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model: a model that needs no peft.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: the run's id in this folder.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="fp32|bf16|fp16", help="Of the weights. Default: as they are.")] = None,
    from_checkpoint: Annotated[
        str | None, typer.Option("--from", metavar="CHECKPOINT", help="epoch-2 or step-100 instead of the final model.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Copy out the final model or adapter with its tokenizer, ready for from_pretrained; merged or in another dtype if wanted."""
    from launcher.cli.operate import find
    from launcher.export import Wanted
    from launcher.export import export as export_run
    from launcher.submit import find_checkpoint

    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise UsageError(f"--dtype takes fp32, bf16 or fp16, not {dtype!r}", key="--dtype")
    found = find(run)
    step = None if from_checkpoint is None else find_checkpoint(found, from_checkpoint).step
    name = "-".join([found.id, *([from_checkpoint] if from_checkpoint else []), *(["merged"] if merge else [])])
    wanted = Wanted(merge, dtype, step)  # type: ignore[arg-type]  # mypy does not narrow a word to a Literal
    made = export_run(found, folder or Path.cwd() / name, wanted, python=sys.executable, environ=os.environ, say=say)
    if as_json:
        base = None if made.base is None else {"name": made.base.name, "revision": made.base.revision}
        show_json({"ok": True, "id": found.id, "folder": str(made.folder), "kind": made.kind, "base": base, "bytes": made.bytes})
        return
    needs = f", for {made.base.name}" if made.base is not None and made.kind == "adapter" else ""
    out().print(f"{made.folder}: {made.kind}{needs}, {made.bytes / 1e6:.1f} MB", markup=False)
