"""The one line that every command is a prefix of: read → plan → image → stage → plan again → render → create → submit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from launcher.cli.show import say, show_findings
from launcher.errors import Finding, GateError, UsageError
from launcher.hardware.fits import Observed
from launcher.plan import Container, Plan, Staged
from launcher.preset.choose import SLURM_KEYS, Chosen, Folders, choose_folders, choose_site, choose_slurm
from launcher.preset.complaints import shown
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.partition import node_for, nodes_of, partition_findings, suiting
from launcher.preset.reading import (
    Loaded,
    locate,
    model_facts,
    read_config,
    read_hardware,
    read_preset,
    read_site,
    read_stack,
    shipped_presets,
)
from launcher.preset.schema import OwnImage, Preset
from launcher.preset.site import Site
from launcher.preset.stack import Stack
from launcher.run import Run
from launcher.shipped import shipped

T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    preset: str
    site: str | None = None
    settings: tuple[str, ...] = ()
    options: Mapping[str, str | int | None] | None = None
    """sbatch's names → values; None where not given."""
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """Everything that was read. Nothing was decided and nothing written yet."""

    wish: Wish
    preset: Loaded[Preset]
    hardware: Loaded[Hardware]
    site: Loaded[Site]
    stack: Loaded[Stack] | None
    """None for an image that the user brings."""
    facts: ModelFacts | None
    slurm: Mapping[str, Chosen]
    site_source: str = "default"
    """Who chose the site."""
    suits: tuple[str, ...] = ()
    """Partitions of the site that suit the preset's hardware best."""
    nodes: Mapping[str, Hardware] = field(default_factory=dict)
    """Partition → its node, where the site describes it."""

    @property
    def folders(self) -> Folders:
        """Errors: UsageError where a Slurm site says none."""
        return folders_of(self.site.value)

    @property
    def partition(self) -> str | None:
        return self.slurm["partition"].value if "partition" in self.slurm else None

    @property
    def node(self) -> Hardware:
        """What is planned for: the partition's node where the site describes it, else ``hardware``."""
        return node_for(self.preset.value, self.hardware.value, self.site.value, self.partition, self.nodes)


def read(wish: Wish) -> Line:
    """Read the preset and what it names. Errors: UsageError with everything that is wrong."""
    for gate in wish.allowed:
        if gate not in ("memory", "driver", "time"):
            raise UsageError(f"no gate of the name {shown(gate)}", code="unknown-gate", key="--allow", hint="memory, driver or time")
    options = {f"slurm.{key}" if key in SLURM_KEYS else key: value for key, value in (wish.options or {}).items()}
    preset = read_preset(wish.preset, settings=wish.settings, options=options)
    config = read_config()
    chosen = choose_site(wish.site, environ=os.environ, config=config, preset=preset)
    at = preset.where("site") if chosen.source == str(preset.where("site")) else None
    named = preset.value.stack
    findings: list[Finding] = []
    site = _tried(lambda: _with_absolute_template(read_site(chosen.value, at=at, environ=os.environ)), findings)
    hardware = _tried(lambda: read_hardware(preset.value.hardware, at=preset.where("hardware")), findings)
    stack = None if isinstance(named, OwnImage) else _tried(lambda: read_stack(named, at=preset.where("stack")), findings)
    if site is None or hardware is None or findings:
        raise UsageError(findings=findings)
    nodes = nodes_of(site.value, lambda name: read_hardware(name).value)
    suits = tuple(suiting(preset.value, hardware.value, site.value, nodes))
    slurm = choose_slurm(preset, site.value, environ=os.environ, config=config, suits=suits)
    return Line(wish, preset, hardware, site, stack, model_facts(preset.value), slurm, chosen.source, suits, nodes)


def _tried(read: Callable[[], T], findings: list[Finding]) -> T | None:
    """What is read, or None and its findings, so that all that is wrong is said at once."""
    try:
        return read()
    except UsageError as error:
        findings.extend(error.findings)
        return None


