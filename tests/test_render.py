"""Plan → files: whole batch scripts as golden files, directives by site, and what bash makes of the script when signals arrive."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.plan import Layout, Plan, read_plan
from launcher.render import directives, render
from launcher.run import Run
from tests.toy import toy_plan

GOLDEN = Path(__file__).with_name("golden") / "render"
RUN = Run(Path("/scratch/project 1/it's/toy-01234567"))
A100 = {
    "name": "a100",
    "cpus": 64,
    "memory_gib": 512,
    "gpus": 4,
    "gpu": {"kind": "a100-80gb", "gres_type": "a100", "memory_gib": 80, "compute_capability": "8.0"},
}
ON_GPUS = {"hardware": A100, "layout": Layout(2, 4, 4, cpus_per_node=32, memory_per_node_gib=120, threads_per_rank=8)}


def slurm_plan(site: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return toy_plan(site={"name": "cluster", "scheduler": "slurm", **(site or {})}, nodes=2, time_limit_min=2880, **changes)


GOLDEN_PLANS = {
    "smallest": slurm_plan(),
    "everything": slurm_plan(
        {
            "gpu_typed": True,
            "local_disk_request": "nvme:200",
            "modules": ["gcc/12.2", "apptainer"],
            "container": {"use": "apptainer", "module": "singularity/3.11"},
        },
        **ON_GPUS,
        signal_lead_s=120,
        slurm={
            "account": "proj-1",
            "partition": "gpu",
            "qos": "long",
            "constraint": "a100&nvlink",
            "reservation": "course",
            "exclude": "node[1-3]",
            "mail": "a.b@example.org",
        },
    ),
}


@pytest.mark.parametrize("name", GOLDEN_PLANS)
def test_batch_script_is_as_agreed(name: str, tmp_path: Path) -> None:
    text = render(GOLDEN_PLANS[name], RUN, python="/opt/my venv/bin/python")["job.sbatch"]
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("FTLAUNCH_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize(
    ("site", "asked"),
    [
        pytest.param({"gpu_request": "gres"}, {"gres": "gpu:4", "mem": "120G"}, id="gres"),
        pytest.param({"gpu_request": "gres", "gpu_typed": True}, {"gres": "gpu:a100:4"}, id="gres-typed"),
        pytest.param({"gpu_request": "gres", "gpu_type": "big"}, {"gres": "gpu:big:4"}, id="gres-own-type"),
        pytest.param({"gpu_request": "gpus_per_node"}, {"gpus-per-node": "4"}, id="gpus-per-node"),
        pytest.param({"gpu_request": "gpus_per_task"}, {"gpus-per-task": "4"}, id="gpus-per-task"),
        pytest.param(
            {"gpu_request": "gpus_per_task", "memory": "per_cpu"}, {"gpus-per-task": "4", "mem-per-cpu": "3840M"}, id="per-task-and-cpu"
        ),
        pytest.param({"gpu_request": "gpus", "gpu_type": "a100"}, {"gpus": "a100:8"}, id="gpus"),
        pytest.param({"gpu_request": "none"}, {}, id="no-gpus"),
        pytest.param({"gpu_request": "none", "local_disk_request": "nvme:9"}, {"gres": "nvme:9"}, id="disk-only"),
        pytest.param({"gpu_request": "none", "memory": "per_cpu"}, {"mem-per-cpu": "3840M"}, id="memory-per-cpu"),
        pytest.param({"gpu_request": "none", "memory": "per_gpu"}, {"mem-per-gpu": "30720M"}, id="memory-per-gpu"),
        pytest.param({"gpu_request": "none", "memory": "none"}, {}, id="no-memory"),
        pytest.param({"gpu_request": "none", "whole_nodes": True}, {}, id="whole-nodes"),
    ],
)
def test_only_what_the_site_asks_for(site: dict[str, Any], asked: dict[str, str]) -> None:
    found = dict(directives(slurm_plan(site, **ON_GPUS), RUN))
    forms = ("gres", "gpus-per-node", "gpus-per-task", "gpus", "mem", "mem-per-cpu", "mem-per-gpu")
    default = {"mem": "120G"} if {"memory", "whole_nodes"}.isdisjoint(site) else {}
    assert {name: value for name, value in found.items() if name in forms} == {**default, **asked}
    assert ("cpus-per-task" in found) is not site.get("whole_nodes", False)
    assert not {"wckey", "comment", "account", "partition", "qos", "mail-user", "requeue", "no-requeue"} & found.keys()


def test_gpus_per_task_are_asked_for_by_one_task() -> None:
    """Which holds everything: GPUs that belong to a rank's task would be hidden from the other ranks."""
    asked = dict(directives(slurm_plan({"gpu_request": "gpus_per_task"}, **ON_GPUS), RUN))
    assert (asked["ntasks-per-node"], asked["cpus-per-task"], asked["gpus-per-task"]) == ("1", "32", "4")
    on_cpu = dict(directives(slurm_plan({"gpu_request": "gpus_per_task"}), RUN))
    assert "gpus-per-task" not in on_cpu and on_cpu["ntasks-per-node"] == str(slurm_plan().layout.ranks_per_node)


