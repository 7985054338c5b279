"""The wheel, alone in a fresh environment: checks, renders, and says what is missing on a machine with nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that holds the wheel and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run(
        [folder / "bin" / "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", wheel], check=True, stdin=subprocess.DEVNULL
    )
    return folder / "bin"


def ftlaunch(alone: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """With nothing but the environment on the path: no Slurm, no Apptainer."""
    environment = {"PATH": str(alone), "HOME": str(folder), "COLUMNS": "200"}
    return subprocess.run([alone / "ftlaunch", *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_check_and_render_a_shipped_preset(alone: Path, tmp_path: Path) -> None:
    checked = ftlaunch(alone, tmp_path, "check", "presets/starcoder2-15b.yaml", "--json")
    document = json.loads(checked.stdout)
    assert checked.returncode == 0 and document["ok"]
    assert document["plan"]["effective_batch"] == 25 and document["plan"]["gpus_per_node"] == 6
    rendered = ftlaunch(alone, tmp_path, "render", "starcoder2-15b", "--site", "slurm", "--out", "out")
    assert rendered.returncode == 0, rendered.stderr
    by_hand = {"requirements.lock", "stack.json", "check.py"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "job.sbatch", "image.def", *by_hand}


def test_json_has_what_the_interface_promises(alone: Path, tmp_path: Path) -> None:
    document = json.loads(ftlaunch(alone, tmp_path, "check", "tiny", "--json", "--set", "slurm.qos=x").stdout)
    assert {"ok", "findings", "plan"} <= document.keys()
    assert set(document["findings"][0]) == {"level", "code", "message", "file", "line", "column", "key", "hint"}
    assert {
        "name", "model", "site", "stack", "nodes", "gpus_per_node", "world_size", "effective_batch", "micro_batch", "gradient_accumulation",
        "samples_per_rank", "sequence_length", "attention", "adapter", "parallelism", "dtype", "time_limit_min", "signal_lead_s", "memory",
        "time", "disk",
    } <= document["plan"].keys()  # fmt: skip


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("scheduler: none\ncontainer: {use: none}", ["torch", "pip install"]),
        ("scheduler: none\ncontainer: {use: apptainer}", ["apptainer"]),
        ("scheduler: slurm\ncontainer: {use: apptainer}\nruns: /tmp/x\nimages: /tmp/x\ndata: /tmp/x", ["sbatch", "apptainer"]),
    ],
    ids=["no-torch", "no-apptainer", "no-slurm-no-apptainer"],
)
def test_submit_says_what_to_install(alone: Path, tmp_path: Path, site: str, words: list[str]) -> None:
    (tmp_path / "site.yaml").write_text(f"name: here\nsource: this test\n{site}\n")
    done = ftlaunch(alone, tmp_path, "submit", "tiny", "--site", "site.yaml")
    assert done.returncode == 4, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) in (1, len(words)) and all(word in done.stderr for word in words), done.stderr
    assert all("(" in line for line in lines), "a line without what to do"
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


def test_render_for_a_slurm_site_needs_no_folders(alone: Path, tmp_path: Path) -> None:
    done = ftlaunch(alone, tmp_path, "submit", "starcoder2-3b", "--site", "slurm")
    assert done.returncode == 2 and "runs:" in done.stderr and "images:" in done.stderr and "data:" in done.stderr


def test_a_sites_own_batch_template_replaces_ours(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "own.sbatch.j2").write_text(
        "#!/bin/sh\n#SBATCH --job-name={{ run_id | sh }}\nexec {{ python | sh }} -m launcher.supervise {{ run | sh }}\n"
    )
    (tmp_path / "site.yaml").write_text("extends: slurm\nname: here\nsource: this test\nbatch_template: own.sbatch.j2\n")
    done = ftlaunch(alone, tmp_path, "render", "tiny", "--site", "site.yaml", "--out", "out")
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "out" / "job.sbatch").read_text()
    expected = rf"#!/bin/sh\n#SBATCH --job-name=out\nexec {alone}/python[0-9.]* -m launcher\.supervise {tmp_path}/out\n"
    assert re.fullmatch(expected, script), script
    (tmp_path / "own.sbatch.j2").write_text("#!/bin/sh\n{{ nonsense | sh }}\n")
    wrong = ftlaunch(alone, tmp_path, "render", "tiny", "--site", "site.yaml", "--out", "out")
    assert wrong.returncode == 2 and "own.sbatch.j2" in wrong.stderr and "nonsense" in wrong.stderr
