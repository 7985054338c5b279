"""What the submitting shell, its home and its modules may do to a run, on the real Slurm and in the real image: nothing.

Everything is poisoned at once: a home of somebody else's that nobody may write, with packages in it; variables of Python, Apptainer,
torchrun and the dynamic loader; a Python that starts only with its module; an allocation around the submission; no local disk.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.image.unpack import read_log
from launcher.run import Run
from tests.conftest import REPOSITORY, Cluster
from tests.toy_slurm import put_scripts, story, wait_until

pytestmark = pytest.mark.slurm

MAIN = "int Py_BytesMain(int, char **);\nint main(int count, char **words) { return Py_BytesMain(count, words); }\n"

CUSTOMIZE = """\
import sys
if not any(word.endswith(("toy_submit.py", "launcher.cli")) for word in sys.orig_argv):
    open({marker!r}, "a").write(f"{{__file__}}: {{sys.orig_argv}}\\n")
"""
"""Python runs such a file of the user's site-packages, or of PYTHONPATH, before anything else. The submission itself may."""


@dataclass(frozen=True)
class Poisoned:
    """A user whose environment is against them."""

    cluster: Cluster
    folder: Path
    python: Path
    """Does not start without what is in ``lib_folder``."""
    lib_folder: Path
    singularity: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def marker(self) -> Path:
        return self.folder / "writable" / "poisoned"

    @property
    def modules_log(self) -> Path:
        return self.folder / "writable" / "modules"

    @property
    def environment(self) -> dict[str, str]:
        packages, poison = self.cluster.root / "venv" / "lib" / "python3.11" / "site-packages", self.folder / "poison"
        caches = ("HF_HOME", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE", "TORCH_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "WANDB_DIR")
        load = f'[ "$1" = load ] && export LD_LIBRARY_PATH={self.lib_folder}'
        return {
            **dict.fromkeys(caches, str(self.home / "caches")),
            "HOME": str(self.home),
            "LD_LIBRARY_PATH": str(self.lib_folder),
            "PYTHONPATH": f"{packages}:{poison}",
            "LD_PRELOAD": "libm.so.6",
            "APPTAINER_BIND": f"{poison}:/mnt",
            "SINGULARITY_BINDPATH": f"{poison}:/media",
            "APPTAINERENV_LEAK": "1",
            "SINGULARITYENV_LEAK": "1",
            "RANK": "7",
            "WORLD_SIZE": "99",
            "MASTER_ADDR": "nowhere",
            "BASH_FUNC_module%%": f'() {{ echo "$* $HOME" >>{self.modules_log}; {load}; }}',
        }

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.cluster.user).pw_uid

    def owns(self, folder: str) -> set[str]:
        return {entry.name for entry in os.scandir(folder) if entry.stat(follow_symlinks=False).st_uid == self.uid}

    def submits(self, *argv: object) -> dict[str, Any]:
        """From inside an allocation; what the last line of the answer says."""
        one = ["--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=2G", "--time=5"]
        allocation = ["srun", "--partition=high", "--job-name=outer", *one]
        done = self.cluster.run(*allocation, self.python, *argv, env=self.environment)
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    def assert_untouched(self) -> None:
        assert not self.marker.exists(), self.marker.read_text()
        packages = [".local", "lib", "python3.11", "site-packages", "torch.py", "usercustomize.py"]
        assert sorted(path.name for path in self.home.rglob("*")) == packages
        assert set(self.modules_log.read_text().splitlines()) == {f"load python/3.11 {self.home}"}, "modules are loaded, never purged"


