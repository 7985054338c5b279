"""Options that several commands share; the sbatch-named ones carry sbatch's names."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.errors import UsageError

Preset = Annotated[str, typer.Argument(metavar="PRESET", help="A file, or the name of a shipped preset.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="An id, the beginning of one, 'last', or a folder.")]
Site = Annotated[str | None, typer.Option("--site", metavar="SITE", help="A site file, or the name of one.")]
Sites = Annotated[str | None, typer.Option("--site", metavar="SITE[,SITE…]", help="A site file, or the name of one; several are compared.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value: training.epochs=1.")]
UseFlashAttn = Annotated[bool, typer.Option("--use_flash_attn", "--use-flash-attn", help="FastCode's name of --set attention=flash2.")]
UseXformerAttn = Annotated[
    bool, typer.Option("--use_xformer_attn", "--use-xformer-attn", help="FastCode's name of --set attention=xformers.")
]
Allow = Annotated[list[str] | None, typer.Option("--allow", metavar="GATE", help="Override a gate: memory, driver or time.")]
On = Annotated[str | None, typer.Option("--on", metavar="here|slurm", help="Do it here, or in a job. Default: as the site says.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Follow = Annotated[bool, typer.Option("--follow", help="Stay and show the progress.")]

Account = Annotated[str | None, typer.Option("--account", "-A", help="Slurm account.")]
Partition = Annotated[str | None, typer.Option("--partition", "-p", help="Slurm partition.")]
Qos = Annotated[str | None, typer.Option("--qos", help="Slurm quality of service.")]
Time = Annotated[str | None, typer.Option("--time", "-t", help="Walltime of one life: 48h, 90m, 1-12:00:00.")]
Constraint = Annotated[str | None, typer.Option("--constraint", "-C", help="Node features.")]
Reservation = Annotated[str | None, typer.Option("--reservation", help="Slurm reservation.")]
Nodes = Annotated[int | None, typer.Option("--nodes", "-N", help="Nodes.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="GPUs per node.")]


def with_attention(settings: list[str] | None, *, use_flash_attn: bool, use_xformer_attn: bool) -> list[str]:
    """The settings with what FastCode's flags say. Errors: UsageError for both at once."""
    if use_flash_attn and use_xformer_attn:
        message = "--use_flash_attn and --use_xformer_attn exclude each other"
        raise UsageError(message, code="two-attentions", key="attention", hint="one of them")
    chosen = ["attention=flash2"] if use_flash_attn else ["attention=xformers"] if use_xformer_attn else []
    return [*(settings or []), *chosen]


def sbatch(
    account: str | None,
    partition: str | None,
    qos: str | None,
    time: str | None,
    constraint: str | None,
    reservation: str | None,
    nodes: int | None,
    gpus: int | None,
) -> dict[str, str | int | None]:
    """The sbatch-named options by name."""
    return dict(locals())
