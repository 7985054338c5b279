"""The image on a node: which disk, how, and what is cleaned up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import ActionError, GateError
from launcher.image.disk import Disk, Space, choose_folder, private_folder, space_of
from launcher.image.sweep import Owner, job_is_alive, remove_tree, sweep
from launcher.image.unpack import link, mounts_by_kernel, node_name, remove, remove_command, unpack, unpack_command, unpacked_bytes
from launcher.run import boot_id, process_start

GIB = 1 << 30
DISK = Space(100 * GIB, None, False)
ME = Owner("node1", "7", 2, "host", "boot")


def folders(tmp_path: Path, *names: str) -> list[str]:
    for name in names:
        (tmp_path / name).mkdir()
    return [str(tmp_path / name) for name in names]


# ---- which disk


@pytest.mark.parametrize(
    ("spaces", "chosen"),
    [
        ([DISK, DISK], Disk(Path("a"), False)),
        ([Space(2 * GIB, None, False), DISK], Disk(Path("b"), False)),
        ([Space(100 * GIB, 5, False), DISK], Disk(Path("b"), False)),
        ([Space(100 * GIB, None, True), DISK], Disk(Path("b"), False)),
        ([Space(100 * GIB, None, True), Space(2 * GIB, None, False)], Disk(Path("a"), True)),
    ],
    ids=["first", "too-small", "too-few-files", "disk-before-memory", "memory-at-last"],
)
def test_the_first_disk_with_room(tmp_path: Path, spaces: list[Space], chosen: Disk) -> None:
    named = folders(tmp_path, "a", "b")
    found = choose_folder(named, 2 * GIB, environ={}, space=lambda folder: spaces[named.index(str(folder))])
    assert found == Disk(tmp_path / chosen.folder, chosen.ram_backed)


def test_variables_are_those_of_the_node(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    environ = {"SCRATCH": str(tmp_path)}
    for written in ("$SCRATCH/sub", "${SCRATCH}/sub"):
        assert choose_folder([written], 0, environ=environ, space=lambda _: DISK).folder == tmp_path / "sub"


def test_no_disk_says_why_of_each(tmp_path: Path) -> None:
    named = ["$NOT_SET", "relative", str(tmp_path / "missing"), *folders(tmp_path, "small", "memory")]
    spaces = {"small": Space(GIB, None, False), "memory": Space(GIB, None, True)}
    with pytest.raises(GateError) as error:
        choose_folder(named, 2 * GIB, environ={}, space=lambda folder: spaces[folder.name])
    assert str(error.value).removesuffix(" (name one in local_disk of the site)").split(": ", 1) == [
        "no local disk has room for the unpacked image (2.0 GiB and 1.0 GiB to spare)",
        f"$NOT_SET is not set; relative is not an absolute path; {tmp_path}/missing is not there; {tmp_path}/small has 1.0 GiB; "
        f"{tmp_path}/memory has 1.0 GiB of memory",
    ]


def test_memory_counts_by_half_of_what_is_left(tmp_path: Path) -> None:
    mounts, memory, cgroup = tmp_path / "mounts", tmp_path / "meminfo", tmp_path / "cgroup"
    memory.write_text("MemTotal: 100 kB\nMemAvailable: 1024 kB\n")
    cgroup.write_text("0::/no/such/group\n")
    for kind, ram_backed in (("tmpfs", True), ("ext4", False)):
        mounts.write_text(f"dev / ext4 rw 0 0\ndev {tmp_path.parent} {kind} rw 0 0\n")
        space = space_of(tmp_path, str(mounts), str(memory), str(cgroup))
        assert space.ram_backed is ram_backed
        assert (space.free_bytes == 512 * 1024) is ram_backed


def test_a_folder_in_a_public_place_is_private_or_refused(tmp_path: Path) -> None:
    folder = private_folder(tmp_path)
    assert (folder.name, folder.stat().st_mode & 0o777) == (f"ftlaunch-{os.getuid()}", 0o700)
    folder.chmod(0o777)
    assert private_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to("/tmp")
    with pytest.raises(GateError, match="is not this user's folder"):
        private_folder(tmp_path)


# ---- unpacking, with a script for Apptainer


def apptainer(tmp_path: Path, *, setuid: bool = False, build: str = 'mkdir "$3" && echo hello > "$3/file"') -> str:
    """A script that says how it was built, and makes the folder that it is asked for."""
    libexec = tmp_path / "libexec"
    starter = libexec / "apptainer" / "bin" / "starter-suid"
    starter.parent.mkdir(parents=True)
    (tmp_path / "apptainer.conf").write_text("# allow setuid = no\nallow setuid = yes\n")
    if setuid:
        starter.write_text("")
        starter.chmod(0o4755)
    script = tmp_path / "apptainer"
    facts = f"LIBEXECDIR={libexec}\\nAPPTAINER_CONF_FILE={tmp_path}/apptainer.conf\\n"
    script.write_text(f"#!/bin/sh\ncase $1 in buildcfg) printf '{facts}' ;; build) {build} ;; esac\n")
    script.chmod(0o755)
    return str(script)


def image_file(tmp_path: Path) -> str:
    image = tmp_path / "x.sif"
    image.write_bytes(b"x" * 1000)
    return str(image)


def test_unpacked_to_another_disk_and_removed(tmp_path: Path) -> None:
    links, disk = (Path(path) for path in folders(tmp_path, "links", "disk"))
    arguments = (image_file(tmp_path), apptainer(tmp_path), [str(disk)])
    first = unpack(*arguments, job="7", life=2, node="node1", links=links)
    folder = disk / f"ftlaunch-{os.getuid()}" / "node1-7-2"
    assert (first.mode, first.image, first.bytes, first.ram_backed, first.swept) == ("unpack", str(folder / "image"), 4000, False, [])
    assert link("7", 2, "node1", links=links).resolve() == folder / "image"
    assert sorted(path.name for path in folder.iterdir()) == ["image", "owner.json"]
    again = unpack(*arguments, job="7", life=2, node="node1", links=links)
    assert (again.mode, again.image) == ("unpack", first.image)
    remove(job="7", life=2, node="node1", links=links)
    remove(job="7", life=2, node="node1", links=links)
    assert [*folder.parent.iterdir(), *(links / folder.parent.name).iterdir()] == []
    assert os.path.exists(arguments[0])


def test_unpacked_where_the_links_are(tmp_path: Path) -> None:
    done = unpack(image_file(tmp_path), apptainer(tmp_path), [str(tmp_path)], job="7", life=0, node="node1", links=tmp_path)
    place = link("7", 0, "node1", links=tmp_path)
    assert done.image == str(place)
    assert place.is_dir() and not place.is_symlink()
    remove(job="7", life=0, node="node1", links=tmp_path)
    assert list(place.parent.parent.iterdir()) == []


def test_two_nodes_of_one_host(tmp_path: Path) -> None:
    arguments = (image_file(tmp_path), apptainer(tmp_path), [str(tmp_path)])
    images = [unpack(*arguments, job="7", life=0, node=node, links=tmp_path).image for node in ("node1", "node2")]
    remove(job="7", life=0, node="node1", links=tmp_path)
    assert [Path(image).is_dir() for image in images] == [False, True]


@pytest.mark.parametrize("mode", ["file", "auto"])
def test_the_file_itself_where_the_kernel_mounts_it(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.image.unpack.mounts_by_kernel", lambda command: mode == "auto")
    image = image_file(tmp_path)
    done = unpack(image, apptainer(tmp_path), [], job="7", life=0, node="node1", mode=mode, links=tmp_path)
    assert (done.mode, done.image, done.bytes) == ("file", image, 0)
    remove(job="7", life=0, node="node1", links=tmp_path)
    assert Path(image).exists()


def test_a_failed_unpacking_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    links, disk = folders(tmp_path, "links", "disk")
    broken = apptainer(tmp_path, build='mkdir "$3"; echo "no space left" >&2; exit 255')
    with pytest.raises(ActionError, match="ended with 255: no space left"):
        unpack(image_file(tmp_path), broken, [disk], job="7", life=0, node="node1", links=Path(links))
    assert list(Path(disk, f"ftlaunch-{os.getuid()}").iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root owns a setuid program")
@pytest.mark.parametrize(("setuid", "settings", "kernel"), [(True, "", True), (True, "allow setuid = no\n", False), (False, "", False)])
def test_who_mounts(tmp_path: Path, setuid: bool, settings: str, kernel: bool) -> None:
    command = apptainer(tmp_path, setuid=setuid)
    with (tmp_path / "apptainer.conf").open("a") as file:
        file.write(settings)
    assert mounts_by_kernel(command) is kernel


def test_the_record_knows_the_size(tmp_path: Path) -> None:
    image = image_file(tmp_path)
    Path(f"{image}.json").write_text(json.dumps({"unpacked_bytes": 123}))
    assert unpacked_bytes(image) == 123


def test_the_step_prints_one_line(tmp_path: Path) -> None:
    """The commands as a supervisor gives them to srun, on a node with a name of its own."""
    image, job = image_file(tmp_path), f"test{os.getpid()}"
    own = {**os.environ, "SLURMD_NODENAME": "nodeX"}
    step = unpack_command(sys.executable, image, apptainer(tmp_path), ["$NOT_SET", str(tmp_path)], job=job, life=1)
    done = subprocess.run(step, env=own, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (said["node"], said["mode"], Path(said["image"]).is_dir()) == ("nodeX", "unpack", True)
    undone = subprocess.run(remove_command(sys.executable, job=job, life=1), env=own, capture_output=True, text=True, check=True)
    assert json.loads(undone.stdout) == {"node": "nodeX", "removed": True}
    assert not Path(said["image"]).exists()
    refused = subprocess.run(
        [*step[:3], "--image", image, *step[5:7], "--job", job, "--life", "2"], env=own, capture_output=True, text=True
    )
    assert (refused.returncode, json.loads(refused.stdout)["error"].split(":")[0]) == (
        3,
        "no local disk has room for the unpacked image (0.0 GiB and 1.0 GiB to spare)",
    )
    remove(job=job, life=2, node="nodeX")


def test_the_nodes_name() -> None:
    assert node_name({"SLURMD_NODENAME": "node2"}) == "node2"
    assert node_name({}) == os.uname().nodename


# ---- what the dead left


def test_what_is_swept_and_what_stays(tmp_path: Path) -> None:
    here = {"host": "host", "boot_id": "boot"}
    owners = {
        "older-life": (Owner("node1", "7", 1, **here), True),
        "this-life": (Owner("node1", "7", 2, **here), False),
        "newer-life": (Owner("node1", "7", 3, **here), False),
        "older-life-of-another-node": (Owner("node2", "7", 1, **here), False),
        "before-the-reboot": (Owner("node1", "local", 0, "host", "an older boot"), True),
        "another-host": (Owner("node1", "8", 0, "elsewhere", "another boot"), False),
        "ended-job": (Owner("node1", "9", 0, **here), True),
        "running-job": (Owner("node1", "10", 0, **here), False),
    }
    for name, (owner, _) in owners.items():
        (tmp_path / name).mkdir()
        owner.write(tmp_path / name)
    (tmp_path / "no-owner").mkdir()
    removed = sweep(tmp_path, ME, is_job_alive={"8": None, "9": False, "10": True}.get)
    assert sorted(path.name for path in removed) == sorted(name for name, (_, dead) in owners.items() if dead)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["no-owner", *(name for name, (_, dead) in owners.items() if not dead)]
    )


def test_a_folder_without_scheduler_lives_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    me = Owner("node1", "new", 0, "host", boot_id())
    (tmp_path / "x").mkdir()
    Owner("node1", "old", 0, "host", boot_id(), process.pid, process_start(process.pid)).write(tmp_path / "x")
    assert sweep(tmp_path, me, is_job_alive=lambda job: False) == []
    process.kill()
    process.communicate()
    assert sweep(tmp_path, me, is_job_alive=lambda job: None) == [tmp_path / "x"]


@pytest.mark.parametrize(
    ("script", "alive"),
    [
        ("echo RUNNING", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ],
    ids=["runs", "ended", "unknown", "no-answer"],
)
def test_asking_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, alive: bool | None) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert job_is_alive("7") is alive
    monkeypatch.setenv("PATH", "/nowhere:/bin")
    assert job_is_alive("7", str(squeue)) is alive
    squeue.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_is_alive("7") is None


def test_unwritable_folders_are_removed_and_links_not_followed(tmp_path: Path) -> None:
    outside, inner = tmp_path / "outside", tmp_path / "tree" / "closed" / "deeper"
    outside.mkdir()
    (outside / "file").write_text("stays")
    inner.mkdir(parents=True)
    (inner / "file").write_text("goes")
    (inner / "link").symlink_to(outside)
    inner.chmod(0)
    inner.parent.chmod(0o500)
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "file").read_text() == "stays"


def test_nodes_that_share_a_disk_sweep_at_the_same_time(tmp_path: Path) -> None:
    """Each meets folders that another one has renamed and is removing."""
    for _ in range(10):
        for folder in (tmp_path / "x", tmp_path / ".dead-1-y"):
            for number in range(40):
                (folder / str(number)).mkdir(parents=True)
                (folder / str(number) / "file").touch()
            Owner("node1", "9", 0, "host", boot_id()).write(folder)
        with ThreadPoolExecutor(4) as nodes:
            swept = list(
                nodes.map(lambda job: sweep(tmp_path, Owner("n", job, 0, "host", boot_id()), is_job_alive=lambda _: False), "abcd")
            )
        assert {path.name for paths in swept for path in paths} >= {"x", ".dead-1-y"}
        assert list(tmp_path.iterdir()) == []
