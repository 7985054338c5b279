"""The command line that runs a program in an image, and the environment it may see. Standard library only (Python 3.9).

Ranks on a node do not call ``enter`` with an image they know: they start through ``launcher.image.rank``, which finds what their own
node unpacked. Everything that runs where the ``.sif`` itself is used (staging, verification) calls ``enter`` directly:

    subprocess.run(enter(container, image, ["python3", "-m", "launcher.stage", …], binds=[bind(code)], env={"PYTHONPATH": code}),
                   env=clean_environment(os.environ))
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.errors import UsageError
from launcher.plan import BIND, Container

_SYSTEM = "HOME LANG LOGNAME PATH SHELL TERM TZ USER http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY HF_TOKEN"
_RANK = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL"
_TRACKING = "WANDB_API_KEY WANDB_BASE_URL MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN"
KEPT_NAMES = frozenset([*_SYSTEM.split(), *_RANK.split(), *_TRACKING.split()])
"""What a process in a container sees of the host's environment, beside ``KEPT_PREFIXES``. Apptainer replaces PATH by the image's own."""

KEPT_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "PMI",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "NVIDIA_",
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "TORCH_",
    "PYTORCH_",
    "FTLAUNCH_",
)
"""Names that begin so are kept as well: the scheduler's, and what tunes network and arithmetic."""

_PART = r"(?:\\.|[^:\\])+"


def enter(
    container: Container,
    image: str,
    argv: Sequence[str],
    *,
    binds: Sequence[str] = (),
    env: Mapping[str, str] = {},
    gpus: bool = False,
    cwd: str | None = None,
) -> list[str]:
    """The argument list that runs ``argv`` in ``image`` (a ``.sif`` file or an unpacked folder).

    No home is mounted and no current folder; a folder is visible inside if ``container.binds`` or ``binds`` name it. ``binds`` are
    ``source[:target[:options]]``; make them with ``bind``, which escapes what is special. ``env`` is set inside (after
    ``container.env``, which it wins over) by ``env``(1), so values are taken as they are, never evaluated by a shell. Everybody on
    the node can read an argument list: a secret goes through the environment (``HF_TOKEN``). ``argv`` begins with ``python3``, a name
    that every image has. Run it with ``env=clean_environment(os.environ)``.

    Errors: UsageError when a bind is not of that form.
    """
    command = [container.command, "exec", "--no-home", "--no-mount", "cwd", "--no-eval"]
    if gpus:
        command.append("--nv")
    for value in (*container.binds, *binds):
        command += mount(value)
    if cwd is not None:
        command += ["--pwd", cwd]
    inside = {"PYTHONNOUSERSITE": "1", **container.env, **env}
    return [*command, image, "env", *(f"{name}={value}" for name, value in inside.items()), *argv]


def bind(source: str, target: str | None = None, *, read_only: bool = False) -> str:
    """A bind for ``enter``, with ``:`` in the paths escaped. ``target`` is ``source`` unless given."""
    parts = [re.sub(r"([:\\])", r"\\\1", part) for part in (source, target or source)]
    return ":".join([*parts, "ro"] if read_only else parts)


def mount(value: str) -> list[str]:
    """The option for one bind ``source[:target[:options]]``.

    As ``--mount``, whose fields can be quoted: ``--bind`` drops spaces beside an escaped character, and takes a comma for the end.
    Errors: UsageError.
    """
    if not BIND.fullmatch(value):
        hint = "source[:target[:options]], absolute paths, \\: for a colon in a path"
        raise UsageError(f"{value!r} is not a bind", code="bind", key="binds", hint=hint)
    source, *rest = (re.sub(r"\\(.)", r"\1", part) for part in re.findall(_PART, value))
    target, options = [*rest, *[source, ""][len(rest) :]]
    kept = [option for option in options.split(",") if option not in ("", "rw")]
    fields = ["type=bind", f"source={source}", f"destination={target}", *kept]
    return ["--mount", ",".join('"' + field.replace('"', '""') + '"' if re.search('[",]', field) else field for field in fields)]


def apptainer_folders(scratch: Path) -> dict[str, str]:
    """Environment in which Apptainer, under each of its names, writes what is temporary, and what it keeps, to ``scratch`` and not to a
    home or to /tmp.
    """
    return {f"{name}_{what}": str(scratch) for name in ("APPTAINER", "SINGULARITY") for what in ("TMPDIR", "CACHEDIR")}


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What of ``environ`` reaches a container: a list of what is kept, since what a login shell exports is without end.

    PYTHONPATH, LD_LIBRARY_PATH, LD_PRELOAD, APPTAINER_*, SINGULARITY_*, TMPDIR, SSL_* and virtual environments stay outside: they name
    files of the host. What is needed inside is given as ``env`` of ``enter``.
    """
    return {name: value for name, value in environ.items() if name in KEPT_NAMES or name.startswith(KEPT_PREFIXES)}
