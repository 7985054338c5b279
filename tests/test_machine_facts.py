"""The login node's own facts: mounts, folders with room, container command, subordinate ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.site.machine_facts import (
    container_module,
    filesystem_of,
    find_rooms,
    look_for_apptainer,
    module_names,
    read_mounts,
    subordinate_ids,
)

MOUNTS = "rootfs / ext4 rw 0 0\nsrv:/home /home nfs4 rw 0 0\nfs@tcp:/x /scratch lustre rw 0 0\nx /mnt/with\\040space beegfs_nodev rw 0 0\n"


def test_mounts(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    mounts = read_mounts(tmp_path / "mounts")
    assert [filesystem_of(path, mounts) for path in ("/home/a", "/scratch", "/scratchy", "/mnt/with space/x")] == [
        "nfs4",
        "lustre",
        "ext4",
        "beegfs_nodev",
    ]


def test_rooms(tmp_path: Path) -> None:
    home, scratch, closed = tmp_path / "home", tmp_path / "scratch", tmp_path / "closed"
    for folder in (home / "work", scratch, closed):
        folder.mkdir(parents=True)
    environ = {"USER": "x", "SCRATCH": str(scratch), "WORK": str(home / "work"), "PROJECT": str(scratch), "LUSTRE": str(tmp_path / "gone")}
    rooms = find_rooms(environ, home, [("/", "ext4"), (str(scratch), "lustre")])
    assert [(room.written, room.shared) for room in rooms] == [("$SCRATCH", True)]


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (["gcc/12", "tacc-apptainer/1.3.3", "tacc-apptainer/1.4.1(default)"], "tacc-apptainer"),
        (["/opt/modules:", "tools/Apptainer/1.2.4"], "tools/Apptainer"),
        (["singularity-ce/4.1.0"], "singularity-ce"),
        (["apptainer-extras-docs"], None),
        ([], None),
    ],
)
def test_container_module(names: list[str], module: str | None) -> None:
    assert container_module(names) == module


def test_apptainer_by_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``module`` is a function of the login shell, and only what it loads brings the command."""
    (tmp_path / "brought").mkdir()
    command = tmp_path / "brought" / "singularity"
    command.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "singularity-ce version 3.11.4"\nexit 0\n')
    command.chmod(0o755)
    (tmp_path / ".bash_profile").write_text(
        f'module() {{ if [ "$2" = avail ]; then echo site/singularity/3.11; else PATH=$PATH:{tmp_path}/brought; fi; }}\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    names = module_names()
    assert names == ["site/singularity/3.11"]
    found = look_for_apptainer(None, names)
    assert (found.path, found.command, found.module, found.version, found.setuid) == (
        str(command),
        "singularity",
        "site/singularity",
        "3.11.4",
        False,
    )


def test_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".bash_profile").write_text("unset -f module\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module_names() is None


def test_subordinate_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("newuidmap", "newgidmap"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "subuid").write_text("anna:100000:65536\n")
    (tmp_path / "empty").write_text("")
    assert subordinate_ids("anna", [str(tmp_path / "subuid")] * 2)
    assert not subordinate_ids("anna", [str(tmp_path / "subuid"), str(tmp_path / "empty")])
    assert not subordinate_ids("ann", [str(tmp_path / "subuid")] * 2)