def test_signal_to_the_steps() -> None:
    assert dict(directives(slurm_plan({"signal": "steps"}), RUN))["signal"] == "USR2@30"


def test_no_batch_script_without_slurm() -> None:
    assert render(toy_plan(), RUN, python="python", definition="Bootstrap: x\n").keys() == {"plan.json", "image.def"}


def test_plan_is_rendered_whole(tmp_path: Path) -> None:
    plan = slurm_plan()
    (tmp_path / "plan.json").write_text(render(plan, RUN, python="python")["plan.json"])
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("parallelism", "dtype"), [("zero1", "bf16"), ("zero3", "fp16")])
def test_deepspeed_is_told_no_more_than_the_plan(parallelism: str, dtype: str) -> None:
    training = {"sequence_length": 8, "effective_batch": 2, "learning_rate": 0.1, "dtype": dtype}
    plan = toy_plan(preset={"parallelism": parallelism, "training": training})
    told = json.loads(render(plan, RUN, python="python")["ds_config.json"])
    assert told["zero_optimization"]["stage"] == int(parallelism[-1])
    assert (told["bf16"]["enabled"], told["fp16"]["enabled"]) == (dtype == "bf16", dtype == "fp16")
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"], told["gradient_clipping"]) == (1, 1, 1.0)
    assert "train_batch_size" not in told and "optimizer" not in told and "scheduler" not in told


@pytest.mark.parametrize(
    ("offload", "moved"),
    [("none", set()), ("optimizer", {"offload_optimizer"}), ("all", {"offload_optimizer", "offload_param"})],
    ids=str,
)
def test_deepspeed_is_told_what_to_offload(offload: str, moved: set[str]) -> None:
    plan = toy_plan(preset={"parallelism": "zero3", "offload": offload})
    told = json.loads(render(plan, RUN, python="python")["ds_config.json"])["zero_optimization"]
    assert {name for name in told if name.startswith("offload")} == moved
    assert all(told[name] == {"device": "cpu", "pin_memory": False} for name in moved)


def test_own_template_takes_the_place(tmp_path: Path) -> None:
    own = tmp_path / "mine.j2"
    own.write_text("#!/bin/bash\n{{ plan.identity | sh }} {{ run | sh }}\n")
    text = render(slurm_plan(), RUN, python="python", template=own)["job.sbatch"]
    assert text == f"#!/bin/bash\n{'0123456789abcdef' * 4} '/scratch/project 1/it'\"'\"'s/toy-01234567'\n"


def test_control_characters_never_reach_a_script() -> None:
    with pytest.raises(UsageError, match="control character"):
        render(slurm_plan(), RUN, python="/bin/python\n#SBATCH --account=other")


