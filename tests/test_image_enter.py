"""The command line into an image, what it may see, and the rank that becomes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.image.enter import bind, clean_environment, enter, mount
from launcher.image.rank import rank_command
from launcher.image.unpack import link
from launcher.plan import Container

CONTAINER = Container("apptainer", "/images/x.sif", None, "/usr/bin/apptainer", ("/data:/data:ro",), {"A": "site", "B": "site"})


def test_the_whole_line() -> None:
    line = enter(CONTAINER, "/node/image", ["python3", "-m", "x y"], binds=["/run"], env={"A": "$(id), 'x'"}, gpus=True, cwd="/run")
    assert line == [
        *("/usr/bin/apptainer", "exec", "--no-home", "--no-mount", "cwd", "--no-eval", "--nv"),
        *("--mount", "type=bind,source=/data,destination=/data,ro", "--mount", "type=bind,source=/run,destination=/run"),
        *("--pwd", "/run", "/node/image"),
        *("env", "PYTHONNOUSERSITE=1", "A=$(id), 'x'", "B=site", "python3", "-m", "x y"),
    ]


def test_without_gpus_and_folder() -> None:
    line = enter(Container("apptainer", "x"), "x.sif", ["true"])
    assert line == ["apptainer", "exec", "--no-home", "--no-mount", "cwd", "--no-eval", "x.sif", "env", "PYTHONNOUSERSITE=1", "true"]


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        ("/a", "type=bind,source=/a,destination=/a"),
        ("/a:/b", "type=bind,source=/a,destination=/b"),
        ("/a:/b:ro", "type=bind,source=/a,destination=/b,ro"),
        ("/a:/b:rw,image-src=/x", "type=bind,source=/a,destination=/b,image-src=/x"),
        (bind("/a, b: \\c", read_only=True), 'type=bind,"source=/a, b: \\c","destination=/a, b: \\c",ro'),
        (bind('/a"', "/b"), 'type=bind,"source=/a""",destination=/b'),
    ],
)
def test_binds(value: str, spec: str) -> None:
    assert mount(value) == ["--mount", spec]


@pytest.mark.parametrize("value", ["", "a", "/a:b", "/a:/b:ro:x", "/a:", "/a\\", "/a,/etc:etc"])
def test_what_is_no_bind(value: str) -> None:
    with pytest.raises(UsageError, match="is not a bind"):
        enter(CONTAINER, "x", ["true"], binds=[value])


def test_what_of_the_host_is_kept() -> None:
    kept = {
        "SLURM_JOB_ID": "1",
        "SLURMD_NODENAME": "n",
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
        "RANK": "0",
        "HF_TOKEN": "x",
        "PATH": "/bin",
    }
    left = {
        **{
            "PYTHONPATH": "/x",
            "PYTHONHOME": "/x",
            "LD_LIBRARY_PATH": "/x",
            "LD_PRELOAD": "x",
            "APPTAINER_BIND": "/",
            "APPTAINERENV_A": "1",
        },
        **{"SINGULARITY_BINDPATH": "/", "TMPDIR": "/x", "VIRTUAL_ENV": "/x", "CONDA_PREFIX": "/x", "SSL_CERT_FILE": "/x", "BASH_ENV": "/x"},
    }
    assert clean_environment({**kept, **left}) == kept


def leave_image(folder: Path, name: str) -> Path:
    """What ``unpack`` leaves, for the rank to find."""
    place = link("7", 2, "node1", links=folder)
    place.parent.mkdir(parents=True)
    (folder / name).mkdir()
    place.symlink_to(folder / name)
    return folder / name


def rank_process(tmp_path: Path, argv: list[str], **environment: str) -> subprocess.Popen[str]:
    """A rank on the virtual node ``node1`` whose Apptainer is a script; LINKS points to a folder of the test."""
    fake = tmp_path / "apptainer"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != env ]; do last=$1; shift; done\nexport IMAGE_USED="$last"\nexec "$@"\n')
    fake.chmod(0o755)
    container, inside = Container("apptainer", "x.sif", command=str(fake)), {"PYTHONPATH": "/inside"}
    line = rank_command(sys.executable, container, argv, job="7", life=2, shared=str(tmp_path / "shared"), env=inside)
    links = f"pathlib.Path({str(tmp_path / 'links')!r})"
    start = "import sys, pathlib, launcher.image.rank as r; "
    start += f"r.find.__kwdefaults__['links'] = r.link.__kwdefaults__['links'] = {links}; "
    assert line[:3] == [sys.executable, "-m", "launcher.image.rank"]
    code = start + "sys.exit(r.main(sys.argv[1:]))"
    own = {**os.environ, "SLURMD_NODENAME": "node1", **environment}
    return subprocess.Popen([sys.executable, "-c", code, *line[3:]], env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("place", ["links", "shared"])
def test_a_rank_finds_its_nodes_image(tmp_path: Path, place: str) -> None:
    image = leave_image(tmp_path / place, "unpacked")
    show = "import os; print(os.environ['IMAGE_USED'], os.environ['PYTHONPATH'], os.environ.get('LD_PRELOAD'), os.environ['RANK'])"
    rank = rank_process(tmp_path, [sys.executable, "-c", show], LD_PRELOAD="", RANK="3")
    out, err = rank.communicate()
    assert (out, err, rank.returncode) == (f"{image} /inside None 3\n", "", 0)


def test_a_rank_is_the_process_that_was_started(tmp_path: Path) -> None:
    """So a signal to it reaches the container, and the exit code is the container's."""
    leave_image(tmp_path / "links", "unpacked")
    wait = (
        "import signal, sys, os\nsignal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))\n"
        "print(os.getpid(), flush=True)\nwhile True: signal.pause()"
    )
    rank = rank_process(tmp_path, [sys.executable, "-c", wait])
    assert rank.stdout is not None
    assert int(rank.stdout.readline()) == rank.pid
    rank.send_signal(signal.SIGUSR2)
    rank.communicate()
    assert rank.returncode == 85


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a folder away")
def test_a_rank_does_not_start_somebody_elses_image(tmp_path: Path) -> None:
    """In /tmp another user can make the folder that we would have made."""
    leave_image(tmp_path / "links", "planted")
    image = leave_image(tmp_path / "shared", "ours")
    os.chown(tmp_path / "links" / f"ftlaunch-{os.getuid()}", 12345, 12345)
    rank = rank_process(tmp_path, [sys.executable, "-c", "import os; print(os.environ['IMAGE_USED'])"])
    assert rank.communicate() == (f"{image}\n", "")


def test_a_rank_without_an_image_says_so(tmp_path: Path) -> None:
    rank = rank_process(tmp_path, ["true"])
    _, err = rank.communicate()
    assert rank.returncode == 4
    assert err.endswith("node1-7-2/image is missing: the image of job 7, life 2 was not unpacked on this node\n")
