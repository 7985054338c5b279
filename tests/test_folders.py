"""Where things are written: caches of the libraries, the image where no disk takes it, memory that plays disk, a home nobody may write."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.caches import MAKE_CACHE, NARROWER, cache_environment, cache_of_site, make_cache
from launcher.errors import ActionError, GateError, UsageError
from launcher.image.disk import Disk, Space, choose_folder, space_of
from launcher.image.unpack import find, read_log, remove, unpack
from launcher.node import Node, node_here
from launcher.observe import learned_ram_disk_gib
from launcher.plan import Container, Memory
from launcher.ranks import Place, local_environment, rank_command, step_command
from launcher.run import Run
from tests.plans import FACTS, plan_of, preset, site, worst
from tests.test_image_unpack import DISK, GIB, apptainer, folders, image_file
from tests.toy import toy_plan, toy_run

RUN = Run(Path("/runs/toy-01234567"))
HERE = Place(3, "127.0.0.1", 4000, "/venv/bin/python", "toy-01234567-99")
IN_JOB = dataclasses.replace(HERE, srun="/slurm/bin/srun")
MEMORY = Space(100 * GIB, None, True)

NOWHERE = "/proc/nobody-can-write-here"
"""Not even root."""

# ---- caches

ASK_THE_LIBRARIES = """
import json, os, warnings
warnings.simplefilter("ignore")
import datasets.config, huggingface_hub.constants as hub, matplotlib, torch, torch.utils.cpp_extension as extension
from torch._inductor.runtime.cache_dir_utils import cache_dir
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME
from accelerate.commands.config.config_args import cache_dir as accelerate_dir
found = {
    "hub": hub.HF_HUB_CACHE, "token": hub.HF_TOKEN_PATH, "datasets": datasets.config.HF_DATASETS_CACHE,
    "modules": datasets.config.HF_MODULES_CACHE, "matplotlib": matplotlib.get_cachedir(), "matplotlib settings": matplotlib.get_configdir(),
    "torch": torch.hub.get_dir(), "extensions": extension._get_build_directory("x", False), "inductor": cache_dir(),
    "accelerate": accelerate_dir, "kernels": os.environ["CUDA_CACHE_PATH"], "triton": os.environ["TRITON_CACHE_DIR"],
}
print(json.dumps({name: str(path) for name, path in found.items()}))
"""


@pytest.mark.train
def test_every_library_keeps_to_the_folder_whatever_the_login_says(tmp_path: Path) -> None:
    """Asked of the libraries themselves, with a home that cannot be written and the variables that users set."""
    login = {**os.environ, "HOME": NOWHERE, **{name: f"{NOWHERE}/{name}" for name in (*NARROWER, *cache_environment(tmp_path))}}
    environ = local_environment(Run(tmp_path), toy_plan(), HERE, 0, login)
    asked = subprocess.run([sys.executable, "-c", ASK_THE_LIBRARIES], env=environ, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    assert {name: path for name, path in found.items() if not path.startswith(f"{tmp_path}/cache/")} == {}


def test_a_site_names_one_folder_for_all_runs_with_an_image() -> None:
    plan = toy_plan(site={"cache": "$FAST/caches"}, container=Container("apptainer", "/x.sif", "0123456789abcdef"))
    cache = cache_of_site(plan, {"FAST": "/fast", "FAS": "/wrong"})
    assert cache == f"/fast/caches/ftlaunch-{os.getuid()}-0123456789ab"
    assert cache_of_site(toy_plan(site={"cache": "/c"}), {}) == f"/c/ftlaunch-{os.getuid()}-host"
    assert cache_of_site(toy_plan(), {}) is None
    place = dataclasses.replace(IN_JOB, cache=cache)
    command = rank_command(RUN, plan, place)
    assert f"type=bind,source={cache},destination={cache}" in command and f"HF_HOME={cache}/huggingface" in command
    shell = step_command(RUN, plan, place)
    assert shell[shell.index("-c") + 1].startswith(MAKE_CACHE)


@pytest.mark.parametrize("written", ["$NOT_SET/c", "relative", "~/c"])
def test_a_cache_that_is_no_folder_on_the_node_is_refused(written: str) -> None:
    with pytest.raises(UsageError, match=r"site here: cache: .*: not an absolute path, or a variable that is not set on the node"):
        cache_of_site(toy_plan(site={"cache": written}), {"HOME": "/home/me"})


def by_shell(folder: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{MAKE_CACHE} exit 0"], env={**os.environ, "FTLAUNCH_CACHE": str(folder)}, stderr=subprocess.PIPE)
    if done.returncode == 93:
        raise GateError(done.stderr.decode(), code="cache")
    assert done.returncode == 0


@pytest.mark.parametrize("make", [make_cache, by_shell], ids=["python", "shell"])
def test_a_cache_is_this_users_or_not_used(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "a" / "b")
    make(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(GateError):
        make(tmp_path / "link")
    with pytest.raises(GateError):
        make(Path(NOWHERE))
    if os.getuid() == 0:
        os.chown(tmp_path / "a" / "b", 12345, 12345)
        with pytest.raises(GateError):
            make(tmp_path / "a" / "b")


# ---- a home that cannot be written

SMALL = """\
extends: tiny
name: small
data: {num_samples: 60}
training: {effective_batch: 5, micro_batch: 5, epochs: 1}
"""


@pytest.mark.train
def test_a_run_needs_no_home(tmp_path: Path) -> None:
    """From ``submit`` to the plots, without a container: all libraries of the training, none of which may write to home."""
    (tmp_path / "small.yaml").write_text(SMALL)
    own = {"HOME": NOWHERE, "FTLAUNCH_DATA": str(tmp_path / "data"), "FTLAUNCH_IMAGES": str(tmp_path / "images"), "TMPDIR": str(tmp_path)}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    line = [sys.executable, "-m", "launcher.cli", "submit", "small.yaml", "--follow"]
    done = subprocess.run(line, cwd=tmp_path, env={**environ, **own}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tmp_path.glob("runs/*/run.json")
    run = Run(record.parent)
    assert run.events("finished") and (run.model / "config.json").is_file()
    assert {path.name for path in run.report.iterdir()} == {"train-loss.png", "eval-loss.png", "learning-rate.png"}


# ---- a node without a disk


def test_where_an_image_goes_in_which_order(tmp_path: Path) -> None:
    """Local disk, memory that leaves the ranks what they need, the shared file system, nowhere."""
    named, shared = folders(tmp_path, "disk", "memory"), tmp_path / "shared"
    shared.mkdir()

    def chosen(**spaces: Space) -> Disk:
        full = Space(0, None, False)
        return choose_folder(named, 2 * GIB, environ={}, shared=shared, space=lambda folder: spaces.get(folder.name, full))

    assert chosen(disk=DISK, memory=MEMORY, shared=DISK) == Disk(tmp_path / "disk", False)
    assert chosen(memory=MEMORY, shared=DISK) == Disk(tmp_path / "memory", True)
    assert chosen(shared=DISK) == Disk(shared, False, shared=True)
    with pytest.raises(GateError, match=r"disk has 0\.0 GiB; .*memory has 0\.0 GiB; .*shared has 0\.0 GiB"):
        chosen()


def test_memory_is_room_as_far_as_the_ranks_leave_it(tmp_path: Path) -> None:
    mounts, memory, cgroup = tmp_path / "mounts", tmp_path / "meminfo", tmp_path / "cgroup"
    memory.write_text(f"MemAvailable: {3 * GIB // 1024} kB\n")
    cgroup.write_text("0::/no/such/group\n")
    mounts.write_text("tmpfs / tmpfs rw 0 0\n")
    files = (str(mounts), str(memory), str(cgroup))
    free = [space_of(tmp_path, *files, ranks_bytes=ranks).free_bytes for ranks in (None, 1 * GIB, 5 * GIB)]
    assert free == [3 * GIB // 2, 2 * GIB, 0]


def test_shared_memory_of_this_machine_is_recognised() -> None:
    mounted = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert ["/dev/shm", "tmpfs"] in mounted, "this machine has no /dev/shm to try it on"
    assert space_of(Path("/dev/shm")).ram_backed
    assert not space_of(Path("/proc")).ram_backed


def test_without_a_disk_the_image_is_unpacked_in_the_run(tmp_path: Path) -> None:
    links, shared = tmp_path / "links", tmp_path / "nodes"
    links.mkdir()
    arguments = (image_file(tmp_path), apptainer(tmp_path), ["$NOT_SET", str(tmp_path / "missing")])
    for node in ("node1", "node2"):
        done = unpack(*arguments, job="7", life=2, node=node, shared=shared, links=links)
        assert (done.shared, done.ram_backed, done.mode) == (True, False, "unpack")
        assert Path(done.image).is_relative_to(shared) and Path(done.image, "file").is_file()
        found = find("7", 2, node, shared, links=links)
        assert found is not None and found.is_relative_to(links)
    remove(job="7", life=2, node="node1", shared=shared, links=links)
    assert find("7", 2, "node1", shared, links=links) is None and find("7", 2, "node2", shared, links=links) is not None
    remove(job="7", life=2, node="node2", shared=shared, links=links)
    assert not shared.exists() and not [*(links / f"ftlaunch-{os.getuid()}").iterdir()]


def test_without_even_a_tmp_the_links_lie_in_the_run(tmp_path: Path) -> None:
    shared, nowhere = tmp_path / "nodes", Path(NOWHERE).parent
    done = unpack(image_file(tmp_path), apptainer(tmp_path), [], job="7", life=2, node="node1", shared=shared, links=nowhere)
    found = find("7", 2, "node1", shared, links=nowhere)
    assert done.shared and found is not None and str(found) == done.image
    remove(job="7", life=2, node="node1", shared=shared, links=nowhere)
    assert not shared.exists()


def test_a_kernel_mount_needs_no_disk(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    image = image_file(tmp_path)
    done = unpack(
        image, apptainer(tmp_path), [], job="7", life=2, node="n", mode="file", shared=tmp_path / "nodes", links=tmp_path / "links"
    )
    assert (done.image, done.bytes, done.shared) == (image, 0, False)


def test_a_failed_unpacking_leaves_nothing_in_the_run(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    broken, shared = apptainer(tmp_path, build='mkdir "$3"; echo "Disk quota exceeded" >&2; exit 255'), tmp_path / "nodes"
    with pytest.raises(ActionError, match="Disk quota exceeded"):
        unpack(image_file(tmp_path), broken, [], job="7", life=2, node="node1", shared=shared, links=tmp_path / "links")
    assert list((shared / f"ftlaunch-{os.getuid()}").iterdir()) == []


def node_of(tmp_path: Path, **changes: Any) -> Node:
    """The supervisor's view of this machine, for a run with an image whose Apptainer is a script."""
    container = Container("apptainer", image_file(tmp_path), "0" * 64, apptainer(tmp_path))
    place = {"local_disk": [NOWHERE], "container": {"use": "apptainer"}}
    run = toy_run(tmp_path / "runs", toy_plan(site=place, container=container, **changes))
    run.life(0).mkdir(parents=True)
    return node_here(run, run.plan(), 0)


