"""Asking Slurm when a plan's job would start, for ``check``; and a submitted job, for ``status``. Never an error of either."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.line import Line, batch_script
from launcher.errors import Finding
from launcher.plan import Plan
from launcher.run import Run
from launcher.slurm.forecast import Forecast, expected_start, forecast_start

PATIENCE_S = 5.0
"""A forecast is not worth a longer wait."""


def forecast(line: Line, plan: Plan, findings: Sequence[Finding], *, before: Sequence[Forecast] = ()) -> Forecast | None:
    """None without Slurm, and for a plan that we refuse ourselves. ``before``: what this command asked already: our patience is for all.

    The script is rendered for a run folder of which nothing is looked at, since a site may not say yet where runs lie.
    Errors: UsageError when the site's own template cannot be rendered.
    """
    if line.site.value.scheduler != "slurm" or any(finding.level == "error" for finding in findings):
        return None
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return Forecast(reason="there is no sbatch on this machine")
    script = batch_script(line, plan, Run(Path.cwd() / f"{plan.name}-{plan.identity[:8]}"))
    assert script is not None
    left_s = PATIENCE_S - sum(other.asked_s for other in before)
    return forecast_start(script, sbatch, environ=os.environ, timeout_s=left_s)


def start_of(run: Run, job_id: str | None) -> str | None:
    """When a run that waits in the queue is expected to start, ISO 8601 in this machine's time zone; None where Slurm does not say."""
    record = run.record()
    if job_id is None or record["scheduler"] != "slurm":
        return None
    start = expected_start(job_id, record["tools"].get("squeue"), timeout_s=PATIENCE_S)
    return None if start is None else start.isoformat()