@pytest.fixture(scope="module")
def user(cluster: Cluster) -> Iterator[Poisoned]:
    folder = cluster.home / "poisoned"
    shutil.rmtree(folder, ignore_errors=True)
    found = [*Path("/usr/lib").glob("*/libpython3.11.so.1.0")]
    if not found or shutil.which("gcc") is None:
        pytest.skip("a Python with a library of its own is made of gcc and libpython3.11")
    for name in ("bin", "lib", "poison", "home/.local/lib/python3.11/site-packages"):
        (folder / name).mkdir(parents=True)
    (folder / "writable").mkdir()
    shutil.chown(folder / "writable", cluster.user)
    # Under a name that no path of the system leads to.
    library = folder / "lib" / "libmodule3.11.so.1.0"
    library.write_bytes(found[0].read_bytes().replace(b"libpython3.11.so.1.0", b"libmodule3.11.so.1.0"))
    (folder / "main.c").write_text(MAIN)
    python = folder / "bin" / "python3.11"
    subprocess.run(["gcc", "-o", python, folder / "main.c", library], check=True)
    (folder / "bin" / "singularity").symlink_to(shutil.which("apptainer", path=f"{cluster.root}/apptainer/bin") or "")
    made = Poisoned(cluster, folder, python, folder / "lib", folder / "bin" / "singularity")
    packages = made.home / ".local" / "lib" / "python3.11" / "site-packages"
    for place in (folder / "poison" / "sitecustomize.py", packages / "usercustomize.py"):
        place.write_text(CUSTOMIZE.format(marker=str(made.marker)))
    for place in (folder / "poison", packages):
        (place / "torch.py").write_text(CUSTOMIZE.format(marker=str(made.marker)))
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    made.home.chmod(0o555)
    alone = cluster.run(python, "-c", "", check=False)
    assert alone.returncode == 127 and "libmodule3.11" in alone.stderr, "it starts without its module"
    yield made
    shutil.rmtree(folder)


@pytest.fixture
def wait() -> Callable[[Run, int], None]:
    def until_finished(run: Run, times: int) -> None:
        wait_until(lambda: len(run.events("finished")) == times or run.events("failed"), run)
        assert not run.events("failed"), story(run)

    return until_finished


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> dict[str, Any]:
    """The ``cpu`` image, from the cache or built now."""
    site = cluster.home / "site.yaml"
    site.write_text((REPOSITORY / "tests" / "hpc" / "site.yaml").read_text())
    site.chmod(0o644)
    built = json.loads(cluster.run(cluster.ftlaunch, "build", "tiny", "--site", site, "--json", timeout=1500).stdout)
    return {"image": built["image"], "identity": built["identity"]}


@pytest.fixture(scope="module")
def small_image(user: Poisoned) -> Path:
    """A Python with its library and a shell, so that unpacking takes a second."""
    root, image = user.folder / "writable" / "root", user.folder / "writable" / "small.sif"
    standard = Path("/usr/lib/python3.11")
    left_out = shutil.ignore_patterns("__pycache__", "test", "tests", "idlelib", "lib2to3", "ensurepip", "config-*", "dist-packages")
    shutil.copytree(standard, root / standard.relative_to("/"), ignore=left_out)
    programs = ["/bin/sh", "/usr/bin/env", "/usr/bin/python3", *(standard / "lib-dynload").glob("*.so")]
    needed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    for file in {"/bin/sh", "/usr/bin/env", "/usr/bin/python3", *re.findall(r"\s(/\S+) \(0x", needed)}:
        (root / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / file[1:])
    for folder in ("etc", "mnt", "media", "tmp", "proc", "sys", "dev"):
        (root / folder).mkdir(exist_ok=True)
    user.cluster.run("apptainer", "build", image, root)
    shutil.rmtree(root)
    return image


@pytest.fixture(scope="module")
def toy(user: Poisoned, small_image: Path) -> Iterator[Run]:
    """Ranks that tell their environment, in an image, submitted by that user."""
    cluster, toys = user.cluster, user.folder / "toys"
    toys.mkdir()
    put_scripts(toys)
    container = {"use": "apptainer", "image": str(small_image), "identity": "0" * 64, "command": str(user.singularity)}
    site = {
        "local_disk": ["$NOT_SET", str(user.folder)],
        "modules": ["python/3.11"],
        "cache": "$FTLAUNCH_HPC/tests/poisoned/writable/caches",
    }
    plan = {"nodes": 1, "time_limit_min": 10, "site": {**site, "container": {"use": "apptainer"}}, "container": container}
    wanted = {"plan": plan, "toy": {"steps": 2, "step_s": 0.1, "shows": ["/proc/self/mounts", "/proc/self/maps"]}}
    answer = user.submits(toys / "toy_submit.py", user.folder / "writable" / "runs", json.dumps(wanted))
    assert "run" in answer, answer
    run = Run(Path(answer["run"]))
    yield run
    cluster.run("scancel", answer["job_id"], check=False)


