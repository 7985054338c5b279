"""The golden files of real clusters: for every shipped site × shipped preset the batch script, or why it is refused and what would pass.

``make golden`` writes them, ``test_sites`` compares. The environment is fixed, so that they are the same everywhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.sites_report import clusters, fixed_environment
from launcher.cli.line import Line, Wish, expected_container, read
from launcher.cli.replan import own_way, remedied, unremedied, variant_way
from launcher.hardware.fits import UNOBSERVED
from launcher.preset.reading import shipped_presets
from launcher.render import job_script
from tests.make_golden import IDENTITY, PYTHON, RUN, write

GOLDEN = Path(__file__).parent / "golden" / "sites"


def golden_files(site: str) -> dict[str, str]:
    """Path below ``tests/golden/sites`` → text: ``<site>/<preset>.sbatch``, or ``.refusal`` where there is none."""
    with fixed_environment():
        return dict(_golden(read(Wish(name, site)), name) for name in shipped_presets())


def _golden(line: Line, name: str) -> tuple[str, str]:
    plan, findings = unremedied(line, UNOBSERVED)
    errors = [finding for finding in findings if finding.level == "error"]
    if not errors:
        plan = dataclasses.replace(plan, identity=IDENTITY)
        return f"{line.site.value.name}/{name}.sbatch", job_script(plan, RUN, python=PYTHON)
    told = [finding for finding in remedied(line, plan, findings, expected_container(line), UNOBSERVED) if finding.level == "error"]
    way = own_way(line, plan, findings, UNOBSERVED) or variant_way(line, plan, UNOBSERVED)
    passes = "nothing that trains the same was found to pass" if way is None else f"passes: ftlaunch check {way.arguments}"
    return f"{line.site.value.name}/{name}.refusal", "\n".join([*(f"{finding.code}: {finding}" for finding in told), passes, ""])


if __name__ == "__main__":
    write(GOLDEN, {name: text for site in clusters() for name, text in golden_files(site).items()})
