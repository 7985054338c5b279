"""What several places may say, decided once: the site, Slurm's options, the folders. Each with the place that decided.

Everything that is asked of the machine comes as an argument: environment, home, working folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from launcher.errors import UsageError
from launcher.preset.complaints import shown
from launcher.preset.config import UserConfig
from launcher.preset.reading import COMMAND_LINE, SET, Loaded
from launcher.preset.schema import Preset, Slurm
from launcher.preset.site import Site
from launcher.preset.variables import with_variables

SLURM_KEYS = ("account", "partition", "qos", "time", "constraint", "reservation", "exclude", "mail")
SLURM_ENVIRONMENT = {"account": "SBATCH_ACCOUNT", "partition": "SBATCH_PARTITION", "qos": "SBATCH_QOS"}


@dataclass(frozen=True)
class Chosen:
    value: str
    source: str
    """Where the value comes from: ``command line``, a file with line and column, an environment variable, the site."""


@dataclass(frozen=True)
class Folders:
    """Absolute; they need not exist yet."""

    runs: Path
    images: Path
    data: Path


def choose_site(option: str | None, *, environ: Mapping[str, str], config: Loaded[UserConfig] | None, preset: Loaded[Preset]) -> Chosen:
    """``--site``, ``$FTLAUNCH_SITE``, the user's configuration, the preset, else ``local``."""
    if option:
        return Chosen(option, "--site")
    if environ.get("FTLAUNCH_SITE"):
        return Chosen(environ["FTLAUNCH_SITE"], "$FTLAUNCH_SITE")
    if config is not None and config.value.site is not None:
        return Chosen(config.value.site, _place(config, "site"))
    if preset.value.site is not None:
        return Chosen(preset.value.site, _place(preset, "site"))
    return Chosen("local", "default")


def choose_slurm(
    preset: Loaded[Preset],
    site: Site,
    *,
    environ: Mapping[str, str],
    config: Loaded[UserConfig] | None,
    suits: Sequence[str] = (),
) -> dict[str, Chosen]:
    """Slurm's options: command line, preset, the user's configuration, ``SBATCH_*`` of the environment, the site; empty without Slurm.

    ``suits``: the partitions that suit the preset's hardware; one alone is taken where nobody names one. What the partition that it came to
    says of constraint and QoS holds where nobody else says any, before the site's own default.
    Errors: UsageError when a variable of the environment holds what no such option can be.
    """
    if site.scheduler == "none":
        return {}
    defaults = {"account": site.default_account, "partition": site.default_partition, "qos": site.default_qos}
    chosen: dict[str, Chosen] = {}
    for key in SLURM_KEYS:
        typed, own = getattr(preset.value.slurm, key), None if config is None else getattr(config.value.slurm, key)
        variable = SLURM_ENVIRONMENT.get(key, "")
        if typed is not None:
            chosen[key] = Chosen(typed, _place(preset, f"slurm.{key}"))
        elif own is not None:
            assert config is not None
            chosen[key] = Chosen(own, _place(config, f"slurm.{key}"))
        elif environ.get(variable):
            chosen[key] = Chosen(_checked(key, environ[variable], variable), f"${variable}")
        elif key == "partition" and site.default_partition is None and len(suits) == 1:
            chosen[key] = Chosen(suits[0], f"site {site.name}: the partition that suits")
        elif (said := _of_partition(key, site, chosen)) is not None:
            chosen[key] = Chosen(said, f"site {site.name}, partition {chosen['partition'].value}")
        elif (value := defaults.get(key)) is not None:
            chosen[key] = Chosen(value, f"site {site.name}")
    return chosen


def with_partition(chosen: Mapping[str, Chosen], site: Site, partition: str) -> dict[str, str]:
    """The options as they would be with another partition: what the site says for one partition does not hold for another."""
    own = f"site {site.name}, partition "
    kept = {key: one for key, one in chosen.items() if key != "partition" and not one.source.startswith(own)}
    there = {"partition": Chosen(partition, "")}
    said = {key: value for key in ("constraint", "qos") if (value := _of_partition(key, site, there)) is not None}
    default_qos = {} if site.default_qos is None else {"qos": site.default_qos}
    return {"partition": partition, **default_qos, **said, **{key: one.value for key, one in kept.items()}}


def choose_folders(site: Site, *, environ: Mapping[str, str], home: Path, cwd: Path) -> Folders:
    """``$FTLAUNCH_RUNS``, ``$FTLAUNCH_IMAGES``, ``$FTLAUNCH_DATA``, else the site's, else, only without Slurm, ``./runs`` and
    the user's cache folder.

    Errors: UsageError when a Slurm site leaves one open or puts it into home (links are followed), or names a variable that is not set.
    """
    cache_home = Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "ftlaunch"
    defaults = {"runs": cwd / "runs", "images": cache_home / "images", "data": cache_home / "data"}
    found: dict[str, Path] = {}
    missing: list[str] = []
    inside: list[str] = []
    for name, default in defaults.items():
        variable = environ.get(f"FTLAUNCH_{name.upper()}")
        said = variable or _expanded(getattr(site, name), name, site, environ, home)
        if said:
            found[name] = cwd / said
            if not variable and site.scheduler == "slurm" and found[name].resolve().is_relative_to(home.resolve()):
                inside.append(name)
        elif site.scheduler == "none":
            found[name] = default
        else:
            missing.append(name)
    if missing:
        raise _no_folders(f"site {site.name} says no folder for {', '.join(missing)}", missing, site, environ)
    if inside:
        why = "whose quota a model fills"
        raise _no_folders(f"site {site.name} puts {', '.join(inside)} into home {home}, {why}", inside, site, environ)
    return Folders(found["runs"], found["images"], found["data"])


def _no_folders(message: str, names: Sequence[str], site: Site, environ: Mapping[str, str]) -> UsageError:
    place = "$SCRATCH/ftlaunch" if environ.get("SCRATCH") else "/FOLDER/ON/THE/SHARED/FILE/SYSTEM"
    lines = "; ".join(f"{name}: {place}/{name}" for name in names)
    variables = ", ".join(f"$FTLAUNCH_{name.upper()}" for name in names)
    file = f"your file of the site, or into a new ~/.config/ftlaunch/sites/NAME.yaml below 'extends: {site.name}'"
    return UsageError(message, code="no-folders", key=names[0], hint=f"write into {file}: {lines}; or set {variables}")


def _of_partition(key: str, site: Site, chosen: Mapping[str, Chosen]) -> str | None:
    partition = site.partitions.get(chosen["partition"].value) if "partition" in chosen else None
    said = {} if partition is None else {"constraint": partition.constraint, "qos": partition.qos}
    return said.get(key)


def _place(loaded: Loaded[Preset] | Loaded[UserConfig], key: str) -> str:
    where = loaded.where(key)
    if where.file in (SET, COMMAND_LINE):
        return COMMAND_LINE
    return str(where)


def _checked(key: str, value: str, variable: str) -> str:
    try:
        Slurm.model_validate({key: value})
    except ValidationError:
        raise UsageError(f"${variable} is {shown(value)}, which is no {key}", code="wrong-value", key=f"slurm.{key}") from None
    return value


def _expanded(text: str | None, name: str, site: Site, environ: Mapping[str, str], home: Path) -> str | None:
    if text is None:
        return None
    try:
        full = with_variables(text, environ)
    except LookupError as error:
        raise UsageError(f"site {site.name}: {name}: {text}: ${error.args[0]} is not set", code="no-variable", key=name) from None
    return str(home / full[2:]) if full.startswith("~/") else full
