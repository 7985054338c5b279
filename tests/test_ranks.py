"""From a plan to the argument lists and environments of ranks: whole, since every word of them matters."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher.plan import Container, Layout, Staged
from launcher.processes import tasks_ended
from launcher.ranks import RANK_STUB, Place, local_environment, rank_command, slurm_port, step_command, step_environment
from launcher.run import Run
from tests.toy import toy_plan

RUN = Run(Path("/runs/toy-01234567"))
HERE = Place(3, "127.0.0.1", 4000, "/venv/bin/python", "toy-01234567-99")
IN_JOB = Place(3, "10.0.0.1", 15000, "/venv/bin/python", "7", srun="/slurm/bin/srun")
STAGED = Staged("/data/model", "/data/tokens", 1, 0, 1, "sha")
IMAGE = Container("apptainer", "/images/cpu.sif", "a" * 64, "/opt/bin/apptainer", ("/scratch",), {"MY_FLAG": "a b"})


def test_rank_on_the_host() -> None:
    assert rank_command(RUN, toy_plan(), HERE) == ["/venv/bin/python", "-m", "launcher.train", "/runs/toy-01234567"]


def test_rank_in_a_container() -> None:
    plan = toy_plan(container=IMAGE, staged=STAGED, site={"network": {"binds": ["/etc/ib"], "ifname": "ib0"}})
    command = rank_command(RUN, plan, IN_JOB)
    shared = "/runs/toy-01234567/lives/3/nodes"
    assert command[:8] == ["/venv/bin/python", "-m", "launcher.image.rank", "7", "3", shared, "--", "/opt/bin/apptainer"]
    mounts = [command[index + 1] for index, word in enumerate(command) if word == "--mount"]
    assert mounts == [
        "type=bind,source=/scratch,destination=/scratch",
        "type=bind,source=/runs/toy-01234567,destination=/runs/toy-01234567",
        "type=bind,source=/data/model,destination=/data/model,ro",
        "type=bind,source=/data/tokens,destination=/data/tokens,ro",
        "type=bind,source=/etc/ib,destination=/etc/ib",
    ]
    assert command[command.index("--pwd") + 1] == "/runs/toy-01234567/code"
    inside = dict(word.split("=", 1) for word in command[command.index("env") + 1 : command.index("python3")])
    wanted = {"PYTHONPATH": "/runs/toy-01234567/code", "MY_FLAG": "a b", "HF_HUB_OFFLINE": "1", "NCCL_SOCKET_IFNAME": "ib0"}
    assert wanted.items() <= inside.items()
    assert not {"RANK", "LOCAL_RANK"} & inside.keys()
    assert command[command.index("python3") :] == ["python3", "-m", "launcher.train", "/runs/toy-01234567"]
    assert "--nv" not in command


def test_gpus_reach_the_container() -> None:
    layout = Layout(1, 6, 1, cpus_per_node=32, memory_per_node_gib=80, threads_per_rank=8)
    plan = toy_plan(container=IMAGE, layout=layout)
    assert "--nv" in rank_command(RUN, plan, HERE)
    assert "ACCELERATE_USE_CPU" not in local_environment(RUN, plan, HERE, 0, {})


def test_one_step_for_all_ranks() -> None:
    layout = Layout(2, 4, 4, cpus_per_node=32, memory_per_node_gib=80, threads_per_rank=8)
    assert step_command(RUN, toy_plan(nodes=2, layout=layout), IN_JOB) == [
        "/slurm/bin/srun",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--mpi=none",
        "--gpu-bind=none",
        "--export=ALL",
        "--chdir=/runs/toy-01234567/code",
        "--output=/runs/toy-01234567/lives/3/rank-%t.log",
        "--open-mode=append",
        "sh",
        "-c",
        RANK_STUB,
        "rank",
        "/venv/bin/python",
        "-m",
        "launcher.train",
        "/runs/toy-01234567",
    ]


def test_device_map_is_one_task_that_sees_all_gpus() -> None:
    layout = Layout(1, 6, 1, cpus_per_node=32, memory_per_node_gib=80, threads_per_rank=8)
    command = step_command(RUN, toy_plan(layout=layout), IN_JOB)
    assert {"--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=32", "--gpu-bind=none"} <= set(command)


LEAKS = {
    "PYTHONPATH": "x",
    "PYTHONHOME": "x",
    "RANK": "9",
    "LD_PRELOAD": "x",
    "SBATCH_X": "x",
    "SUBMITIT_EXECUTOR": "x",
    "ACCELERATE_X": "x",
}


def test_environment_here_has_no_leaks() -> None:
    found = local_environment(RUN, toy_plan(), HERE, 1, {**LEAKS, "SLURM_JOB_ID": "1", "HOME": "/home/me", "HF_TOKEN": "t"})
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["HOME"], found["HF_TOKEN"]) == ("1", "1", "2", "/home/me", "t")
    assert "x" not in found.values() and "SLURM_JOB_ID" not in found
    assert found["GLOO_SOCKET_IFNAME"] == "lo"


def test_environment_of_the_step_keeps_what_srun_needs() -> None:
    found = step_environment(RUN, toy_plan(), IN_JOB, {**LEAKS, "SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/slurm.conf"})
    assert (found["SLURM_JOB_ID"], found["SLURM_CONF"]) == ("1", "/etc/slurm.conf")
    assert "x" not in found.values() and "RANK" not in found and "GLOO_SOCKET_IFNAME" not in found


def test_gpus_of_a_task_are_not_asked_for_again_by_every_rank() -> None:
    left = {"SLURM_GPUS_PER_TASK": "4", "SLURM_TRES_PER_TASK": "gres/gpu:4", "SLURM_GPUS_ON_NODE": "4"}
    found = step_environment(RUN, toy_plan(), IN_JOB, left)
    assert left.keys() & found.keys() == {"SLURM_GPUS_ON_NODE"}


def test_site_and_container_have_the_last_word() -> None:
    plan = toy_plan(site={"network": {"env": {"NCCL_DEBUG": "INFO"}}}, container=Container("none", env={"OMP_NUM_THREADS": "3"}))
    found = local_environment(RUN, plan, HERE, 0, {"NCCL_DEBUG": "TRACE"})
    assert (found["NCCL_DEBUG"], found["OMP_NUM_THREADS"]) == ("INFO", "3")


def test_ports_differ_between_lives_and_jobs() -> None:
    ports = {slurm_port(job, life) for job in ("1", "2", "4711", "99999999") for life in range(5)}
    assert len(ports) == 20 and all(15000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("said", "codes"),
    [
        ("srun: error: node1: task 1: Exited with exit code 1\n", [(1, 1)]),
        ("srun: error: node1: tasks 0-1,3: Exited with exit code 85\n", [(0, 85), (1, 85), (3, 85)]),
        ("srun: error: node2: task 2: Killed\n", [(2, -signal.SIGKILL)]),
        ("srun: error: node2: task 2: Bus error (core dumped)\n", [(2, -signal.SIGBUS)]),
        ("srun: error: node-a.b: tasks 2-3: Terminated\n", [(2, -signal.SIGTERM), (3, -signal.SIGTERM)]),
        ("srun: error: node2: task 2: Out Of Memory\n", [(2, -signal.SIGKILL)]),
        ("srun: forcing job termination\nsrun: error: Unable to create step\n", []),
        ("slurmstepd-node1: error: *** STEP 14.0 ON node1 CANCELLED AT 2026-11-22T15:56:34 ***\n", []),
    ],
)
def test_what_srun_says_of_tasks(said: str, codes: list[tuple[int, int]]) -> None:
    assert tasks_ended(said) == codes