def planned(
    line: Line, container: Container | None = None, staged: Staged | None = None, observed: Observed | None = None
) -> tuple[Plan, list[Finding]]:
    """The plan and what there is to say about it, each finding with its place in the preset, and each refusal with what would pass.

    ``observed``: default, what is seen on this machine.
    """
    from launcher.cli.replan import remedied
    from launcher.planner import make_plan

    container, observed = container or expected_container(line), observed or observed_here(line)
    plan, findings = make_plan(
        line.preset.value,
        line.node,
        line.site.value,
        None if line.stack is None else line.stack.value,
        container=container,
        slurm={key: chosen.value for key, chosen in line.slurm.items()},
        staged=staged,
        model_facts=line.facts,
        allowed=line.wish.allowed,
        observed=observed,
    )
    there = partition_findings(line.preset.value, line.hardware.value, line.site.value, line.partition, line.suits, line.nodes)
    findings = [*there, *findings]
    if any(finding.level == "error" for finding in findings):
        findings = remedied(line, plan, findings, container, observed)
    return plan, [*locate(findings, line.preset), *_shadowing(line)]


def observed_here(line: Line) -> Observed:
    """What this machine and earlier runs say: free disk, a token, a driver. The disk is not asked when what is planned has no place here:
    GPUs on the local site of a machine that has none, a cluster where there is no Slurm.
    """
    from launcher.observe import has_nvidia, observe

    on_slurm = line.site.value.scheduler == "slurm"
    elsewhere = shutil.which("sbatch") is None if on_slurm else line.preset.value.gpus > 0 and not has_nvidia()
    try:
        runs = None if elsewhere else line.folders.runs
    except UsageError:  # a site without folders can be planned for, not submitted to
        runs = None
    if on_slurm and runs is not None and not any(folder.exists() for folder in [runs, *runs.parents][:-1]):
        runs = None  # another cluster than this one: nothing but the root above it is here
    site, hardware = line.site.value.name, line.node.name
    observed = observe(runs, environ=os.environ, home=Path.home(), site=site, hardware=hardware, partition=line.partition)
    if line.site.value.stage.on == "here":
        return observed
    from launcher.stage import local_fingerprints

    return replace(observed, fingerprints=local_fingerprints(line.preset.value))


def _shadowing(line: Line) -> list[Finding]:
    file, name = line.preset.file, line.preset.file.stem
    if Path(line.wish.preset) == file or name not in shipped_presets() or file.parent == shipped("presets"):
        return []
    message = f"{file} is taken, not the shipped preset of that name"
    return [Finding("advice", "shadows-shipped", message, hint=f"presets/{name} is the shipped one")]


def refuse(findings: Sequence[Finding]) -> None:
    """Errors: UsageError (wins) or GateError when a finding forbids to go on."""
    from launcher.hardware.gates import GATES

    errors = [finding for finding in findings if finding.level == "error"]
    if any(finding.code not in GATES for finding in errors):
        raise UsageError(findings=errors)
    if errors:
        raise GateError(findings=errors)


def expected_container(line: Line) -> Container:
    """The container as it will be once the image is built. Its file is only a name where the site says no folder."""
    from launcher.image.definition import identity

    site, own = line.site.value, line.preset.value.stack
    if site.container.use == "none":
        return Container("none")
    image, content = own.image if isinstance(own, OwnImage) else None, None
    if image is None:
        assert line.stack is not None
        content = identity(line.stack.value, lock_of(line.stack))
        image = f"{line.stack.value.name}-{content[:12]}.sif"
    return Container("apptainer", image, content, site.container.command, tuple(site.container.binds), dict(site.container.env))


def container_of(line: Line) -> Container:
    """The image, built or found; a user's own is verified. Errors: MissingError, GateError, ActionError."""
    from launcher.image.verify import verify_image

    own = line.preset.value.stack
    if line.site.value.container.use == "none":
        return Container("none")
    if isinstance(own, OwnImage):
        where = line.preset.where("stack.image")
        verified = verify_image(Path(own.image), line.site.value, file=where.file, line=where.line)
        show_findings(verified.findings)
        return verified.container
    assert line.stack is not None
    return image_of(line.stack, line.site.value)


