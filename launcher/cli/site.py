"""Commands about clusters: site discover."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import options
from launcher.cli.show import say, show_json, show_text

if TYPE_CHECKING:
    from launcher.preset.hardware import Hardware

app = typer.Typer(help="Facts of a cluster.", no_args_is_help=True)


@app.callback()
def site() -> None:
    """Facts of a cluster."""


@app.command()
def discover(
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of the site; default: what Slurm calls the cluster.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the site file here instead of the screen.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
    as_json: options.Json = False,
) -> None:
    """A site file from what Slurm and this machine say. Asks a handful of questions, submits nothing."""
    import os
    import re
    import shutil
    from datetime import date

    from launcher.errors import UsageError
    from launcher.files import write_text
    from launcher.site.ask import ask_cluster
    from launcher.site.conclude import conclude
    from launcher.site.machine_facts import look, user_name
    from launcher.site.site_file import site_text
    from launcher.site.trial import try_requests

    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError("a site's name is letters, digits, '.', '_' and '-', at most 64", code="wrong-value", key="--name")
    if out is not None and out.exists() and not force:
        raise UsageError("exists already", code="exists", file=str(out), hint="--force writes over it")
    cluster = ask_cluster(user_name())
    today = date.today().isoformat()
    draft = conclude(cluster, look(os.environ, Path.home()), known_gpus(), name=name, today=today)
    if (sbatch := shutil.which("sbatch")) is not None:
        try_requests(draft, sbatch, today=today)
    text = site_text(draft)
    for command, reason in cluster.failed.items():
        say(f"{command}: {reason}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text, mode=0o644)
        say(f"{out}: {len(draft.unknown)} facts are unknown, see the end of it; next: ftlaunch doctor --site {out}")
    if as_json:
        site = {**draft.values, "unknown": draft.unknown, "sources": draft.sources}
        show_json({"ok": True, "file": None if out is None else str(out), "site": site, "notes": draft.notes, "text": text})
    elif out is None:
        show_text(text)


def known_gpus() -> list[Hardware]:
    """The hardware files that can be read, with a GPU: the user's and the shipped ones."""
    from launcher.errors import UsageError
    from launcher.preset.reading import known_hardware, read_hardware

    found = []
    for name in known_hardware():
        try:
            found.append(read_hardware(name).value)
        except UsageError as error:
            say(str(error))
    return [one for one in found if one.gpu is not None]
