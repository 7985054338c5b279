"""Image and data before training, where the site wants them: here, or as jobs that the training's job depends on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launcher.cli.line import Line, Wish, container_of, expected_container, folders_of, image_of, lock_of, planned, refuse, staged
from launcher.cli.show import say
from launcher.errors import FtlaunchError, MissingError, UsageError
from launcher.files import write_text
from launcher.plan import Container, Staged, write_plan
from launcher.preset.choose import SLURM_ENVIRONMENT
from launcher.preset.reading import Loaded, read_config, read_site, read_stack
from launcher.preset.schema import OwnImage
from launcher.preset.site import Site, Work
from launcher.preset.stack import Stack
from launcher.run import Run, now

Step = Literal["build", "stage"]


@dataclass(frozen=True)
class Ready:
    """What a run needs: there, or to come from the jobs of ``pending``."""

    container: Container
    staged: Staged | None
    pending: tuple[Step, ...] = ()


def make_ready(line: Line) -> Ready:
    """Image and data made or found; what the site wants done in a job is left ``pending``.

    Errors: UsageError, GateError, MissingError (also where it is to be done elsewhere), ActionError.
    """
    site = line.site.value
    container = _image(line)
    pending: tuple[Step, ...] = ()
    if container is None:
        container, pending = _to_come(line), ("build",)
    elif site.stage.on == "here":
        return Ready(container, staged(line, container))
    found = None if pending else _staged_before(line, container)
    if found is not None:
        return Ready(container, found)
    if site.stage.on == "elsewhere":
        hint = "run ftlaunch stage there, with the same data folder"
        raise MissingError(f"site {site.name}: data is staged elsewhere, and is not there yet", code="not-staged", hint=hint)
    return Ready(container, None, (*pending, "stage"))


def start_chain(run: Run, line: Line, pending: tuple[Step, ...]) -> list[str]:
    """Submit the jobs of ``pending``, one after the other, and note them. Returns the jobs that the training waits for.

    Errors: ActionError, after which none of them is left in the queue.
    """
    from launcher.slurm.command import Command, command_script, submit_command

    tools, jobs = run.record()["tools"], dict[str, str]()
    slurm = {key: chosen.value for key, chosen in line.slurm.items()}
    try:
        for step in pending:
            work = _work(line.site.value, step)
            arguments = ("prepare", str(run.root), step, "--site", str(line.site.file.absolute()))
            command = Command(f"ftlaunch-{step}", arguments, run.root / "prepare")
            text = command_script(command, line.site.value, work, slurm, python=sys.executable)
            jobs[step] = submit_command(command, text, tools["sbatch"], after=list(jobs.values())[-1:])
            say(f"{step}: job {jobs[step]}, log {command.log}")
    except FtlaunchError:
        withdraw(tools["scancel"], jobs)
        raise
    run.append_event("staging", jobs=jobs)
    return list(jobs.values())[-1:]


def place_of_work(step: Step, site: Site, on: str | None) -> Literal["here", "slurm"]:
    """Where a command's own work is done: ``--on``, else as the site says. Errors: UsageError, MissingError."""
    place = on or (site.build if step == "build" else site.stage).on
    if place == "slurm" and site.scheduler == "none":
        raise UsageError(f"site {site.name} has no scheduler", code="no-scheduler", key="--on", hint="--on here, or --site")
    if place == "here" or place == "slurm":
        return "here" if place == "here" else "slurm"
    if on is not None:
        raise UsageError(f"{on!r} is no place", code="unknown-place", key="--on", hint="here or slurm")
    hint = "--print-only gives the definition" if step == "build" else "run it where the data can be fetched, with the same data folder"
    raise MissingError(f"site {site.name} wants this done elsewhere", code="elsewhere", hint=f"{hint}; --on here does it all the same")


def submit_alone(step: Step, arguments: tuple[str, ...], site: Loaded[Site], line: Line | None = None) -> tuple[str, Path]:
    """A job that runs one command of ftlaunch, with no run; returns its id and its log. Errors: MissingError, ActionError."""
    from launcher.slurm.command import Command, command_script, submit_command
    from launcher.slurm.tools import find_tools

    tools = find_tools()
    folder = folders_of(site.value).images if step == "build" else folders_of(site.value).data
    command = Command(
        f"ftlaunch-{step}", (*arguments, "--site", str(site.file.absolute()), "--on", "here"), folder / "jobs" / now().replace(":", "")
    )
    slurm = _users_options(site.value) if line is None else {key: chosen.value for key, chosen in line.slurm.items()}
    text = command_script(command, site.value, _work(site.value, step), slurm, python=sys.executable)
    return submit_command(command, text, tools["sbatch"]), command.log


