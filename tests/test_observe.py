"""What a plan is checked against on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.observe import free_disk, has_token, learned_driver, observe
from tests.toy import toy_plan, toy_run


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, None, False),
        ({"HF_TOKEN": ""}, None, False),
        ({"HF_TOKEN": "hf_x"}, None, True),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_x"}, None, True),
        ({}, ".cache/huggingface/token", True),
        ({"HF_HOME": "{home}/elsewhere"}, "elsewhere/token", True),
        ({"XDG_CACHE_HOME": "{home}/c"}, "c/huggingface/token", True),
        ({"HF_TOKEN_PATH": "{home}/mine"}, "mine", True),
    ],
)
def test_token(tmp_path: Path, environ: dict[str, str], file: str | None, expected: bool) -> None:
    if file is not None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("hf_x")
    assert has_token({name: value.format(home=tmp_path) for name, value in environ.items()}, tmp_path) is expected


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    here = os.statvfs(tmp_path)
    free_gib, _ = free_disk(tmp_path / "not" / "yet")
    assert free_gib is not None
    assert abs(free_gib - here.f_bavail * here.f_frsize / 2**30) < 5


def test_driver_of_the_newest_life_on_these_nodes(tmp_path: Path) -> None:
    for number, (partition, driver) in enumerate([("gpu", "535.1"), ("gpu", "555.2"), ("other", "570.3"), ("gpu", None)]):
        plan = toy_plan(site={"name": "cluster"}, hardware={"name": "node"}, slurm={"partition": partition})
        run = toy_run(tmp_path, plan, new=True)
        if driver is not None:
            run.append_event("driver", life=0, driver=driver)
        assert run.id.endswith(f"-{number + 1}") or number == 0
    assert learned_driver(tmp_path, "cluster", "node", "gpu") == "555.2"
    assert learned_driver(tmp_path, "cluster", "node", "other") == "570.3"
    assert learned_driver(tmp_path, "cluster", "elsewhere", "gpu") is None


def test_nothing_is_made(tmp_path: Path) -> None:
    seen = observe(tmp_path / "runs", environ={}, home=tmp_path, site="s", hardware="h", partition=None)
    assert (seen.driver, seen.token) == (None, False)
    assert list(tmp_path.iterdir()) == []
    assert observe(None, environ={}, home=tmp_path, site="s", hardware="h", partition=None).disk_free_gib is None
