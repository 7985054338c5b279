"""Runs that go on: from which checkpoint, with which plan, and what a refused resume leaves."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import checkpoint
from launcher.errors import ActionError, UsageError
from launcher.run import Run
from launcher.state import Known, state_of
from launcher.submit import AlreadyGoing, cancel, find_checkpoint, resume, submit, turns
from tests.fake_slurm import FakeSlurm
from tests.toy import names, toy_run
from tests.toy_runs import FOREVER, ended, fake_checkpoint, slurm_plan, wait_until


def test_resume_goes_on(local: Callable[..., Run]) -> None:
    run = local(**FOREVER)
    submit(run)
    wait_until(run.metrics_file.exists, run)
    cancel(run, now=False)
    wait_until(lambda: ended(run), run)
    saved = checkpoint.committed(run)[-1].step
    (run.root / "toy.json").write_text(json.dumps({"steps": saved + 1, "step_s": 0.01}))
    resume(run)
    wait_until(lambda: ended(run), run)
    assert state_of(run, Known()) == "finished"
    assert names(run)[-3:] == ["resumed", "started", "finished"]


@pytest.mark.parametrize(("text", "step"), [("epoch-1", 4), ("epoch-2", 8), ("step-6", 6), ("step-00000002", 2)])
def test_find_checkpoint(trained: Run, text: str, step: int) -> None:
    assert find_checkpoint(trained, text).step == step


@pytest.mark.parametrize("text", ["epoch-3", "step-5", "4", "epoch", "epoch--1", "latest"])
def test_unknown_checkpoint_lists_what_there_is(trained: Run, text: str) -> None:
    with pytest.raises(UsageError, match="there are: step-2, epoch-1, step-6, epoch-2"):
        find_checkpoint(trained, text)


def test_resume_from_sets_newer_ones_aside(trained: Run) -> None:
    resume(trained, from_checkpoint="epoch-1")
    wait_until(lambda: ended(trained), trained)
    aside = trained.checkpoints / "superseded-0"
    assert sorted(path.name for path in aside.iterdir()) == ["model", "step-00000006", "step-00000008"]
    assert [manifest.step for manifest in checkpoint.committed(trained)] == [2, 4, 10]
    assert trained.events("resumed")[0]["from_step"] == 4


def test_resume_with_changed_plan_and_current_code(trained: Run) -> None:
    changed = dataclasses.replace(trained.plan(), signal_lead_s=77)
    (trained.code / "launcher" / "marker").touch()
    resume(trained, code_current=True, plan=changed, job_script="#!/bin/bash\n")
    wait_until(lambda: ended(trained), trained)
    assert (trained.plan(0).signal_lead_s, trained.job_file(0)) == (77, trained.life(0) / "job.sbatch")
    assert (trained.life(0) / "code-before" / "marker").exists() and not (trained.code / "launcher" / "marker").exists()
    assert len(trained.events("resumed")[0]["code"]) == 64


def test_resume_renders_deepspeeds_configuration_beside_its_plan(trained: Run) -> None:
    before = trained.plan()
    batch = dataclasses.replace(before.batch, micro_batch=1, micro_steps=2)
    resume(trained, plan=dataclasses.replace(before, preset={**before.preset, "parallelism": "zero2"}, batch=batch))
    assert trained.deepspeed_file(0) == trained.life(0) / "ds_config.json"
    told = json.loads(trained.deepspeed_file(0).read_text())
    assert (told["gradient_accumulation_steps"], told["zero_optimization"]["stage"]) == (2, 2)


def test_resume_refuses_another_identity(trained: Run) -> None:
    with pytest.raises(UsageError, match="determines the weights"):
        resume(trained, plan=dataclasses.replace(trained.plan(), identity="f" * 64))
    assert names(trained) == []


def test_refused_resume_keeps_the_run(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("sbatch", {"code": 1, "err": "sbatch: error: no\n"})
    with pytest.raises(ActionError, match="no"):
        resume(run)
    assert names(run) == ["submitted"] and [path.name for path in run.submitit.iterdir()] == ["4711_submitted.pkl"]


@pytest.mark.parametrize("event", ["resumed", "started", "continued"])
def test_resume_of_a_run_that_went_on_meanwhile(tmp_path: Path, slurm: FakeSlurm, event: str) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    seen = turns(run)
    run.append_event(event, life=0, job_id="4712")
    with pytest.raises(AlreadyGoing):
        resume(run, seen=seen, job_script="#!/bin/bash\n")
    assert len(slurm.calls("sbatch")) == 1 and not run.life(0).exists()


def tree(run: Run) -> dict[str, bytes | None]:
    found = (path for path in run.root.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(run.root)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.parametrize("failure", ["sbatch refuses", "interrupt while copying", "interrupt while writing"])
@pytest.mark.parametrize("resumed_before", [False, True], ids=["first", "again"])
def test_refused_resume_leaves_no_trace(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, failure: str, resumed_before: bool
) -> None:
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    for step, epoch in ((2, None), (4, 1), (6, None)):
        fake_checkpoint(run, step, epoch)
    run.model.mkdir()
    change = {"code_current": True, "plan": dataclasses.replace(run.plan(), signal_lead_s=77), "job_script": "#!/bin/sh\n"}
    if resumed_before:
        resume(run, **change)
    before = tree(run)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    error: type[BaseException] = KeyboardInterrupt
    if failure == "sbatch refuses":
        error = ActionError
        slurm.answer("sbatch", {"code": 1, "err": "sbatch: error: no\n"})
    else:
        monkeypatch.setattr(f"launcher.submit.{'copy_code' if 'copying' in failure else 'code_sha'}", interrupted)
    changes = {**change, "plan": dataclasses.replace(run.plan(), signal_lead_s=99), "job_script": "#!/bin/bash\n"}
    with pytest.raises(error):
        resume(run, from_checkpoint="step-2", **changes)
    assert tree(run) == before
    monkeypatch.undo()
    slurm.answer("sbatch", {"out": "4712\n"})
    assert resume(run, from_checkpoint="step-2", **changes) == "4712"
    assert (run.plan(0).signal_lead_s, [manifest.step for manifest in checkpoint.committed(run)]) == (99, [2])
    kept = {"code-before", "code-before-2"} if resumed_before else {"code-before"}
    assert {path.name for path in run.life(0).iterdir()} == {"plan.json", "job.sbatch", *kept}


def test_resume_whose_supervisor_cannot_start_says_so(trained: Run) -> None:
    trained.record_file.write_text(trained.record_file.read_text().replace(sys.executable, "/nowhere/python"))
    with pytest.raises(ActionError, match="/nowhere/python: No such file"):
        resume(trained, from_checkpoint="step-2")
    assert state_of(trained, Known()) == "failed" and len(checkpoint.committed(trained)) == 4
    trained.record_file.write_text(trained.record_file.read_text().replace("/nowhere/python", sys.executable))
    resume(trained)
    wait_until(lambda: ended(trained), trained)
    assert state_of(trained, Known()) == "finished"
