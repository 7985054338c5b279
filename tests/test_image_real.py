"""Images with the real Apptainer, as an unprivileged user: built, tested, entered on two nodes. The ``cpu`` image is kept between runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.image.enter import bind, enter
from launcher.image.rank import rank_command
from launcher.image.unpack import remove_command, unpack_command
from launcher.plan import Container
from tests.conftest import REPOSITORY, Cluster

BUILD = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from launcher.errors import FtlaunchError
from launcher.image.build import ensure_image
from launcher.preset.reading import read_site, read_stack
from launcher.preset.site import Mirrors
wanted = json.loads(sys.argv[1])
stack, site = read_stack(wanted["stack"]), read_site(wanted["site"]).value
site = site.model_copy(update={"mirrors": Mirrors(**wanted["mirrors"])})
say = lambda line: print(json.dumps({"log": line}), flush=True)
own = Path(wanted["template"]) if wanted["template"] else None
try:
    done = ensure_image(stack.value, stack.file.with_suffix(".lock").read_text(), site, Path(wanted["images"]), log=say, own=own)
except FtlaunchError as error:
    print(json.dumps({"error": str(error), "exit": error.exit_code}))
else:
    print(json.dumps({"container": asdict(done)}))
"""
TINY = """Bootstrap: localimage
From: base.sif

%files
    check.py /check.py
%post
    {post}
%labels
    ftlaunch.identity {{{{ identity | line }}}}
%test
    {test}
"""


def build(cluster: Cluster, stack: object, images: Path, *, template: Path | None = None, **mirrors: str) -> list[dict[str, Any]]:
    """``ensure_image`` as the cluster's user; what it said, the result last."""
    done = cluster.run(cluster.python, "-c", BUILD, build_argument(stack, images, template, **mirrors), timeout=3600)
    return [json.loads(line) for line in done.stdout.splitlines()]


def build_argument(stack: object, images: Path, template: Path | None, **mirrors: str) -> str:
    site = str(REPOSITORY / "tests" / "hpc" / "site.yaml")
    return json.dumps(
        {"stack": str(stack), "site": site, "images": str(images), "template": template and str(template), "mirrors": mirrors}
    )


def start(cluster: Cluster, *argv: object) -> subprocess.Popen[str]:
    """A command as the cluster's user that goes on while the test does."""
    shell = f'. "{cluster.root}/env"; export LD_PRELOAD=; exec "$@"'
    command = ["runuser", "-u", cluster.user, "--", "bash", "-c", shell, "-", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=cluster.home)


def next_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> Container:
    """The ``cpu`` image, from the cache or built now."""
    said = build(cluster, "cpu", cluster.home / "images")
    assert "container" in said[-1], said
    return Container(**said[-1]["container"])


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty folder of the cluster's user, with a base image of one shell in it, two megabytes."""
    path = cluster.home / re.sub(r"\W", "-", request.node.name)
    shutil.rmtree(path, ignore_errors=True)
    cluster.run("mkdir", path)
    root = path / "root"
    for place in ("bin", "etc", "mnt", "tmp", "proc", "sys", "dev"):
        (root / place).mkdir(parents=True)
    libraries = re.findall(r"(/\S+)", subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout)
    for file in ["/bin/sh", *libraries]:
        (root / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / file[1:])
    cluster.run("apptainer", "build", path / "base.sif", root)
    yield path
    shutil.rmtree(path)


def small_stack(
    folder: Path, *, post: str = ":", test: str = "true", base: Path | None = None, lock: str | None = None
) -> tuple[Path, Path]:
    """A stack on ``base`` and a template that runs ``post`` and ``test`` and installs nothing."""
    pins = {"torch": "9.9.9", "transformers": "5.23.0"}
    written = {
        "name": "small",
        "base": {"kind": "localimage", "path": str(base or folder / "base.sif")},
        "python": "3.11",
        "packages": pins,
    }
    (folder / "small.yaml").write_text(json.dumps(written))
    (folder / "small.lock").write_text("".join(f"{name}=={version} --hash=sha256:{'0' * 64}\n" for name, version in pins.items()))
    (folder / "small.def.j2").write_text(lock or TINY.format(post=post, test=test))
    return folder / "small.yaml", folder / "small.def.j2"