def image_of(stack: Loaded[Stack], site: Site, *, force: bool = False) -> Container:
    """The stack's image in the site's folder. Errors: MissingError, GateError, ActionError."""
    from launcher.image.build import ensure_image

    return ensure_image(stack.value, lock_of(stack), site, folders_of(site).images, force=force, log=say)


def definition_of(stack: Loaded[Stack]) -> str:
    """The Apptainer definition of a stack."""
    from launcher.image.definition import render_definition

    return render_definition(stack.value, lock_of(stack))


def beside_definition(line: Line) -> dict[str, str]:
    """The files that a definition takes in, name → text: with them beside it the image can be built by hand."""
    from launcher.image.definition import image_files

    if line.stack is None or line.site.value.container.use == "none":
        return {}
    return image_files(line.stack.value, lock_of(line.stack))


def lock_of(stack: Loaded[Stack]) -> str:
    """The lock beside a stack's file. Errors: UsageError."""
    file = stack.file.with_suffix(".lock")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        hint = f"write it with: python -m launcher.image.lock {stack.file}"
        raise UsageError(f"the stack's lock cannot be read: {error.strerror}", code="no-lock", file=str(file), hint=hint) from None


def staged(line: Line, container: Container) -> Staged:
    """Model, tokenizer and data, made ready or found. Errors: UsageError, MissingError, ActionError."""
    from launcher.stage import stage

    stack = None if line.stack is None else line.stack.value
    return stage(line.preset.value, stack, container, line.folders.data, python=sys.executable, environ=os.environ, progress=say)


def rendered(line: Line, plan: Plan, run: Run) -> dict[str, str]:
    """The files of a run, name → text."""
    from launcher.render import render

    definition = definition_of(line.stack) if line.stack is not None and plan.container.use == "apptainer" else None
    own = line.site.value.batch_template
    return render(plan, run, python=sys.executable, definition=definition, template=Path(own) if own else None)


def batch_script(line: Line, plan: Plan, run: Run) -> str | None:
    """The batch script alone; None without Slurm."""
    from launcher.render import job_script

    own = line.site.value.batch_template
    if line.site.value.scheduler != "slurm":
        return None
    return job_script(plan, run, python=sys.executable, template=Path(own) if own else None)


def folders_of(site: Site) -> Folders:
    """Errors: UsageError where a Slurm site says none."""
    return choose_folders(site, environ=os.environ, home=Path.home(), cwd=Path.cwd())


def stack_and_site(target: str, site: str | None) -> tuple[Loaded[Stack], Loaded[Site]]:
    """What ``build`` names: a stack (a file with its lock beside it, or a name), else the stack of a preset. Errors: UsageError."""
    path = Path(target)
    stack: Loaded[Stack] | None = None
    if not path.is_file() or path.with_suffix(".lock").is_file():
        try:
            stack = read_stack(target)
        except UsageError as error:
            if error.findings[0].code != "unknown-stack":
                raise
    if stack is None:
        line = read(Wish(target, site))
        if line.stack is None:
            raise UsageError("this preset brings its own image: there is nothing to build", key="stack.image")
        return line.stack, line.site
    return stack, site_of(site)


def site_of(option: str | None) -> Loaded[Site]:
    """The site of a command that has no preset: ``--site``, ``$FTLAUNCH_SITE``, the user's configuration, ``local``."""
    config = read_config()
    return read_site(option or os.environ.get("FTLAUNCH_SITE") or (config.value.site if config else None) or "local", environ=os.environ)


def _with_absolute_template(site: Loaded[Site]) -> Loaded[Site]:
    own = site.value.batch_template
    if own is None:
        return site
    return replace(site, value=site.value.model_copy(update={"batch_template": str(site.file.absolute().parent / own)}))