def withdraw(scancel: str, jobs: Mapping[str, str]) -> None:
    """Take jobs of a chain out of the queue again."""
    from launcher.slurm.tools import call

    if jobs:
        call([scancel, *jobs.values()])


def prepare(run: Run, step: Step, site: Path) -> None:
    """One step of the chain, in its job. What goes wrong is written into the run, whose job Slurm then cancels.

    Errors: every class of ``launcher.errors``.
    """
    from launcher.cli.launch import line_of

    life = run.lives_started()
    try:
        plan = run.plan(life)
        line = replace(line_of(run, plan, Wish("")), site=read_site(str(site), environ=os.environ))
        stack = _same_stack(plan.stack)
        line = replace(line, stack=stack)
        if step == "build":
            assert stack is not None, "a user's own image is not built"
            image_of(stack, line.site.value)
            return
        container = replace(container_of(line), identity=plan.container.identity)
        final, findings = planned(line, container, staged(line, container))
        refuse(findings)
        # the command's name as it was: another node may have it elsewhere
        write_plan(replace(final, identity=plan.identity, container=plan.container), run.plan_file(life))
        if final.preset["parallelism"].startswith("zero"):  # the batch may be known only now
            from launcher.render import deepspeed_config

            write_text(run.deepspeed_file(life), deepspeed_config(final))
        run.append_event("staged", life=life)
    except FtlaunchError as error:
        run.append_event("failed", life=life, cause=f"{step}: {error}".splitlines()[0])
        raise


def _image(line: Line) -> Container | None:
    """The image, where it is there or can be made here; None where a job is to build it."""
    from launcher.image.build import find_image

    site, own = line.site.value, line.preset.value.stack
    if site.container.use == "none" or (site.build.on == "here" and site.stage.on == "here"):
        return container_of(line)
    if isinstance(own, OwnImage):
        return _to_come(line)  # looked into where there is Apptainer: in the job that stages
    assert line.stack is not None
    if find_image(line.stack.value, lock_of(line.stack), line.folders.images) is not None:
        return _to_come(line)
    if site.build.on == "here":
        return container_of(line)
    if site.build.on == "elsewhere":
        image = _to_come(line).image
        hint = f"build it where you can (ftlaunch build {line.stack.value.name}) and copy it there with its .json"
        raise MissingError(f"site {site.name}: images are built elsewhere, and {image} is not there", code="no-image", hint=hint)
    return None


def _to_come(line: Line) -> Container:
    """The container with the image's place, whether it is there or not."""
    container = expected_container(line)
    assert container.image is not None
    return replace(container, image=str(line.folders.images.absolute() / container.image))


def _staged_before(line: Line, container: Container) -> Staged | None:
    from launcher.stage import find_staged

    stack = None if line.stack is None else line.stack.value
    return find_staged(line.preset.value, stack, container, line.folders.data, python=sys.executable, environ=os.environ)


def _work(site: Site, step: Step) -> Work:
    """How a job of this step is asked for; staging follows a build to where that runs, unless the site says where it runs."""
    return site.build if step == "build" or site.stage.on == "here" else site.stage


def _users_options(site: Site) -> dict[str, str]:
    """Account, partition and qos where no preset is named: the user's configuration, the environment, the site."""
    config, found = read_config(), dict[str, str]()
    for key, default in (("account", site.default_account), ("partition", site.default_partition), ("qos", site.default_qos)):
        own = None if config is None else getattr(config.value.slurm, key)
        value = own or os.environ.get(SLURM_ENVIRONMENT[key]) or default
        found.update({key: value} if value else {})
    return found


def _same_stack(stack: dict[str, object]) -> Loaded[Stack] | None:
    """The stack by its name, with its file and lock; None for an own image. Errors: UsageError where it is not as submitted."""
    if not stack:
        return None
    loaded = read_stack(str(stack["name"]))
    if loaded.value != Stack.model_validate(stack):
        raise UsageError(f"stack {loaded.value.name} has changed since the submission", file=str(loaded.file), code="stack-changed")
    return loaded