@pytest.mark.slurm
def test_the_cpu_image(cluster: Cluster, image: Container) -> None:
    record = json.loads(Path(f"{image.image}.json").read_text())
    assert re.match(r"torch 2\.13\.0\+cpu CUDA None accelerate 1\.15\.0 .*; \d+ pins as locked$", record["test"])
    assert record["debian_packages"]["python3.11"].startswith("3.11.2")
    assert 2 * record["bytes"] < record["unpacked_bytes"] < 6 * record["bytes"]
    assert build(cluster, "cpu", cluster.home / "images") == [{"container": json.loads(json.dumps(image.__dict__))}]
    inside = cluster.run(
        *enter(
            image,
            str(image.image),
            ["sh", "-c", "cat /etc/apt/sources.list; grep -r /mnt /etc/apt /opt/venv/pyvenv.cfg /.singularity.d/env; echo $PATH"],
        )
    ).stdout
    assert inside == "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"


@pytest.mark.slurm
def test_a_wrong_pin_fails_the_images_test(cluster: Cluster, image: Container, folder: Path) -> None:
    check = "exec /opt/venv/bin/python /etc/ftlaunch/check.py /etc/ftlaunch/requirements.lock /etc/ftlaunch/stack.json"
    files = "\n".join(f"    {name} /etc/ftlaunch/{name}" for name in ("requirements.lock", "stack.json"))
    definition = f"Bootstrap: localimage\nFrom: base.sif\n%files\n{files}\n%test\n    {check}\n"
    stack, template = small_stack(folder, base=Path(str(image.image)), lock=definition)
    said = build(cluster, stack, folder / "images", template=template)
    assert said[-1]["exit"] == 5
    [log] = (folder / "images" / "logs").iterdir()
    assert "torch is 2.13.0+cpu, the lock pins 9.9.9" in log.read_text()
    assert f"open {log}" in said[-1]["error"]
    assert [path.name for path in (folder / "images").iterdir()] == ["logs"]


@pytest.mark.slurm
def test_a_second_build_waits_for_the_first(cluster: Cluster, folder: Path) -> None:
    cluster.run("mkdir", folder / "wheels")
    cluster.run("mkfifo", folder / "wheels" / "go")
    (folder / "wheels" / "go").chmod(0o666)
    stack, template = small_stack(folder, post="read go < /mnt/find-links-0/go", test="[ -e /check.py ]")
    images, wheels = folder / "images", str(folder / "wheels")
    argument = build_argument(stack, images, template, pip_index="https://mirror.invalid", pip_find_links=wheels)
    builders = [start(cluster, cluster.python, "-uc", BUILD, argument)]
    assert "building" in next_line(builders[0])["log"]
    builders.append(start(cluster, cluster.python, "-uc", BUILD, argument))
    assert "waiting for it" in next_line(builders[1])["log"]
    gate = os.open(folder / "wheels" / "go", os.O_RDWR)
    os.write(gate, b"go\n")
    rests = [[json.loads(line) for line in builder.communicate(timeout=120)[0].splitlines()] for builder in builders]
    os.close(gate)
    assert ["built" in line.get("log", "") for line in rests[0]] == [True, False], rests
    assert rests[1] == rests[0][1:]
    assert Path(rests[1][0]["container"]["image"]).is_file()
    assert sorted(path.suffix for path in images.iterdir()) == ["", ".json", ".sif"]


# ---- on the nodes

ON_NODE = """
import os, signal, sys
signal.signal(signal.SIGUSR2, lambda *_: os._exit(85))  # at once, as the trainer leaves: the same signal can come twice
import torch
said = [os.environ.get(name) for name in ("SLURMD_NODENAME", "SLURM_PROCID", "A", "LD_PRELOAD")]
print("up", torch.__version__, *said, flush=True)
print("bound", os.listdir(sys.argv[1]), os.path.exists(os.environ["HOME"]), os.getcwd(), flush=True)
while True: signal.pause()
"""


