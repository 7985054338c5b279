"""Run folders: created once, found again."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import ActionError, UsageError
from launcher.run import Run
from launcher.runs import RunExists, all_runs, create_run, find_existing, find_run
from launcher.state import Known, state_of
from launcher.submit import submit
from tests.toy import toy_plan, toy_run
from tests.toy_runs import ended, wait_until


def test_run_folder_is_whole_and_private(tmp_path: Path) -> None:
    plan = toy_plan()
    run = create_run(plan, lambda run: {"image.def": f"{run.root}\n"}, "name: toy  # as written\n", tmp_path / "runs")
    assert run.id == "toy-01234567"
    assert run.preset_file.read_text() == "name: toy  # as written\n"
    assert run.definition_file.read_text() == f"{tmp_path}/runs/toy-01234567\n"
    assert run.plan() == plan
    record = run.record()
    assert (record["id"], record["identity"], record["scheduler"], record["python"]) == (run.id, plan.identity, "none", sys.executable)
    for path in (run.root, *run.root.rglob("*")):
        if "code" not in path.relative_to(run.root).parts[:1]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert list((tmp_path / "runs").iterdir()) == [run.root]


def test_code_of_a_run_is_whole_and_has_no_caches(tmp_path: Path) -> None:
    run = create_run(toy_plan(), lambda run: {}, "", tmp_path)
    assert not [path for path in run.code.rglob("*") if path.suffix == ".pyc" or path.name in ("__pycache__", "templates", "presets")]
    environment = {**os.environ, "PYTHONPATH": str(run.code)}
    script = "import launcher.supervise; print(launcher.supervise.__file__)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.startswith(str(run.code))


def test_same_identity_is_created_once(tmp_path: Path) -> None:
    plan = toy_plan()
    first = create_run(plan, lambda run: {}, "", tmp_path)
    with pytest.raises(RunExists) as caught:
        create_run(plan, lambda run: {}, "", tmp_path)
    assert caught.value.run == first and caught.value.exit_code == 5


def test_new_counts_up(tmp_path: Path) -> None:
    plan = toy_plan()
    made = [create_run(plan, lambda run: {}, "", tmp_path, new=True).id for _ in range(3)]
    assert made == ["toy-01234567", "toy-01234567-2", "toy-01234567-3"]
    assert find_existing(plan, tmp_path) == Run(tmp_path / "toy-01234567-3")


def test_rest_of_a_removed_run_is_named_and_does_not_stop_new_ones(tmp_path: Path) -> None:
    """A job that still lives writes its events into the folder that its user removes."""
    rest = tmp_path / "toy-01234567" / "events.jsonl"
    rest.parent.mkdir()
    rest.write_text("")
    with pytest.raises(ActionError, match=r"toy-01234567 is in the way: it is no run, for it has no run.json \(remove it") as caught:
        create_run(toy_plan(), lambda run: {}, "", tmp_path)
    assert not isinstance(caught.value, RunExists) and find_existing(toy_plan(), tmp_path) is None
    assert create_run(toy_plan(), lambda run: {}, "", tmp_path, new=True).id == "toy-01234567-2"
    assert rest.is_file()


def test_same_name_and_prefix_of_another_identity_is_another_run(tmp_path: Path) -> None:
    create_run(toy_plan(), lambda run: {}, "", tmp_path)
    other = dataclasses.replace(toy_plan(), identity="01234567" + "f" * 56)
    assert find_existing(other, tmp_path) is None


def test_race_of_many_submissions_creates_one(tmp_path: Path) -> None:
    plan = toy_plan()

    def attempt(_: int) -> str:
        try:
            return create_run(plan, lambda run: {"image.def": "x\n"}, "", tmp_path).id
        except RunExists:
            return "exists"

    with ThreadPoolExecutor(8) as pool:
        results = sorted(pool.map(attempt, range(8)))
    assert results == ["exists"] * 7 + ["toy-01234567"]
    assert [path.name for path in tmp_path.iterdir()] == ["toy-01234567"]


def test_race_with_new_creates_all(tmp_path: Path) -> None:
    plan = toy_plan()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_run(plan, lambda run: {}, "", tmp_path, new=True).id, range(8)))
    assert len(set(made)) == 8 and len(all_runs(tmp_path)) == 8


def test_failed_rendering_leaves_nothing(tmp_path: Path) -> None:
    def broken(run: Run) -> dict[str, str]:
        raise UsageError("a broken template")

    with pytest.raises(UsageError, match="broken template"):
        create_run(toy_plan(), broken, "", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["a:b", "a,b", "50%j", "back\\slash", "new\nline", "escape\x1b", "\u2028", "\u202eabc"])
def test_folder_that_no_tool_could_name(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UsageError, match="the runs folder") as caught:
        create_run(toy_plan(), lambda run: {}, "", tmp_path / folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["with space", "it's", 'double"quote', "$(touch gone)", "`id`", "-rf", "*", "ünï"])
def test_hostile_folder_is_only_a_name(tmp_path: Path, folder: str) -> None:
    run = toy_run(tmp_path / folder, toy_plan())
    submit(run)
    wait_until(lambda: ended(run), run)
    assert state_of(run, Known()) == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder]


def test_find_run(tmp_path: Path) -> None:
    plan = toy_plan()
    first, second = (create_run(plan, lambda run: {}, "", tmp_path, new=True) for _ in range(2))
    assert find_run(tmp_path, "last") == second
    assert find_run(tmp_path, "toy-01234567") == first
    assert find_run(tmp_path, "toy-01234567-") == second
    assert find_run(Path("/nowhere"), str(first.root)) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [("toy-0", "could be toy-01234567, toy-01234567-2"), ("nothing", "no run 'nothing'"), ("/nowhere/else", "is not a run folder")],
)
def test_find_run_says_what_there_is(tmp_path: Path, text: str, message: str) -> None:
    for _ in range(2):
        create_run(toy_plan(), lambda run: {}, "", tmp_path, new=True)
    with pytest.raises(UsageError, match=message):
        find_run(tmp_path, text)


def test_last_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run 'last'"):
        find_run(tmp_path, "last")