def test_the_supervisor_says_so_and_cleans_up(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    (remark,) = node.prepare(lambda: False)
    assert "no disk has room for the image: it is on the shared file system, in " in remark
    (said,) = read_log(node.run.unpack_log(0).read_text())
    assert said["shared"] and said["image"].startswith(str(node.run.life(0) / "nodes"))
    node.clean()
    assert not (node.run.life(0) / "nodes").exists()


# ---- what memory that plays disk means for the plan


def life_that_unpacked(tmp_path: Path, *, ram_backed: bool, partition: str = "gpu") -> None:
    plan = toy_plan(site={"name": "cluster"}, hardware={"name": "node"}, slurm={"partition": partition})
    run = toy_run(tmp_path, plan, new=True)
    run.append_event("started", life=0)
    run.life(0).mkdir(parents=True)
    lines = [{"node": f"n{size}", "mode": "unpack", "bytes": size * GIB, "ram_backed": ram_backed} for size in (7, 6)]
    run.unpack_log(0).write_text("a word of srun's\n" + "".join(json.dumps(line) + "\n" for line in lines))


def test_an_earlier_life_tells_that_a_disk_is_memory(tmp_path: Path) -> None:
    assert learned_ram_disk_gib(tmp_path, "cluster", "node", "gpu") == 0
    life_that_unpacked(tmp_path, ram_backed=True)
    life_that_unpacked(tmp_path, ram_backed=False, partition="disks")
    assert learned_ram_disk_gib(tmp_path, "cluster", "node", "gpu") == 7
    assert learned_ram_disk_gib(tmp_path, "cluster", "node", "disks") == 0
    life_that_unpacked(tmp_path, ram_backed=False)
    assert learned_ram_disk_gib(tmp_path, "cluster", "node", "gpu") == 0, "the newest life counts"


def test_the_image_counts_in_a_nodes_memory() -> None:
    from launcher.hardware.fits import Observed

    seen = Observed(ram_disk_gib=7.0)
    plan, _ = plan_of(model_facts=FACTS)
    with_image, _ = plan_of(model_facts=FACTS, observed=seen)
    assert plan.memory is not None and with_image.memory is not None
    assert with_image.memory.host_per_node_gib == pytest.approx(plan.memory.host_per_node_gib + 7.0)
    for other in ({"container": Container("none")}, {"site": site(container={"mount": "file"})}):
        unchanged, _ = plan_of(model_facts=FACTS, observed=seen, **other)
        assert unchanged.memory == plan.memory
    small = preset(memory_per_node_gib=int(plan.memory.host_per_node_gib) + 2)
    assert not [line for line in worst(plan_of(small, model_facts=FACTS)[1]) if "host-memory" in line]
    (line,) = [line for line in worst(plan_of(small, model_facts=FACTS, observed=seen)[1]) if "host-memory" in line]
    assert "(7.0 of them for the image: the disk of these nodes is memory)" in line


def test_the_ranks_memory_is_told_to_the_node_that_unpacks(tmp_path: Path) -> None:
    """The image's own share is not kept free for the ranks a second time."""
    node = node_of(tmp_path, memory=Memory(1.0, 2.0, True, 10.0, {}, ram_disk_gib=7.0))
    assert node._ranks_bytes() == 3 * GIB
