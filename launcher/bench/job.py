"""The bench as a Slurm job: one job that measures every cell, on a node as the preset asks for it. Renders; ``slurm.command`` submits."""

from __future__ import annotations

from launcher import __version__
from launcher.plan import Plan
from launcher.render import directives
from launcher.run import Run
from launcher.slurm.command import Command
from launcher.templating import render_template

NOT_OF_A_COMMAND = ("signal", "ntasks-per-node", "cpus-per-task", "job-name", "output", "mail-user", "mail-type")


def bench_script(command: Command, plan: Plan, *, python: str, kept: dict[str, str]) -> str:
    """One task that holds the node's share as the plan asks for it, since it starts the ranks of each cell itself.

    ``kept``: variables that say where ftlaunch keeps its folders.
    """
    site = plan.site
    asked = [("job-name", command.name), ("output", str(command.log)), ("ntasks-per-node", "1")]
    if not site["whole_nodes"]:
        asked.append(("cpus-per-task", str(plan.layout.cpus_per_node)))
    asked += [(name, value) for name, value in directives(plan, Run(command.folder)) if name not in NOT_OF_A_COMMAND]
    module = site["container"]["module"]
    return render_template(
        "slurm/command.sbatch.j2",
        version=__version__,
        directives=asked,
        modules=[*site["modules"], *([module] if module else [])],
        python=python,
        arguments=command.arguments,
        kept=kept,
    )
