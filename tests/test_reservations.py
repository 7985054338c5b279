"""The time limit of a submission: what partition, QoS and account allow, and the maintenance that it must not reach into."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launcher import continuation
from launcher.cli import walltime
from launcher.preset.fields import duration_min
from launcher.run import Run
from launcher.site.limits import Limits, Maintenance, choose_time, hostnames, limits_of
from launcher.site.rights import rights_of
from launcher.slurm.job import Job
from launcher.submit import submit
from tests.fake_cluster import CLUSTERS, cluster_of
from tests.fake_slurm import FakeSlurm
from tests.toy import toy_plan, toy_run

NOW = datetime(2026, 11, 22, 12, 0)


def texts(cluster: str) -> dict[str, str]:
    return {file.stem: file.read_text() for file in (CLUSTERS / cluster).iterdir()}


def limits(options: dict[str, str], nodes: int = 1, cluster: str = "shared") -> Limits:
    said = texts(cluster)
    return limits_of(options, nodes, said["partition"], said["reservation"], said["assoc"], said["qos"])


@pytest.mark.parametrize(
    ("options", "longest", "by"),
    [
        pytest.param({"partition": "main", "account": "research-cs"}, 72 * 60, "partition main", id="partition"),
        pytest.param({"account": "research-cs"}, 72 * 60, "partition main", id="the-default-partition"),
        pytest.param({"partition": "gpu", "account": "research-cs", "qos": "long"}, 36 * 60, "QoS p_gpu", id="the-partitions-qos-first"),
        pytest.param({"partition": "main", "account": "education-cs"}, 24 * 60, "account education-cs", id="account"),
        pytest.param({"partition": "main", "account": "education-cs", "qos": "long"}, 72 * 60, "partition main", id="qos-before-account"),
        pytest.param({"partition": "gpu,main", "account": "education-cs"}, 36 * 60, "QoS p_gpu", id="several-partitions"),
        pytest.param({"partition": "unheard-of"}, None, "", id="unknown"),
    ],
)
def test_who_limits_the_time(options: dict[str, str], longest: int | None, by: str) -> None:
    found = limits(options)
    assert (found.longest_min, found.by) == (longest, by)


def test_limits_that_are_not_enforced_do_not_count() -> None:
    said = texts("shared")
    assert limits_of({"partition": "gpu"}, 1, said["partition"], "").by == "partition gpu"


def test_a_maintenance_counts_where_it_leaves_too_few_nodes() -> None:
    (winter,) = limits({"partition": "main"}).maintenances
    assert winter == Maintenance("winter_maintenance", datetime(2026, 12, 1, 8), datetime(2026, 12, 2, 18))
    assert limits({"partition": "main", "reservation": "winter_maintenance"}).maintenances == ()
    said = texts("shared")
    half = said["reservation"].replace("Nodes=c[001-002],", "Nodes=c001,")
    assert limits_of({"partition": "main"}, 1, said["partition"], half).maintenances == ()
    assert len(limits_of({"partition": "main"}, 2, said["partition"], half).maintenances) == 1


def test_what_slurm_does_not_say_limits_nothing() -> None:
    assert limits_of({"partition": "gpu"}, 1, "", "") == Limits()
    assert limits_of({}, 1, "No partitions\n", "No reservations in the system\n") == Limits()
    assert limits({"partition": "of-another-cluster"}).maintenances == ()


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("node1", ["node1"]),
        ("c[001-003,010],login", ["c001", "c002", "c003", "c010", "login"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("(null)", []),
    ],
)
def test_host_lists(expression: str, names: list[str]) -> None:
    assert hostnames(expression) == names


def window(start_h: float, hours: float = 8) -> Maintenance:
    return Maintenance("service", NOW + timedelta(hours=start_h), NOW + timedelta(hours=start_h + hours))


DAY = 24 * 60

NO_MORE = "time limit 2h instead of 24h: QoS debug allows no more"


def late(start: str, end: str, at: str) -> str:
    return f"a time limit of 24h reaches into maintenance service ({start} to {end}): the job starts {at} at the earliest"


@pytest.mark.parametrize(
    ("limits", "more", "time_min", "said"),
    [
        pytest.param(Limits(), {}, DAY, [], id="nothing-in-the-way"),
        pytest.param(Limits(maintenances=(window(24),)), {}, DAY, [], id="just-before"),
        pytest.param(Limits(maintenances=(window(-9),)), {}, DAY, [], id="over"),
        pytest.param(
            Limits(maintenances=(window(6),)),
            {},
            320,
            ["time limit 5h20 instead of 24h, to end before maintenance service (2026-11-22 18:00 to 2026-11-23 02:00)"],
            id="cut",
        ),
        pytest.param(
            Limits(120, "QoS debug", (window(1.5),)),
            {},
            80,
            [
                NO_MORE,
                "time limit 1h20 instead of 2h, to end before maintenance service (2026-11-22 13:30 to 2026-11-22 21:30)",
            ],
            id="limit-and-maintenance",
        ),
        pytest.param(Limits(120, "QoS debug", (window(6),)), {}, 120, [NO_MORE], id="limit"),
        pytest.param(
            Limits(maintenances=(window(6),)),
            {"typed": True},
            DAY,
            [late("2026-11-22 18:00", "2026-11-23 02:00", "2026-11-23 02:00")],
            id="typed",
        ),
        pytest.param(
            Limits(120, "QoS debug"),
            {"typed": True},
            DAY,
            ["time limit 24h, but QoS debug allows 2h: Slurm refuses the job or never starts it"],
            id="typed-above-a-limit",
        ),
        pytest.param(
            Limits(maintenances=(window(0.6),)),
            {},
            DAY,
            [late("2026-11-22 12:36", "2026-11-22 20:36", "2026-11-22 20:36")],
            id="too-soon-to-be-useful",
        ),
        pytest.param(
            Limits(maintenances=(window(0.6),)),
            {"needed_min": 8.0},
            25,
            ["time limit 25m instead of 24h, to end before maintenance service (2026-11-22 12:36 to 2026-11-22 20:36)"],
            id="short-but-all-that-is-needed",
        ),
        pytest.param(
            Limits(maintenances=(window(6), window(20))),
            {"overhead_min": 90.0},
            DAY,
            [late("2026-11-22 18:00", "2026-11-23 02:00", "2026-11-23 16:00")],
            id="start-up-eats-it-and-the-next-one-is-near",
        ),
        pytest.param(
            Limits(maintenances=(window(-1),)),
            {},
            DAY,
            [late("2026-11-22 11:00", "2026-11-22 19:00", "2026-11-22 19:00")],
            id="going-on",
        ),
    ],
)
def test_the_rule(limits: Limits, more: dict[str, Any], time_min: int, said: list[str]) -> None:
    choice = choose_time(DAY, limits, now=NOW, **{"typed": False, **more})
    assert choice.time_min == time_min
    assert [finding.message for finding in choice.findings] == said


def test_a_job_cut_short_leaves_a_tenth_for_the_queue() -> None:
    for hours in (1, 5, 12, 23, 100):
        choice = choose_time(10**4, Limits(maintenances=(window(hours),)), typed=False, now=NOW)
        assert 0.8 * hours * 60 <= choice.time_min <= 0.9 * hours * 60 and choice.time_min % 5 == 0


def test_discover_takes_the_accounts_limit_where_no_qos_says_one() -> None:
    assoc = "education-cs||normal|normal|20|1-00:00:00\n"
    rights = rights_of(cluster_of("shared", assoc=assoc, user="me|education-cs\n"), frozenset())
    walls = {partition.name: rights.max_wall(partition) for partition in rights.partitions}
    assert (walls["main"], walls["gpu"]) == (DAY, 36 * 60)


def test_a_follow_up_job_takes_the_whole_limit_again(slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "job.sbatch").write_text("#!/bin/sh\n")
    slurm.answer("sbatch", {"out": "8\n"})
    Job("7", slurm.tools).follow_up(tmp_path / "job.sbatch", 1440)
    Job("7", slurm.tools).follow_up(tmp_path / "job.sbatch")
    asked = [call["argv"][2:-1] for call in slurm.calls("sbatch")]
    assert asked == [["--dependency=afterany:7", "--time=1440"], ["--dependency=afterany:7"]]


@pytest.mark.parametrize(
    ("asked_min", "full_min", "typed", "maintenance_h", "fits"),
    [
        pytest.param(320, 720, None, None, False, id="the-maintenance-is-over"),
        pytest.param(320, 720, None, 6, True, id="cut-as-it-is"),
        pytest.param(720, None, None, None, True, id="never-cut"),
        pytest.param(720, None, None, 6, False, id="one-is-coming"),
        pytest.param(720, None, "12h", 6, True, id="typed"),
    ],
)
def test_a_resumed_run_takes_the_time_limit_that_fits_now(
    slurm: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked_min: int,
    full_min: int | None,
    typed: str | None,
    maintenance_h: float | None,
    fits: bool,
) -> None:
    coming = () if maintenance_h is None else (Maintenance("service", datetime.now() + timedelta(hours=6.01), datetime.max),)
    monkeypatch.setattr(walltime, "ask_limits", lambda options, nodes, user: Limits(maintenances=coming))
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = toy_plan(
        site={"name": "cluster", "scheduler": "slurm"}, preset={"slurm": {"time": typed}}, time_limit_min=asked_min, signal_lead_s=60
    )
    run = toy_run(tmp_path / "runs", plan)
    submit(run, details={} if full_min is None else {"full_time_min": full_min})
    assert continuation.full_time_min(run) == full_min
    assert walltime.fits_as_it_is(run, plan) == fits


# the whole line, before a pretended maintenance

SITE = """\
extends: slurm
name: far
source: a test
container: {use: none}
stage: {on: slurm, time: 30m}
partitions: {main: {max_time: 12h}}
default_partition: main
"""

SCONTROL = """#!/bin/sh
case "$*" in
*config*) echo 'ClusterName = far' ;;
*partition*) echo 'PartitionName=main Default=YES MaxTime=12:00:00 Nodes=n[1-2]' ;;
*reservation*) cat FOLDER/reservation ;;
esac
"""


@pytest.fixture
def submits(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, str]]:
    """``ftlaunch submit tiny`` on a cluster with a maintenance in so many hours, or ``ftlaunch resume last``: the run, and what it said."""
    for name in ("runs", "images", "data"):
        monkeypatch.setenv(f"FTLAUNCH_{name.upper()}", str(tmp_path / name))
    (tmp_path / "far.yaml").write_text(SITE)
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL.replace("FOLDER", str(tmp_path)))
    slurm.answer("sbatch", *({"out": f"{number}\n"} for number in range(101, 120)))

    def submit(*words: str, maintenance_h: float | None) -> tuple[Run, str]:
        line = ""
        if maintenance_h is not None:
            start = datetime.now() + timedelta(hours=maintenance_h)
            end = start + timedelta(hours=8)
            line = f"ReservationName=service StartTime={start:%Y-%m-%dT%H:%M:%S} EndTime={end:%Y-%m-%dT%H:%M:%S} Nodes=n[1-2] Flags=MAINT\n"
        (tmp_path / "reservation").write_text(line)
        words = words or ("submit", "tiny", "--site", "far.yaml")
        environ = {**os.environ, "HOME": str(tmp_path), "COLUMNS": "300"}
        argv = [sys.executable, "-m", "launcher.cli", *words]
        done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (record,) = tmp_path.glob("runs/*/run.json")
        return Run(record.parent), done.stderr

    return submit


def asked_min(run: Run, life: int = 0) -> int:
    script = run.job_file(life).read_text()
    found = re.search(r"^#SBATCH --time=(\S+)$", script, re.M)
    assert found is not None
    return int(duration_min(found[1]))


def test_submit_ends_before_the_maintenance(submits: Callable[..., tuple[Run, str]]) -> None:
    run, said = submits(maintenance_h=6)
    assert asked_min(run) == 320 == run.plan().time_limit_min
    assert "advice slurm.time: time limit 5h20 instead of 12h, to end before maintenance service" in said
    assert run.events("submitted")[0]["full_time_min"] == 720


def test_a_typed_time_is_kept(submits: Callable[..., tuple[Run, str]]) -> None:
    run, said = submits("submit", "tiny", "--site", "far.yaml", "--time", "8h", maintenance_h=6)
    assert asked_min(run) == 480 and "full_time_min" not in run.events("submitted")[0]
    assert "warning slurm.time: a time limit of 8h reaches into maintenance service" in said
    assert "(--time 320m would end before it)" in said


def test_check_and_render_do_not_ask(submits: Callable[..., tuple[Run, str]], tmp_path: Path) -> None:
    """Their plan is the same everywhere; only a submission, also a dry one, asks."""
    environ = {**os.environ, "HOME": str(tmp_path)}
    start = datetime.now() + timedelta(hours=6)
    (tmp_path / "reservation").write_text(
        f"ReservationName=service StartTime={start:%Y-%m-%dT%H:%M:%S} EndTime={start:%Y-%m-%dT%H:%M:%S} Nodes=n[1-2] Flags=MAINT\n"
    )
    found = []
    for words in (["render", "tiny"], ["submit", "tiny", "--dry-run"]):
        argv = [sys.executable, "-m", "launcher.cli", *words, "--site", "far.yaml", "--json"]
        done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
        found += re.findall(r"--time=(\S+)", json.loads(done.stdout)["files"]["job.sbatch"])
    assert found == ["0-12:00:00", "0-05:20:00"]
