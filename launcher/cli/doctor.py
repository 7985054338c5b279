"""The command doctor: what this machine and a site have and lack, one line per finding; with --probe also what a node says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import options
from launcher.cli.show import drawable, out, say, show_json
from launcher.errors import MissingError, UsageError

if TYPE_CHECKING:
    from launcher.preset.choose import Chosen, Folders
    from launcher.preset.reading import Loaded
    from launcher.preset.site import Site
    from launcher.site.checks import Check

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    site: options.Site = None,
    probe: Annotated[bool, typer.Option("--probe", help="Send a job of at most two minutes and say what a node is like.")] = False,
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write what the probe learned into this site file.")] = None,
    as_json: options.Json = False,
    account: options.Account = None,
    partition: options.Partition = None,
    qos: options.Qos = None,
    constraint: options.Constraint = None,
    reservation: options.Reservation = None,
) -> None:
    """Check this machine and the site; say what to do. Exit code 4 when something needed is missing."""
    from launcher.cli.line import site_of

    if file is not None and not probe:
        raise UsageError("--out keeps what a probe learned", code="usage", key="--out", hint="add --probe")
    loaded = site_of(site)
    chosen = loaded.value
    if probe and chosen.scheduler == "none":
        raise UsageError(f"site {chosen.name} has no nodes to ask", code="usage", key="--probe", hint="--site SITE")
    printed: list[Check] = []

    def tell(checks: Iterable[Check]) -> None:
        for check in checks:
            printed.append(check)
            if not as_json:
                _show(check)

    folders = _check(chosen, account, tell)
    facts: Mapping[str, Any] | None = None
    learned: dict[str, Any] = {}
    if probe and not any(check.level == "error" for check in printed):
        assert folders is not None, "no folders is an error"
        asked = {"account": account, "partition": partition, "qos": qos, "constraint": constraint, "reservation": reservation}
        facts, learned = _probe(site, loaded, folders, asked, file, tell)
    elif probe:
        say("the probe was not sent: first what is an error above")
    failed = any(check.level == "error" for check in printed)
    if as_json:
        document = {"ok": not failed, "site": chosen.name, "findings": [check.to_json() for check in printed]}
        show_json({**document, **({"probe": facts, "learned": learned} if probe else {})})
    if failed:
        raise typer.Exit(MissingError.exit_code)


def _check(site: Site, account: str | None, tell: Any) -> Folders | None:
    """Everything that can be seen from here. Returns the site's folders, None where it says none."""
    import os
    import shutil

    from launcher.cli.line import folders_of
    from launcher.cli.show import is_unicode
    from launcher.site import checks
    from launcher.site.ask import ask_cluster
    from launcher.site.machine_facts import group_names, look_for_apptainer, module_names, read_mounts, user_name
    from launcher.slurm.tools import OPTIONAL, REQUIRED

    home = Path.home()
    tell(checks.python_checks(site))
    if site.scheduler == "slurm":
        tools = {name: path for name in (*REQUIRED, *OPTIONAL) if (path := shutil.which(name))}
        found = list(checks.slurm_tool_checks(tools))
        tell(found)
        if not any(check.level == "error" for check in found):
            named = account or os.environ.get("SBATCH_ACCOUNT") or site.default_account
            tell(checks.cluster_checks(site, ask_cluster(user_name()), group_names(), named))
    container = look_for_apptainer(site.container, (module_names() or ()) if site.container.module else ())
    tell(checks.apptainer_checks(site, container))
    folders: Folders | None = None
    try:
        folders = folders_of(site)
        tell(checks.folder_checks(site, folders, home, read_mounts(Path("/proc/self/mounts"))))
    except UsageError as error:
        tell([checks.Check("error", one.code, one.message, one.hint) for one in error.findings])
    tell(checks.home_checks(home, os.environ))
    tell(checks.machine_checks(site, folders, os.environ, unicode=is_unicode(out())))
    return folders


def _probe(
    name: str | None, loaded: Loaded[Site], folders: Folders, asked: Mapping[str, str | None], file: Path | None, tell: Any
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Send the job, wait for it, say what it found; returns the node's report and what it taught. Ctrl-C cancels the job."""
    import sys
    from datetime import date

    from launcher.cli.probe_plan import probe_plan
    from launcher.cli.site import known_gpus
    from launcher.preset.reading import read_site
    from launcher.shipped import shipped
    from launcher.site import probe as probes
    from launcher.site.site_file import add_facts
    from launcher.slurm.tools import find_tools

    site = loaded.value
    tools, (plan, chosen) = find_tools(), probe_plan(name, site, asked)
    places = {"runs": folders.runs, "images": folders.images, "data": folders.data}
    sent = probes.make_probe(plan, site, places, home=Path.home(), python=sys.executable, tools=tools)
    job_id = probes.submit_probe(sent, tools)
    say(f"job {job_id} asks a node{_where(chosen)}; at most {probes.LIMIT_MIN} minutes once it runs; Ctrl-C cancels it")
    try:
        report = probes.wait_for(sent, job_id, tools, progress=say)
    except KeyboardInterrupt:
        reason = probes.cancel(job_id, tools)
        say(f"job {job_id} is cancelled" if reason is None else f"job {job_id} may still be there: {reason}; scancel {job_id}")
        probes.remove(sent)
        raise typer.Exit(130) from None
    probes.remove(sent)
    tell(probes.probe_checks(report, wants_gpus=plan.layout.gpus_per_node))
    partition = report.get("partition") or (chosen["partition"].value if "partition" in chosen else None)
    facts = probes.learned(report, site, partition, known_gpus())
    if file is not None and facts:
        base = site.name if loaded.file.is_relative_to(shipped("presets")) else str(loaded.file.resolve())
        add_facts(file, base, facts, f"ftlaunch doctor --probe on {report['node']}, {date.today().isoformat()}")
        read_site(str(file))
        say(f"{file}: {', '.join('.'.join(key) for key in facts)}")
    return report, {".".join(key): value for key, value in facts.items()}


def _where(chosen: Mapping[str, Chosen]) -> str:
    return "".join(f", {key} {chosen[key].value}" for key in ("partition", "account", "qos") if key in chosen)


def _show(check: Check) -> None:
    from rich.text import Text

    console = out()
    text = f" {check.message}" + (f" → {check.hint}" if check.hint else "")
    console.print(Text.assemble((f"{check.level:7}", STYLES[check.level]), drawable(text, console)))
