"""What follows a life: pure decisions, and the history they are taken from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.continuation import CRASHES_WITHOUT_PROGRESS, History, decide, gpu_hours, history, whole
from launcher.run import Run, Verdict
from tests.toy import toy_plan
from tests.toy_runs import fake_checkpoint

FINISHED, STOPPED = Verdict("finished"), Verdict("stopped")
CRASHED, HOPELESS = Verdict("failed", "rank 1 ended with 1"), Verdict("failed", "rank 1 ended with 93", retry=False)
FRESH = History(1, 0, 0.0)
REQUEUE, RESUBMIT, MANUAL = ({"scheduler": "slurm", "continuation": how} for how in ("requeue", "resubmit", "manual"))


@pytest.mark.parametrize(
    ("verdict", "site", "past", "event"),
    [
        pytest.param(FINISHED, {}, FRESH, "finished", id="finished-here"),
        pytest.param(FINISHED, REQUEUE, History(99, 9, 1e9), "finished", id="finished-is-finished"),
        pytest.param(STOPPED, {}, FRESH, "stopped", id="stopped-here"),
        pytest.param(STOPPED, REQUEUE, FRESH, "again", id="stopped-requeue"),
        pytest.param(STOPPED, RESUBMIT, FRESH, "again", id="stopped-resubmit"),
        pytest.param(STOPPED, MANUAL, FRESH, "stopped", id="stopped-manual"),
        pytest.param(STOPPED, REQUEUE, History(20, 0, 0.0), "stopped", id="lives-used-up"),
        pytest.param(STOPPED, REQUEUE, History(2, 0, 100.0), "stopped", id="gpu-hours-used-up"),
        pytest.param(CRASHED, {}, History(1, 1, 0.0), "again", id="crashed-here"),
        pytest.param(CRASHED, REQUEUE, History(1, 1, 0.0), "again", id="crashed-requeue"),
        pytest.param(CRASHED, MANUAL, History(1, 1, 0.0), "failed", id="crashed-manual"),
        pytest.param(CRASHED, REQUEUE, History(3, CRASHES_WITHOUT_PROGRESS, 0.0), "failed", id="crash-loop"),
        pytest.param(CRASHED, REQUEUE, History(20, 1, 0.0), "failed", id="crashed-and-lives-used-up"),
        pytest.param(HOPELESS, REQUEUE, History(1, 1, 0.0), "failed", id="do-not-retry"),
        pytest.param(HOPELESS, {}, History(1, 1, 0.0), "failed", id="do-not-retry-here"),
    ],
)
def test_decide(verdict: Verdict, site: dict[str, Any], past: History, event: str) -> None:
    plan = toy_plan(site=site, preset={"limits": {"max_lives": 20, "max_gpu_hours": 100}})
    assert decide(verdict, past, plan).event == event


@pytest.mark.parametrize("verdict", [STOPPED, CRASHED])
def test_nothing_goes_on_after_a_person_ended_it(verdict: Verdict) -> None:
    assert decide(verdict, FRESH, toy_plan(site=REQUEUE), cancelled=True).event == "stopped"


def test_limit_is_named() -> None:
    plan = toy_plan(site=REQUEUE, preset={"limits": {"max_lives": 2}})
    assert decide(STOPPED, History(2, 0, 0.0), plan).cause == "limits.max_lives: 2 lives are used up"


def test_crashes_count_since_the_newest_checkpoint(tmp_path: Path) -> None:
    run, plan = Run(tmp_path), toy_plan()
    run.append_event("submitted", life=0)
    for life, step in enumerate((0, 4, 4)):
        run.append_event("started", life=life)
        run.append_event("crashed", life=life, checkpoint=step)
    fake_checkpoint(run, 4)
    assert (history(run, plan).lives, history(run, plan).crashes) == (3, 2)
    fake_checkpoint(run, 6)
    assert history(run, plan).crashes == 0


def test_counting_starts_anew_when_a_person_resumes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for life in range(3):
        run.append_event("started", life=life)
        run.append_event("crashed", life=life, checkpoint=0)
    run.append_event("resumed", life=3)
    run.append_event("started", life=3)
    assert history(run, toy_plan()) == History(1, 0, 0.0)


def test_gpu_hours_of_lives_with_and_without_an_end() -> None:
    def event(name: str, life: int, time: str) -> dict[str, Any]:
        return {"event": name, "life": life, "time": f"2026-01-01T{time}Z"}

    told = [
        event("submitted", 0, "00:00:00"),
        event("started", 0, "10:00:00"),
        event("requeued", 0, "12:00:00"),
        event("started", 1, "20:00:00"),
        event("stop_requested", 1, "20:30:00"),
        {"event": "failed", "time": "2026-01-02T00:00:00Z"},
    ]
    assert gpu_hours(told, gpus=8) == 20.0


def test_whole_checkpoint_has_its_sizes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    fake_checkpoint(run, 4)
    from launcher.continuation import newest

    manifest = newest(run)
    assert manifest is not None and whole(run, manifest)
    (run.checkpoint(4) / "weights").write_text("longer than before")
    assert not whole(run, manifest)
    (run.checkpoint(4) / "weights").unlink()
    assert not whole(run, manifest)
