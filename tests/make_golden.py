"""The golden files: definition, batch script and plan of every shipped preset. ``make golden`` writes them, ``test_golden`` compares."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from launcher.image.definition import render_definition
from launcher.plan import Container, to_json
from launcher.planner import make_plan
from launcher.preset.choose import choose_slurm
from launcher.preset.reading import model_facts, read_hardware, read_preset, read_site, read_stack, shipped_presets
from launcher.render import render
from launcher.run import Run

GOLDEN = Path(__file__).parent / "golden" / "presets"

RUN = Run(Path("/scratch/ada/ftlaunch/runs/RUN"))
PYTHON = "/home/ada/ftlaunch/bin/python"
IDENTITY = "0123456789abcdef" * 4
"""Fixed, so that a golden file changes with what it shows and not with every pin."""


def golden_files() -> dict[str, str]:
    """Path below ``tests/golden/presets`` → text. Definitions stand once for each stack, since presets share them."""
    files = {}
    for name in shipped_presets():
        preset, site = read_preset(name), read_site("slurm").value
        assert isinstance(preset.value.stack, str)
        stack = read_stack(preset.value.stack)
        container = Container("apptainer", f"/scratch/ada/ftlaunch/images/{preset.value.stack}.sif", IDENTITY, "/usr/bin/apptainer")
        plan, findings = make_plan(
            preset.value,
            read_hardware(preset.value.hardware).value,
            site,
            stack.value,
            container=container,
            slurm={key: chosen.value for key, chosen in choose_slurm(preset, site, environ={}, config=None).items()},
            model_facts=model_facts(preset.value),
        )
        plan = dataclasses.replace(plan, identity=IDENTITY, stack={"name": stack.value.name})
        for file, text in render(plan, RUN, python=PYTHON).items():
            files[f"{name}/{file}"] = text
        files[f"{name}/findings.json"] = json.dumps([finding.to_json() for finding in findings], indent=2) + "\n"
        assert files[f"{name}/plan.json"] == json.dumps(to_json(plan), indent=2) + "\n"
        definition = render_definition(stack.value, stack.file.with_suffix(".lock").read_text())
        files[f"{stack.value.name}.def"] = definition
    return files


def write(folder: Path, files: dict[str, str]) -> None:
    """The folder with these files and no others."""
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_file() and str(path.relative_to(folder)) not in files:
            path.unlink()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    write(GOLDEN, golden_files())
