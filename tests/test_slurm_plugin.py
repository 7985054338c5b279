"""The submitit plugin: found by name, modest, one task, no arrays, no handlers of submitit's."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from submitit.core import plugins
from submitit.core.utils import DelayedSubmission

from launcher.errors import UsageError
from launcher.run import Run
from launcher.slurm.plugin import FtlaunchExecutor, FtlaunchJobEnvironment, live
from tests.fake_slurm import FakeSlurm, make_fake_slurm
from tests.toy import names, toy_plan, toy_run


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = make_fake_slurm(tmp_path / "bin", monkeypatch)
    fake.answer("sbatch", {"out": "4711\n"})
    return fake


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> Run:
    return toy_run(tmp_path / "runs", toy_plan(site={"name": "cluster", "scheduler": "slurm"}, nodes=2, time_limit_min=5))


def test_entry_points() -> None:
    (found,) = [ours for ours in (_entry_points(distribution) for distribution in metadata.distributions()) if ours]
    assert found == {"executor": FtlaunchExecutor, "job_environment": FtlaunchJobEnvironment}


def _entry_points(distribution: metadata.Distribution) -> dict[str, Any]:
    if distribution.metadata["Name"] != "ftlaunch":
        return {}
    return {point.name: point.load() for point in distribution.entry_points if point.group == "submitit"}


def test_both_classes_share_one_name() -> None:
    assert FtlaunchExecutor.name() == FtlaunchJobEnvironment.name() == "ftlaunch"


def test_other_programs_keep_their_choice(slurm: FakeSlurm) -> None:
    from submitit.slurm.slurm import SlurmExecutor

    assert 0 < FtlaunchExecutor.affinity() <= 1 < SlurmExecutor.affinity()


def test_no_affinity_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert FtlaunchExecutor.affinity() == -1


def test_loading_the_plugin_is_light() -> None:
    script = "import sys, launcher.slurm.plugin; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "pydantic", "jinja2", "typer", "rich", "ruamel", "transformers", "numpy"}


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda executor: executor.map_array(print, [1, 2]), id="map_array"),
        pytest.param(lambda executor: executor.submit_array([print, print]), id="submit_array"),
        pytest.param(lambda executor: executor.batch().__enter__(), id="batch"),
    ],
)
def test_arrays_are_refused_before_sbatch(run: Run, slurm: FakeSlurm, use: Any) -> None:
    with pytest.raises(UsageError, match="is not supported: one run is one job"):
        use(FtlaunchExecutor(run.submitit))
    assert slurm.calls("sbatch") == [] and list(run.submitit.iterdir()) == []


def test_parameters_are_the_plans(run: Run) -> None:
    with pytest.raises(UsageError, match="nodes, timeout_min: the run's plan"):
        FtlaunchExecutor(run.submitit).update_parameters(timeout_min=5, nodes=3)


def test_folder_must_be_a_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        FtlaunchExecutor(tmp_path / "submitit")


def test_job_has_one_task_whatever_the_plan(run: Run) -> None:
    assert FtlaunchExecutor(run.submitit).submit(live, str(run.root)).num_tasks == 1


def test_pickle_carries_only_the_path(run: Run) -> None:
    FtlaunchExecutor(run.submitit).submit(live, str(run.root))
    delayed = pickle.loads((run.submitit / "4711_submitted.pkl").read_bytes())
    assert isinstance(delayed, DelayedSubmission)
    assert (delayed.function, delayed.args, delayed.kwargs) == (live, (str(run.root),), {})


def test_environment_of_the_job(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "ftlaunch")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(run.submitit))
    environment = plugins.get_job_environment()
    assert type(environment) is FtlaunchJobEnvironment
    assert environment.paths.submitted_pickle == run.submitit / "4711_submitted.pkl"


def test_submitit_installs_no_handlers(run: Run) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)]
    FtlaunchJobEnvironment()._handle_signals(None, None)  # type: ignore[arg-type]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)] == before


@pytest.mark.parametrize(
    ("behaviour", "code", "result"),
    [
        pytest.param({}, 0, b"success", id="finished"),
        pytest.param({"faults": [{"rank": 0, "step": 1, "what": 93}]}, 1, b"rank 0 ended with 93", id="failed"),
    ],
)
def test_result_that_submitit_sees(tmp_path: Path, slurm: FakeSlurm, behaviour: dict[str, Any], code: int, result: bytes) -> None:
    """submitit runs the pickle as its job would; ``srun`` is a program that runs both ranks here."""
    plan = toy_plan(site={"name": "cluster", "scheduler": "slurm"}, time_limit_min=5)
    run = toy_run(tmp_path / "runs", plan, **behaviour)
    FtlaunchExecutor(run.submitit).submit(live, str(run.root))
    slurm.answer("scontrol", {"out": "node1\n"}, {"out": "NodeAddr=127.0.0.1\n"})
    (slurm.folder / "srun").write_text(SRUN)
    environment = {**os.environ, "PYTHONPATH": str(run.code), "SUBMITIT_EXECUTOR": "ftlaunch"}
    environment |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node1", "SLURM_NTASKS": "2"}
    command = [sys.executable, "-m", "submitit.core._submit", str(run.submitit)]
    done = subprocess.run(command, env=environment, cwd=run.code, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert result in (run.submitit / "4711_0_result.pkl").read_bytes()
    assert names(run)[-1] == ("finished" if code == 0 else "failed")


SRUN = """#!/bin/bash
while [ "$1" != sh ]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
worst=0
wait $first || { worst=$?; echo "srun: error: node1: task 0: Exited with exit code $worst" >&2; }
wait $second || { worst=$?; echo "srun: error: node1: task 1: Exited with exit code $worst" >&2; }
exit $worst
"""
