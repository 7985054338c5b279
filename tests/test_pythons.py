"""Other Pythons than the tests' own: the supervisor's and the image's rooms on 3.9 to 3.13, the commands on the ends of their range.

What trains is not run here: ``tests/train`` runs on any environment that has torch.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from launcher import metrics
from tests.conftest import REPOSITORY
from tests.toy import names, toy_plan, toy_run

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
COMMANDS = ("3.10", "3.12", "3.13")
"""Of those that pyproject.toml allows: the first, the last, and what most new clusters have. The tests themselves run on another one."""

WITHOUT_PACKAGES = sorted(
    {
        *("launcher.caches", "launcher.checkpoint", "launcher.continuation", "launcher.errors", "launcher.files", "launcher.metrics"),
        *("launcher.node", "launcher.plan", "launcher.processes", "launcher.ranks", "launcher.run", "launcher.state", "launcher.supervise"),
        *("launcher.image.disk", "launcher.image.enter", "launcher.image.inside", "launcher.image.rank", "launcher.image.sweep"),
        *("launcher.image.unpack", "launcher.site.node_report", "launcher.slurm.job", "launcher.slurm.queue", "launcher.slurm.tools"),
        *("launcher.stage.child", "launcher.stage.shelf", "launcher.stage.sources", "launcher.supported"),
    }
)
"""What runs on the Python of a node or of an image, whatever it has installed."""


@cache
def interpreter(version: str) -> Path | None:
    """The program of that Python, on PATH or of pyenv; None where this machine has none."""
    ask = "import sys; print(sys.base_prefix, '%d.%d' % sys.version_info[:2])"
    for command in ([f"python{version}", "-c", ask], ["pyenv", "exec", f"python{version}", "-c", ask]):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYENV_VERSION": _of_pyenv(version)})
        except FileNotFoundError:
            continue
        if answer.returncode == 0 and answer.stdout.split()[1] == version:
            return Path(answer.stdout.split()[0], "bin", f"python{version}")
    return None


def _of_pyenv(version: str) -> str:
    """The whole number of a Python that pyenv has: 3.9.18."""
    try:
        said = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        said = []
    return next((word for word in said if word.startswith(f"{version}.")), version)


def wanted(version: str) -> Path:
    found = interpreter(version)
    if found is None:
        pytest.skip(f"there is no python{version} on this machine")
    return found


def environment(run_code: Path) -> dict[str, str]:
    """Without packages of anybody's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "PYTHONPATH": str(run_code), "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_node_runs_needs_no_packages(version: str) -> None:
    """Warnings are errors here: what a newer Python deprecates is seen before it goes."""
    imports = "".join(f"import {module}\n" for module in WITHOUT_PACKAGES)
    check = f"{imports}import sys\nassert not {{'torch', 'pydantic', 'jinja2', 'submitit', 'ruamel', 'typer'}} & set(sys.modules)"
    python, own = wanted(version), environment(REPOSITORY)
    done = subprocess.run([python, "-S", "-W", "error", "-c", check], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_supervises_stops_and_goes_on(tmp_path: Path, version: str) -> None:
    """Supervisor and ranks, all on that Python: a stop that saves, then the next life to its end."""
    python = wanted(version)
    run = toy_run(tmp_path, toy_plan(), steps=1_000_000, step_s=0.02)
    line = [python, "-W", "error", "-m", "launcher.supervise", run.root]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(line, env=environment(run.code), cwd=run.code, stdout=log, stderr=log)
        try:
            while len(metrics.read(run.metrics_file, "train")) < 3:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 7, (tmp_path / "log").read_text()
        finally:
            process.kill()
    saved = metrics.read(run.metrics_file, "train")[-1]["step"]
    (run.root / "toy.json").write_text(json.dumps({"steps": saved + 2, "step_s": 0.01}))
    done = subprocess.run(line, env=environment(run.code), cwd=run.code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert names(run) == ["started", "stop_requested", "stopped", "started", "finished"]
    assert [row["step"] for row in metrics.read(run.metrics_file, "train")] == list(range(1, saved + 3))


def test_code_of_the_image_is_written_for_the_oldest_python() -> None:
    """Its libraries are not there on each Python, but its grammar can be read as that of 3.9."""
    for path in [*(REPOSITORY / "launcher" / "train").rglob("*.py"), *(REPOSITORY / "launcher" / "stage").rglob("*.py")]:
        tree = ast.parse(path.read_text(), str(path), feature_version=(3, 9))
        postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        assert postponed or not _annotates(tree), f"{path}: annotations are evaluated: from __future__ import annotations"


def _annotates(tree: ast.Module) -> bool:
    return any(isinstance(node, (ast.AnnAssign, ast.FunctionDef)) for node in ast.walk(tree))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> dict[str, Path]:
    """Version → the command of a fresh environment with this wheel and what it needs, of the Pythons that are there."""
    there = {version: found for version in COMMANDS if (found := interpreter(version)) is not None}

    def install(version: str) -> Path:
        folder = tmp_path_factory.mktemp(f"python{version}")
        subprocess.run([there[version], "-m", "venv", folder], check=True, env=environment(folder))
        constraints = ["-c", REPOSITORY / "constraints.txt"]
        done = subprocess.run(
            [folder / "bin" / "pip", "install", "-q", "--no-compile", *constraints, wheel], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return folder / "bin"

    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        return dict(zip(there, pool.map(install, there)))


@pytest.mark.parametrize("version", COMMANDS)
def test_commands(installed: dict[str, Path], version: str, tmp_path: Path) -> None:
    """The same plan and the same batch script as on the tests' own Python."""
    if version not in installed:
        pytest.skip(f"there is no python{version} on this machine")
    folders = {f"FTLAUNCH_{name}": str(tmp_path / name.lower()) for name in ("RUNS", "IMAGES", "DATA")}
    own = {**environment(tmp_path), **folders, "PYTHONWARNINGS": "error", "COLUMNS": "160"}
    here = {**own, "PYTHONPATH": str(REPOSITORY)}
    del own["PYTHONPATH"]

    def said(*argv: object, program: object = installed[version] / "ftlaunch", env: dict[str, str] = own) -> str:
        done = subprocess.run([program, *argv], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    checked = json.loads(said("check", "tiny", "--json"))
    assert checked == json.loads(said("-m", "launcher.cli", "check", "tiny", "--json", program=sys.executable, env=here))
    said("render", "tiny", "--out", "out")
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["preset"]["name"] == "tiny"
    wrong = subprocess.run([installed[version] / "ftlaunch", "check", "tiny", "--set", "training.epochss=1"], env=own, capture_output=True)
    assert wrong.returncode == 2 and b"training.epochs" in wrong.stderr and b"Traceback" not in wrong.stderr
    assert said("presets") and said("--help")
