"""The command line: the only place that prints results or chooses an exit code. Results go to stdout, progress to stderr."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from launcher.cli import before, bench, doctor, export, facts, operate, site
from launcher.cli.show import show_error
from launcher.errors import ActionError, FtlaunchError

app = typer.Typer(
    name="ftlaunch",
    help="From one YAML file to a fine-tuned code model on a Slurm cluster, in a container.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    before.check, before.render, before.build, before.stage,
    facts.presets, facts.schema,
    operate.submit, operate.status, operate.logs, operate.cancel, operate.resume, operate.report,
    export.export,
    bench.bench,
    doctor.doctor,
):  # fmt: skip
    app.command()(command)
app.command(hidden=True)(before.prepare)
app.add_typer(site.app, name="site")


def main() -> None:
    """The one exit point: every error for users becomes one line for each finding and its class's exit code."""
    try:
        app()
    except OSError as error:  # a folder that cannot be made, a full disk: no bug of ours, so no traceback
        _leave(ActionError(error.strerror or str(error), code="file-system", file=error.filename and str(error.filename)))
    except FtlaunchError as error:
        _leave(error)


def _leave(error: FtlaunchError) -> NoReturn:
    show_error(error, as_json="--json" in sys.argv)
    sys.exit(error.exit_code)