@pytest.mark.slurm
def test_entered_on_two_nodes_unpacked_and_removed(cluster: Cluster, image: Container) -> None:
    """As a supervisor does it: one step that unpacks, one step of ranks, a signal to it, one step that removes."""
    folder = cluster.home / "entered, with a comma: and colon"
    cluster.run("mkdir", "-p", folder)
    (folder / "x.py").write_text(ON_NODE)
    shared = str(cluster.home / "nodes")
    options = ["--account=project", "--partition=high", "--nodes=2", "--cpus-per-task=1", "--mem=4G", "--time=10"]
    job = cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap=sleep 600")
    number = job.stdout.strip()
    here = ["srun", "--nodes=2", "--ntasks-per-node=1", "--mpi=none", f"--jobid={number}", "--overlap"]
    try:
        wait = ["bash", "-c", 'until [ "$(squeue -h -o %T -j "$1")" = RUNNING ]; do sleep 0.2; done', "-", number]
        cluster.run(*wait, timeout=120)
        step = unpack_command(str(cluster.python), str(image.image), image.command, ["$NOT_SET", "/tmp"], shared=shared, job=number, life=0)
        said = [json.loads(line) for line in cluster.run(*here, *step).stdout.splitlines()]
        assert sorted((line["node"], line["mode"]) for line in said) == [("node1", "unpack"), ("node2", "unpack")]
        images = [Path(line["image"]) for line in said]
        assert all((image / "opt" / "venv" / "bin" / "python3").exists() for image in images)

        rank = rank_command(
            str(cluster.python),
            image,
            ["python3", str(folder / "x.py"), str(folder)],
            job=number,
            life=0,
            shared=shared,
            binds=[bind(str(folder))],
            env={"A": "$(id), b"},
            cwd=str(folder),
        )
        ranks = start(cluster, *here, *rank)
        assert ranks.stdout is not None
        lines = sorted(ranks.stdout.readline() for _ in range(4))
        assert all(lines), ranks.communicate()
        assert lines[2:] == [f"up 2.13.0+cpu node{n + 1} {n} $(id), b None\n" for n in (0, 1)]
        assert lines[:2] == [f"bound ['x.py'] False {folder}\n"] * 2
        cluster.run("scancel", "--signal=USR2", f"{number}.1")
        _, errors = ranks.communicate(timeout=60)
        assert ranks.returncode == 85, errors
        cluster.run(*here, *remove_command(str(cluster.python), shared=shared, job=number, life=0))
        assert not any(image.parent.exists() for image in images)
    finally:
        cluster.run("scancel", number)
        shutil.rmtree(folder)


# ---- an image that the user brings


VERIFY = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from launcher.errors import FtlaunchError
from launcher.image.verify import verify_image
from launcher.preset.reading import read_site
try:
    print(json.dumps(asdict(verify_image(Path(sys.argv[1]), read_site(sys.argv[2]).value))))
except FtlaunchError as error:
    print(json.dumps({"error": str(error), "exit": error.exit_code}))
"""


@pytest.mark.slurm
def test_an_image_that_the_user_brings(cluster: Cluster, image: Container, folder: Path) -> None:
    def verify(path: object) -> Any:
        site = REPOSITORY / "tests" / "hpc" / "site.yaml"
        return json.loads(cluster.run(cluster.python, "-c", VERIFY, path, site).stdout.splitlines()[-1])

    found = verify(image.image)
    assert (found["python"].rpartition(".")[0], found["versions"]["torch"], found["cuda"]) == ("3.11", "2.13.0+cpu", None)
    assert found["findings"] == []
    small = verify(folder / "base.sif")
    assert small["exit"] == 2
    assert "its python3 does not answer" in small["error"]


@pytest.mark.slurm
@pytest.mark.image_cuda
def test_the_source_stack(cluster: Cluster) -> None:
    said = build(cluster, "torch2.3-cu121", cluster.home / "images")
    assert "container" in said[-1], said
    record = json.loads(Path(f"{said[-1]['container']['image']}.json").read_text())
    assert record["test"].startswith("torch 2.3.0+cu121 CUDA 12.1 accelerate 0.30.1 ")
    assert "transformers 4.41.1" in record["test"]
