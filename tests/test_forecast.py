"""When Slurm expects a job to start: asked without submitting, bounded in time, never in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher.cli import app
from launcher.cli.forecast import start_of
from launcher.run import Run
from launcher.slurm.forecast import Forecast, expected_start, forecast_start
from launcher.submit import submit
from tests.fake_slurm import FakeSlurm
from tests.toy import toy_run
from tests.toy_runs import slurm_plan

STARTS = "sbatch: Job 42 to start at 2026-11-22T20:15:00 using 64 processors on nodes node[1-2] in partition gpu\n"
SCRIPT = "#!/bin/sh\n#SBATCH --nodes=2\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param({"err": STARTS}, Forecast(datetime(2026, 11, 22, 20, 15), "node[1-2]", "gpu"), id="starts"),
        pytest.param(
            {"err": f"A site's own greeting.\n{STARTS}"}, Forecast(datetime(2026, 11, 22, 20, 15), "node[1-2]", "gpu"), id="greeting"
        ),
        pytest.param(
            {"err": "sbatch: Job 42 to start at 2026-11-22T20:15:00 using 1 processors on n1\n"},
            Forecast(datetime(2026, 11, 22, 20, 15), "n1"),
            id="older-slurm",
        ),
        pytest.param({"err": "sbatch: Job 42 to start at N/A\n"}, Forecast(reason="sbatch --test-only says no time"), id="no-time"),
        pytest.param({"out": "4711\n"}, Forecast(reason="sbatch --test-only says no time"), id="something-else"),
        pytest.param(
            {"code": 1, "err": "allocation failure: Invalid account or account/partition combination specified\n"},
            Forecast(refusal="allocation failure: Invalid account or account/partition combination specified"),
            id="refused",
        ),
        pytest.param(
            {"code": 1, "err": "sbatch: error: Use --account=PROJECT\nsbatch: error: Batch job submission failed: Unspecified error\n"},
            Forecast(refusal="Use --account=PROJECT; Batch job submission failed: Unspecified error"),
            id="refused-by-the-site",
        ),
        pytest.param(
            {"code": 1, "err": "allocation failure: Unable to contact slurm controller (connect failure)\n"},
            Forecast(reason="allocation failure: Unable to contact slurm controller (connect failure)"),
            id="controller-down",
        ),
        pytest.param({"code": 1}, Forecast(refusal="exit code 1"), id="refused-without-a-word"),
    ],
)
def test_forecast(slurm: FakeSlurm, answer: dict[str, object], expected: Forecast) -> None:
    slurm.answer("sbatch", answer)
    found = forecast_start(SCRIPT, slurm.tools["sbatch"], environ={}, timeout_s=30)
    assert found.asked_s > 0
    assert found == Forecast(**{**vars(expected), "asked_s": found.asked_s})


def test_it_only_tests_and_leaves_nothing_behind(slurm: FakeSlurm) -> None:
    environ = {"SBATCH_PARTITION": "other", "SLURM_TIME_FORMAT": "relative", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/usr/bin"}
    forecast_start(SCRIPT, slurm.tools["sbatch"], environ=environ, timeout_s=30)
    (asked,) = slurm.calls("sbatch")
    (_, option, script) = asked["argv"]
    assert option == "--test-only" and not Path(script).exists()
    assert {name for name in asked["env"] if name.startswith(("SBATCH", "SLURM"))} == {"SLURM_CONF"}


def test_sbatch_is_shown_the_script(tmp_path: Path) -> None:
    program = tmp_path / "sbatch"
    program.write_text(f'#!/bin/sh\ncat "$2" >{tmp_path}/seen\n')
    program.chmod(0o755)
    forecast_start(SCRIPT, str(program), environ={"PATH": "/usr/bin:/bin"}, timeout_s=30)
    assert (tmp_path / "seen").read_text() == SCRIPT


def test_a_slow_slurm_is_not_waited_for(slurm: FakeSlurm) -> None:
    slurm.answer("sbatch", {"sleep_s": 3600, "err": STARTS})
    found = forecast_start(SCRIPT, slurm.tools["sbatch"], environ={}, timeout_s=0.1)
    assert found.start is None and found.refusal is None
    assert found.reason is not None and found.reason.endswith("sbatch did not answer within 0.1 s")


def test_what_cannot_be_run_gives_no_forecast(tmp_path: Path) -> None:
    found = forecast_start(SCRIPT, str(tmp_path / "sbatch"), environ={}, timeout_s=30)
    assert found.reason == f"{tmp_path}/sbatch: No such file or directory" and found.refusal is None


def test_no_room_for_the_script_gives_no_forecast(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    found = forecast_start(SCRIPT, slurm.tools["sbatch"], environ={}, timeout_s=30)
    assert found.reason == "the batch script cannot be shown to sbatch: No such file or directory"
    assert slurm.calls("sbatch") == []


@pytest.fixture
def user(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """At a login node, in an empty folder, without configuration, patient; Slurm accepts the job."""
    monkeypatch.setattr("launcher.cli.forecast.PATIENCE_S", 60)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("FTLAUNCH_SITE", "FTLAUNCH_RUNS", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS"):
        monkeypatch.delenv(name, raising=False)
    slurm.answer("sbatch", {"err": STARTS})
    return slurm


def check(*argv: str) -> Result:
    return CliRunner().invoke(app, ["check", *argv])


def test_check_says_when_it_would_start(user: FakeSlurm) -> None:
    done = check("tiny", "--site", "slurm")
    assert done.exit_code == 0, done.output
    assert "on node[1-2] in partition gpu (says Slurm)" in " ".join(done.stdout.split())
    assert list(Path.cwd().iterdir()) == []
    document = json.loads(check("tiny", "--site", "slurm", "--json").stdout)
    assert document["forecast"] == {
        "start": "2026-11-22T20:15:00",
        "nodes": "node[1-2]",
        "partition": "gpu",
        "refusal": None,
        "reason": None,
    }


def test_a_refusal_by_slurm_is_a_warning(user: FakeSlurm) -> None:
    user.answer("sbatch", {"code": 1, "err": "allocation failure: Invalid qos specification\n"})
    done = check("tiny", "--site", "slurm", "--json")
    document = json.loads(done.stdout)
    (found,) = (finding for finding in document["findings"] if finding["code"] == "slurm-refuses")
    assert done.exit_code == 0 and document["ok"]
    assert found["level"] == "warning" and "Invalid qos specification" in found["message"]


def test_without_slurm_there_is_only_no_forecast(user: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = check("tiny", "--site", "slurm", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["forecast"]["reason"] == "there is no sbatch on this machine"


@pytest.mark.parametrize(
    "argv", [("tiny",), ("tiny", "--site", "slurm", "--set", "gpus=1")], ids=["on-this-machine", "a-plan-that-is-refused-already"]
)
def test_slurm_is_not_asked(user: FakeSlurm, argv: tuple[str, ...]) -> None:
    check(*argv)
    assert user.calls("sbatch") == []


def test_patience_is_for_all_presets_of_a_command(user: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.cli.forecast.PATIENCE_S", 0.1)
    user.answer("sbatch", {"sleep_s": 3600})
    done = check("tiny", "tiny-llama", "--site", "slurm", "--json")
    first, second = (document["forecast"]["reason"] for document in json.loads(done.stdout)["presets"])
    assert first.endswith("did not answer within 0.1 s") and second.startswith("Slurm was asked long enough")
    assert len(user.calls("sbatch")) <= 1 and done.exit_code == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param({"out": "2026-11-22T20:15:00\n"}, datetime(2026, 11, 22, 20, 15), id="planned"),
        pytest.param({"out": "N/A\n"}, None, id="not-planned"),
        pytest.param({"out": ""}, None, id="not-there"),
        pytest.param({"code": 1, "err": "slurm_load_jobs error: Invalid job id specified\n"}, None, id="unknown"),
        pytest.param({"sleep_s": 3600, "out": "2026-11-22T20:15:00\n"}, None, id="slow"),
    ],
)
def test_expected_start_of_a_job(slurm: FakeSlurm, answer: dict[str, object], expected: datetime | None) -> None:
    slurm.answer("squeue", answer)
    timeout_s = 0.1 if "sleep_s" in answer else 30.0
    assert expected_start("4711", slurm.tools["squeue"], timeout_s=timeout_s) == expected


def test_status_of_a_queued_run_says_when_it_starts(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.cli.forecast.PATIENCE_S", 60)
    run = toy_run(tmp_path / "runs", slurm_plan())
    submit(run)
    slurm.answer("squeue", {"out": "4711|PENDING|Resources\n"}, {"out": "2026-11-22T20:15:00\n"})
    done = CliRunner().invoke(app, ["status", str(run.root), "--json"])
    document = json.loads(done.stdout)
    assert (document["state"], document["expected_start"]) == ("queued", "2026-11-22T20:15:00")
    assert slurm.calls("squeue")[-1]["argv"][1:] == ["--start", "--noheader", "--format=%S", "--jobs=4711"]
    slurm.answer("squeue", {"out": "4711|RUNNING|None\n"})
    assert "expected_start" not in json.loads(CliRunner().invoke(app, ["status", str(run.root), "--json"]).stdout)


def test_a_run_of_this_machine_waits_for_no_slurm(local: Callable[..., Run], slurm: FakeSlurm) -> None:
    assert start_of(local(), "4711") is None
    assert slurm.calls("squeue") == []
