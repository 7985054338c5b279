"""What the tests share: the stack of ``tests/hpc`` as a fixture, the reason where it is not there, a pretended Slurm, toy runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.run import Run, process_start, read_lease
from tests.fake_slurm import FakeSlurm, make_fake_slurm

REPOSITORY = Path(__file__).parent.parent
AS_USER = REPOSITORY / "tests" / "hpc" / "as-ftuser"
UP = REPOSITORY / "tests" / "hpc" / "up"
HPC = Path(os.environ.get("FTLAUNCH_HPC", "/var/lib/ftlaunch-hpc"))

# Where tests run in the background INT is ignored, and would be by every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Cluster:
    """The test cluster, seen by its unprivileged user: the wheel is installed in ``venv``, without torch."""

    root: Path
    user: str = "ftuser"

    def readable(self, file: Path) -> Path:
        """A copy of one of our files where the user can read it."""
        copy = self.home / file.name
        copy.write_bytes(file.read_bytes())
        copy.chmod(0o644)
        return copy

    @property
    def home(self) -> Path:
        """A folder that the user may write."""
        return self.root / "tests"

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python"

    @property
    def ftlaunch(self) -> Path:
        return self.root / "venv" / "bin" / "ftlaunch"

    def run(
        self, *argv: object, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 600, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command as the unprivileged user, in the stack's environment. Errors: AssertionError with both outputs."""
        assignments = [f"{name}={value}" for name, value in (env or {}).items()]
        done = subprocess.run(
            [AS_USER, *(["env", *assignments] if assignments else []), *map(str, argv)],
            cwd=cwd or self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert done.returncode == 0, f"{argv}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@dataclass(frozen=True)
class Configuration:
    """The test cluster as another site is: one folder of ``tests/hpc/configurations``."""

    name: str
    accepts: list[str]
    """Options with which sbatch takes a job there."""
    stack: Cluster


@pytest.fixture(scope="module")
def default_again() -> Iterator[None]:
    """After the module the cluster is in its default configuration."""
    yield
    subprocess.run([UP], check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def configuration(request: pytest.FixtureRequest, default_again: None, stack: Cluster) -> Configuration:
    """The cluster as ``parametrize("configuration", [names], indirect=True)`` asks; pytest puts a module's tests of one together.

    In such a module every test that needs the cluster should name its configuration.
    """
    subprocess.run([UP, "--configuration", request.param], check=True, stdin=subprocess.DEVNULL)
    return Configuration(request.param, (UP.parent / "configurations" / request.param / "accepts").read_text().split(), stack)


@pytest.fixture(scope="session")
def stack() -> Cluster:
    """The real Slurm and Apptainer, before anything of ours is installed. Its runs stay for a day, to be looked at."""
    found = Cluster(HPC)
    for left in (*found.home.glob("runs/*"), *found.home.glob("data-*")):
        if left.stat().st_mtime < time.time() - 24 * 3600:
            shutil.rmtree(left)
    subprocess.run(["install", "-d", "-o", found.user, "-m", "0755", found.home], check=True)
    return found


@pytest.fixture(scope="session")
def cluster(stack: Cluster, wheel: Path) -> Cluster:
    """The real Slurm and Apptainer, with this tree's wheel installed for the unprivileged user."""
    subprocess.run(
        [stack.python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheel], check=True, stdin=subprocess.DEVNULL
    )
    subprocess.run(
        [stack.python, "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", wheel], check=True, stdin=subprocess.DEVNULL
    )
    return stack


@pytest.fixture
def slurm_path(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's tools are found, and they find the cluster."""
    for line in cluster.run("env").stdout.splitlines():
        if line.startswith(("SLURM_CONF=", "PATH=")):
            monkeypatch.setenv(*line.split("=", 1))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    folder.chmod(0o755)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, REPOSITORY], check=True, stdin=subprocess.DEVNULL
    )
    (built,) = folder.glob("ftlaunch-*.whl")
    return built


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs more than this machine has, with the reason; in CI a missing stack is a failure instead."""
    asked = config.getoption("-m")
    reason = _missing_stack()
    if reason and os.environ.get("FTLAUNCH_REQUIRE_HPC"):
        raise pytest.UsageError(f"FTLAUNCH_REQUIRE_HPC is set, but {reason}")
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=f"{reason}; bring it up with: tests/hpc/up"))
        made_by = {"source_stack": "make test-source-stack", "image_cuda": "make test-image-cuda", "matrix": "make test-matrix"}
        for marker, command in made_by.items():
            if item.get_closest_marker(marker) and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=f"runs by: {command}"))


def _missing_stack() -> str | None:
    if not (HPC / "env").exists():
        return f"the test stack is not up ({HPC}/env is missing)"
    ping = subprocess.run(["bash", "-c", f'. "{HPC}/env"; scontrol ping'], capture_output=True, text=True)
    return None if "UP" in ping.stdout else "the test stack's slurmctld does not answer"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = make_fake_slurm(tmp_path / "bin", monkeypatch)
    fake.answer("sbatch", {"out": "4711\n"})
    return fake


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Toy runs on this machine, whose supervisors are gone at the end."""
    from tests.toy import toy_plan, toy_run  # needs pydantic, which the source's stack is without

    made: list[Run] = []

    def make(**behaviour: Any) -> Run:
        made.append(toy_run(tmp_path / "runs", toy_plan(), new=True, **behaviour))
        return made[-1]

    yield make
    for run in made:
        lease = read_lease(run)
        if lease and process_start(lease.pid) == lease.pid_start:
            os.kill(lease.pid, signal.SIGKILL)


@pytest.fixture
def trained(local: Callable[..., Run]) -> Run:
    from tests.toy_runs import fake_checkpoint

    run = local(steps=10)
    for step, epoch in ((2, None), (4, 1), (6, None), (8, 2)):
        fake_checkpoint(run, step, epoch)
    run.model.mkdir()
    return run
