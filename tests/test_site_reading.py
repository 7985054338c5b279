"""Sites, hardware, stacks and the user's settings: own files before shipped ones, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.reading import (
    read_config,
    read_hardware,
    read_site,
    read_stack,
)
from launcher.preset.search import user_folder
from launcher.preset.tree import Where
from tests.preset_files import write


def test_own_files_come_before_shipped_ones(tmp_path: Path) -> None:
    text = 'extends: slurm\nname: delft\nsource: "asked them, 2026-11"\naccount: required\npartitions: {gpu: {max_time: 48h}}\n'
    write(user_folder(tmp_path), "sites/delft.yaml", text)
    site = read_site("delft", home=tmp_path)
    assert (site.value.name, site.value.scheduler, site.value.account) == ("delft", "slurm", "required")
    assert site.where("account") == Where(str(user_folder(tmp_path) / "sites" / "delft.yaml"), 4, 1)
    write(user_folder(tmp_path), "hardware/cpu.yaml", "name: cpu\nsource: mine\ncpus: 64\nmemory_gib: 8\n")
    assert read_hardware("cpu", home=tmp_path).value.cpus == 64
    assert read_hardware("cpu", home=tmp_path / "other").value.cpus == 2


def test_unknown_hardware_points_at_the_preset(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_hardware("a100-80g", home=tmp_path, at=Where("x.yaml", 7))
    assert str(error.value) == "x.yaml:7: hardware: no hardware of the name 'a100-80g' (did you mean a100-80gb?)"


def test_site_by_path_says_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, "site.yaml", "name: x\nsource: y\nscheduler: pbs\ncontainer: {use: docker}\n")
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path)
    expected = f"{path}:3:1: scheduler: 'pbs' is not none or slurm\n{path}:4:13: container.use: 'docker' is not apptainer or none"
    assert str(error.value) == expected


SITE = "name: x\nsource: y\nscheduler: slurm\n"


def test_variables_of_a_site_are_replaced(tmp_path: Path) -> None:
    binds = "['$SCRATCH/ada:/scratch:ro', '/a\\$b']"
    text = f"{SITE}container: {{binds: {binds}, env: {{CACHE: '${{SCRATCH}}/c'}}}}\nnetwork: {{binds: [$SCRATCH]}}\n"
    found = read_site(str(write(tmp_path, "site.yaml", text)), home=tmp_path, environ={"SCRATCH": "/x:y"}).value
    assert found.container.binds == ["/x\\:y/ada:/scratch:ro", "/a\\$b"]
    assert (found.container.env, found.network.binds) == ({"CACHE": "/x:y/c"}, ["/x\\:y"])


def test_what_is_wrong_with_a_sites_binds(tmp_path: Path) -> None:
    path = write(tmp_path, "site.yaml", f"{SITE}container:\n  binds:\n    - /ok:/ok:ro\n    - data:/data\nnetwork: {{binds: ['/a:b']}}\n")
    said = "is no bind; write source[:target[:options]], paths absolute or beginning with $VARIABLE"
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path, environ={})
    assert str(error.value) == f"{path}:7:7: container.binds.1: 'data:/data' {said}\n{path}:8:19: network.binds.0: '/a:b' {said}"
    write(tmp_path, "site.yaml", f"{SITE}container: {{binds: [$A], env: {{B: $B}}}}\nnetwork: {{binds: [$C]}}\n")
    with pytest.raises(UsageError) as error:
        read_site(str(path), home=tmp_path, environ={"C": "relative"})
    assert str(error.value) == (
        f"{path}:4:32: container.env.B: $B: $B is not set\n"
        f"{path}:4:21: container.binds.0: $A: $A is not set\n"
        f"{path}:5:19: network.binds.0: $C: relative has a path that is not absolute"
    )


def test_stack_with_unknown_base(tmp_path: Path) -> None:
    text = "name: x\nbase: {kind: dockr, image: a}\npython: 3.11\npackages: {torch: 2.3.0, transformers: 4.41.1}\n"
    path = write(tmp_path, "s.yaml", text)
    with pytest.raises(UsageError) as error:
        read_stack(str(path), home=tmp_path)
    assert str(error.value) == (
        f"{path}:2:1: base: 'dockr' is not one of debootstrap, docker, localimage (did you mean docker?)\n"
        f"{path}:3:1: python: a text is needed, not 3.11 (in quotes: '3.11')"
    )


def test_user_config(tmp_path: Path) -> None:
    assert read_config(home=tmp_path) is None
    path = write(user_folder(tmp_path), "config.yaml", "site: slurm\nslurm: {account: me}\n")
    config = read_config(home=tmp_path)
    assert config is not None
    assert (config.value.site, config.value.slurm.account, config.where("slurm.account")) == ("slurm", "me", Where(str(path), 2, 9))