SUPERVISOR = """
import pathlib, signal, sys, time
time.sleep(0.3)
here = pathlib.Path(sys.argv[1])
heard = []
for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: heard.append(number))
(here / "ready").touch()
while not heard:
    time.sleep(0.05)
(here / "heard").write_text(signal.Signals(heard[0]).name)
time.sleep(0.3)
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> tuple[Path, Path]:
    """A run whose supervisor only listens, slow to install its handlers, and whose Python is slow to answer the probe."""
    root = tmp_path / "a run"
    (root / "code" / "launcher").mkdir(parents=True)
    (root / "code" / "launcher" / "__init__.py").touch()
    (root / "code" / "launcher" / "supervise.py").write_text(SUPERVISOR)
    python = tmp_path / "slow python"
    python.write_text(f'#!/bin/bash\n[ "$1" != -c ] || {{ touch "{root}/probed"; sleep 0.4; }}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    job = tmp_path / "job.sbatch"
    job.write_text(render(slurm_plan(), Run(root), python=str(python))["job.sbatch"])
    return job, root


def start(job: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "SLURM_JOB_ID": "1"}
    environment.pop("FTLAUNCH_SUBMITIT", None)
    return subprocess.Popen(["bash", job], env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["probed", "ready"])
@pytest.mark.parametrize(("sent", "heard"), [(signal.SIGUSR2, "SIGUSR2"), (signal.SIGTERM, "SIGUSR2"), (signal.SIGINT, "SIGINT")])
def test_stop_reaches_the_supervisor(script: tuple[Path, Path], when: str, sent: int, heard: str) -> None:
    job, root = script
    process = start(job)
    wait_for(root / when)
    process.send_signal(sent)
    assert process.wait(60) == 7
    assert (root / "heard").read_text() == heard


def test_signals_to_everything_kill_neither_shell_nor_supervisor(script: tuple[Path, Path]) -> None:
    """As at a requeue or a cancellation: every process of the job gets them, at every moment from the probe on."""
    job, root = script
    process = start(job)
    wait_for(root / "probed")
    for _ in range(200):
        os.killpg(process.pid, signal.SIGUSR2)
        time.sleep(0.01)
        if (root / "heard").exists():
            break
    assert process.wait(60) == 7
    assert (root / "heard").read_text() == "SIGUSR2"


def test_module_names_are_only_words(tmp_path: Path) -> None:
    root = tmp_path / "a run"
    modules = ["gcc/12.2", "$(touch evil)", '"; touch evil; "']
    plan = slurm_plan()
    plan = dataclasses.replace(plan, site={**plan.site, "modules": modules})  # past the schema, which refuses such names as well
    text = render(plan, Run(root), python="/nowhere/python")["job.sbatch"]
    told = 'module() { printf "%s\\n" "$2" >>loaded; return 1; }\n'
    done = subprocess.run(["bash", "-c", told + text], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "loaded").read_text().splitlines() == modules and not (tmp_path / "evil").exists()
    assert "ftlaunch: module load $(touch evil) failed on" in done.stderr


LIVED = """
import pathlib, sys
(pathlib.Path(sys.argv[1]) / "lived").touch()
"""


@pytest.mark.parametrize(
    ("importable", "pickled", "said"),
    [
        pytest.param(True, True, "submitit was asked", id="submitit"),
        pytest.param(False, True, "has no submitit here; going on without it", id="installed-for-the-user-only"),
        pytest.param(True, False, "12_submitted.pkl; going on without submitit", id="no-pickle"),
    ],
)
def test_supervisor_runs_without_submitit_where_it_must(tmp_path: Path, importable: bool, pickled: bool, said: str) -> None:
    """The interpreter is a bare one, beside whose code a submitit lies or not; ``RUN/submitit`` itself must not be taken for it."""
    root, programs, python = tmp_path / "a run", tmp_path / "bin", tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", symlinks=True)
    for folder in (root / "submitit", root / "code" / "launcher", programs):
        folder.mkdir(parents=True)
    (root / "code" / "launcher" / "supervise.py").write_text(LIVED)
    if importable:
        (root / "code" / "submitit" / "core").mkdir(parents=True)
        (root / "code" / "submitit" / "core" / "_submit.py").write_text("if __name__ == '__main__': print('submitit was asked')\n")
    if pickled:
        (root / "submitit" / "12_submitted.pkl").touch()
    (programs / "sleep").symlink_to("/bin/true")
    (root / "job.sbatch").write_text(render(slurm_plan(), Run(root), python=str(python))["job.sbatch"])
    environment = {**os.environ, "SLURM_JOB_ID": "12", "FTLAUNCH_SUBMITIT": "1", "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "job.sbatch"], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout + done.stderr, done.stderr
    assert (root / "lived").exists() is not (importable and pickled)


def test_unusable_python_is_one_sentence_and_an_event(tmp_path: Path) -> None:
    root = tmp_path / "a run"
    (root / "code").mkdir(parents=True)
    job = tmp_path / "job.sbatch"
    job.write_text(render(slurm_plan(), Run(root), python="/nowhere/python")["job.sbatch"])
    done = subprocess.run(["bash", job], env={**os.environ, "SLURM_JOB_ID": "12"}, capture_output=True, text=True)
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1].startswith("ftlaunch: the Python of the submission is missing or older than 3.10")
    (event,) = Run(root).events()
    assert (event["event"], event["job_id"]) == ("failed", "12") and "submitit/12_0_log.out" in event["cause"]
