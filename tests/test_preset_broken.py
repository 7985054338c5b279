"""Every broken preset of ``tests/broken`` and its whole message, beside it as ``.expected``. Read as ``check`` reads it.

``python -m tests.test_preset_broken`` writes the messages anew; then read the diff.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli.line import Wish, planned, read, refuse
from launcher.errors import FtlaunchError
from tests.conftest import REPOSITORY

BROKEN = REPOSITORY / "tests" / "broken"
HOME = BROKEN / "home"
CANARY = ("hf_CanaryCanaryCanaryCanary0123456789", "CanaryPassword")


def broken() -> list[Path]:
    """``_…`` and ``deep-2`` and so on are what others extend."""
    return sorted(path for path in BROKEN.glob("[!_]*.yaml") if not re.fullmatch(r"deep-([2-9]|10)", path.stem))


def said(path: Path) -> FtlaunchError | None:
    """The refusal of a preset in the working folder; None where there is none."""
    try:
        refuse(planned(read(Wish(path.name)))[1])
    except FtlaunchError as error:
        return error
    return None


@pytest.mark.parametrize("path", broken(), ids=lambda path: path.stem)
def test_broken_preset_says_all_that_is_wrong(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BROKEN)
    monkeypatch.setenv("HOME", str(HOME))
    monkeypatch.delenv("FTLAUNCH_SITE", raising=False)
    error = said(path)
    assert error is not None
    assert f"{error}\n" == path.with_suffix(".expected").read_text()
    assert error.exit_code in (2, 3)
    assert {(finding.line is None, finding.column is None, finding.file is None) for finding in error.findings} == {(False, False, False)}


def test_every_message_has_its_preset() -> None:
    assert {path.stem for path in BROKEN.glob("*.expected")} == {path.stem for path in broken()}


@pytest.mark.parametrize("command", [["check"], ["check", "--json"], ["render"], ["stage"], ["submit"], ["build"]], ids=" ".join)
@pytest.mark.parametrize("name", ["secrets.yaml", "secret-key.yaml"])
def test_no_command_shows_or_writes_a_secret(command: list[str], name: str, tmp_path: Path) -> None:
    preset = tmp_path / name
    preset.write_text((BROKEN / name).read_text().replace("_good.yaml", str(BROKEN / "_good.yaml")))
    before = set(tmp_path.rglob("*"))
    done = ftlaunch(command[0], str(preset), *command[1:], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "looks like a token" in done.stdout + done.stderr
    assert not [canary for canary in CANARY if canary in done.stdout + done.stderr]
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        ["tiny", "--set", f"description={CANARY[0]}"],
        ["tiny", "--set", CANARY[0]],
        ["tiny", "--set", f"{CANARY[0]}=1"],
        ["tiny", "--account", CANARY[0]],
        ["tiny", "--site", CANARY[0]],
        ["tiny", "--allow", CANARY[0]],
        ["tiny", "--explain", CANARY[0]],
    ],
    ids=["value", "setting", "key", "option", "site", "allow", "explain"],
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_no_option_shows_a_secret(options: list[str], form: list[str], tmp_path: Path) -> None:
    done = ftlaunch("check", *options, *form, cwd=tmp_path)
    assert done.returncode == 2
    assert CANARY[0] not in done.stdout + done.stderr
    assert not form or json.loads(done.stdout)["ok"] is False


def ftlaunch(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HOME": str(cwd), "PYTHONPATH": str(REPOSITORY), "FTLAUNCH_SITE": "local"}
    return subprocess.run([sys.executable, "-m", "launcher.cli", *argv], cwd=cwd, env=environ, capture_output=True, text=True)


def main() -> None:
    os.chdir(BROKEN)
    os.environ["HOME"] = str(HOME)
    os.environ.pop("FTLAUNCH_SITE", None)
    for path in broken():
        path.with_suffix(".expected").write_text(f"{said(path)}\n")


if __name__ == "__main__":
    main()