def seen_by(run: Run, life: int) -> list[dict[str, str]]:
    return [json.loads((run.life(life) / f"environment-{rank}.json").read_text()) for rank in (0, 1)]


def assert_no_leak(user: Poisoned, run: Run, life: int) -> None:
    """Neither in the environment of the ranks, nor in what is mounted there, nor among their libraries."""
    job, identity = run.events("started")[life]["job_id"], run.plan().container.identity or ""
    cache = user.folder / "writable" / "caches" / f"ftlaunch-{user.uid}-{identity[:12]}"
    for rank, seen in enumerate(seen_by(run, life)):
        assert not Path(seen.pop("HOME"), ".local").exists() and str(user.home) not in seen["/proc/self/mounts"]
        leaks = [name for name, value in seen.items() for poison in ("home", "poison", "lib") if f"{user.folder}/{poison}" in value]
        assert leaks == [] and not {"LEAK", "LD_PRELOAD", "PYTHONHOME"} & seen.keys()
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "SLURM_JOB_ID": job, "SLURM_JOB_NAME": "toy", "PYTHONPATH": str(run.code)}
        assert place.items() <= seen.items()
        assert seen["HF_HOME"] == f"{cache}/huggingface" and f" {cache} " in seen["/proc/self/mounts"]
        assert cache.stat().st_mode & 0o777 == 0o700
    user.assert_untouched()


def test_ranks_see_nothing_of_it(user: Poisoned, toy: Run, wait: Callable[[Run, int], None]) -> None:
    wait(toy, 1)
    assert_no_leak(user, toy, 0)


def test_without_a_disk_the_image_was_unpacked_in_the_run_and_is_gone(toy: Run, wait: Callable[[Run, int], None]) -> None:
    wait(toy, 1)
    (node,) = read_log(toy.unpack_log(0).read_text())
    assert node["shared"] and node["image"].startswith(str(toy.life(0) / "nodes"))
    assert "no disk has room for the image" in toy.supervisor_log(0).read_text()
    wait_until(lambda: not (toy.life(0) / "nodes").exists(), toy)


def test_script_by_hand_in_a_shell_that_is_worse(user: Poisoned, toy: Run, wait: Callable[[Run, int], None]) -> None:
    """Without ftlaunch to clean it; the module alone brings the library of the Python."""
    wait(toy, 1)
    (toy.root / "toy.json").write_text(json.dumps({**json.loads((toy.root / "toy.json").read_text()), "steps": 4}))
    worse = {**user.environment, "PYTHONPATH": str(user.folder / "poison"), "PYTHONHOME": "/nowhere", "PYTHONINSPECT": "1"}
    del worse["LD_LIBRARY_PATH"]
    user.cluster.run("bash", "-c", 'cd "$1" && sbatch --partition=high job.sbatch', "-", toy.root, env=worse)
    wait(toy, 2)
    assert_no_leak(user, toy, 1)


def test_tiny_trains_though_nobody_may_write_the_home(user: Poisoned, image: dict[str, Any], wait: Callable[[Run, int], None]) -> None:
    """The real training with its libraries: staged and trained in the image, all of it by that user."""
    site = user.folder / "site.yaml"
    text = (REPOSITORY / "tests" / "hpc" / "site.yaml").read_text()
    own = f"container: {{use: apptainer, command: {user.singularity}}}\nmodules: [python/3.11]\n"
    site.write_text(text.replace("container: {use: apptainer}\n", own))
    site.chmod(0o644)
    before = user.owns("/tmp")
    small = ["data.num_samples=60", "training.epochs=1", "name=no-home", "checkpoint.every=never"]
    options = [word for setting in small for word in ("--set", setting)]
    answer = user.submits("-m", "launcher.cli", "submit", "tiny", "--site", site, "--partition", "high", "--new", "--json", *options)
    run = Run(Path(answer["folder"]))
    wait(run, 1)
    assert (run.model / "config.json").is_file()
    assert [*run.cache.iterdir()]
    user.assert_untouched()
    assert user.owns("/tmp") - before <= {f"ftlaunch-{user.uid}"}, "left on the node"
