"""Reading and making locks, and the index pages they come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ActionError, UsageError
from launcher.image.lock import Pin, check_lock, make_lock, read_lock, same_version
from launcher.image.wheels import files_of_index, fits_platform
from launcher.preset.reading import read_stack

A, B, C, D = ("abcd"[number] * 64 for number in range(4))
SHIPPED = ["cpu", "torch2.3-cu121", "torch2.10-cu128"]


def test_pins_with_one_and_two_hashes() -> None:
    torch, markup = f"torch==2.13.0+cpu \\\n    --hash=sha256:{A}\n", f"Markup_Safe==3.0 \\\n  --hash=sha256:{A} \\\n  --hash=sha256:{B}\n"
    text = f"# a comment\n\n{torch}{markup}"
    assert read_lock(text) == {"torch": Pin("torch", "2.13.0+cpu", (A,)), "markup-safe": Pin("markup-safe", "3.0", (A, B))}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("torch==2.3.0\n", 1),
        (f"# x\ntorch>=2.3.0 --hash=sha256:{A}\n", 2),
        (f"--extra-index-url somewhere --hash=sha256:{A}\n", 1),
        (f"torch @ file:///x.whl --hash=sha256:{A}\n", 1),
        ("torch==2.3.0 --hash=md5:abc\n", 1),
        (f"torch==2.3.0 \\\n    --hash=sha256:{A}\n\nnumpy==1.0 \\\n    --hash=sha256:{A[:-1]}\n", 4),
        (f"torch==1 --hash=sha256:{A}\nTorch==2 --hash=sha256:{A}\n", 2),
    ],
    ids=["no-hash", "range", "option", "address", "md5", "short-hash", "twice"],
)
def test_anything_else_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(UsageError) as error:
        read_lock(text, "x.lock")
    assert (error.value.findings[0].file, error.value.findings[0].line) == ("x.lock", line)


@pytest.mark.parametrize(
    ("pin", "installed", "same"),
    [("2.13.0", "2.13.0+cpu", True), ("2.13.0", "2.13.0", True), ("2.13.0+cpu", "2.13.0", False), ("2.13.0", "2.13.1", False)],
)
def test_versions(pin: str, installed: str, same: bool) -> None:
    assert same_version(pin, installed) is same


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_locks_fit_their_stacks_and_name_no_address(name: str) -> None:
    loaded = read_stack(name)
    text = loaded.file.with_suffix(".lock").read_text()
    check_lock(loaded.value, read_lock(text))
    assert "://" not in text
    assert f"python -m launcher.image.lock {name}" in text


def test_the_cpu_lock_takes_no_cuda() -> None:
    pins = read_lock(read_stack("cpu").file.with_suffix(".lock").read_text())
    assert pins["torch"].version.endswith("+cpu")
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize(("name", "cuda"), [("torch2.3-cu121", "12.1"), ("torch2.10-cu128", "12.8")])
def test_the_cuda_locks_bring_the_libraries_of_their_version(name: str, cuda: str) -> None:
    loaded = read_stack(name)
    pins = read_lock(loaded.file.with_suffix(".lock").read_text())
    assert loaded.value.cuda == cuda
    assert pins["nvidia-cuda-runtime-cu12"].version.startswith(f"{cuda}.")


@pytest.mark.parametrize("name", ["torch2.3-cu121", "torch2.10-cu128"])
def test_driver_555_runs_the_cuda_stacks(name: str) -> None:
    minimum = read_stack(name).value.minimum_driver
    assert minimum is not None
    assert [int(part) for part in minimum.split(".")] < [555, 42, 2]


def test_a_lock_is_made_on_the_stacks_python() -> None:
    other = read_stack("cpu").value.model_copy(update={"python": "3.1"})
    with pytest.raises(UsageError, match=rf"the stack has Python 3\.1, this is 3\.{sys.version_info.minor}"):
        make_lock(other)


def found(name: str, version: str, file: str, sha256: str) -> dict[str, Any]:
    """An entry of pip's installation report."""
    return {
        "metadata": {"name": name, "version": version},
        "download_info": {"url": f"x/{file}", "archive_info": {"hashes": {"sha256": sha256}}},
    }


def test_a_lock_takes_every_file_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, sha256 in enumerate((B, C)):
        page = tmp_path / str(number) / "numpy" / "index.html"
        page.parent.mkdir(parents=True)
        page.write_text(
            f'<a href="numpy-2.0-py3-none-any.whl#sha256={sha256}">x</a><a href="numpy-2.0-py3-none-win32.whl#sha256={D}">x</a>'
        )
    here = read_stack("cpu").value.model_copy(update={"python": f"3.{sys.version_info.minor}"})
    report = [found("torch", "2.13.0+cpu", "torch.whl", A), found("NumPy", "2.0", "numpy-2.0-py3-none-any.whl", B)]
    monkeypatch.setattr("launcher.image.lock._resolve", lambda requirements: report)
    monkeypatch.setattr("launcher.image.lock._configured_indexes", lambda: [(tmp_path / str(number)).as_uri() for number in (0, 1)])
    assert make_lock(here).split("\n", 2)[2] == (
        f"numpy==2.0 \\\n    --hash=sha256:{B} \\\n    --hash=sha256:{C}\ntorch==2.13.0+cpu \\\n    --hash=sha256:{A}\n"
    )
    report[0]["metadata"]["version"] = "2.13.0"
    with pytest.raises(ActionError, match=r"pip found torch 2\.13\.0, which brings CUDA.*find-links"):
        make_lock(here)


def test_a_local_index(tmp_path: Path) -> None:
    page = tmp_path / "simple" / "demo" / "index.html"
    page.parent.mkdir(parents=True)
    wheel = f'<a href="../../files/demo-1.0%2Bcpu-py3-none-any.whl#sha256={A}">x</a>'
    source = f'<a data-x="1" href="../../files/demo-1.0.tar.gz#sha256={B}">y</a>'
    page.write_text(f'{wheel}\n{source}\n<a href="no-hash.whl">z</a>')
    index = (tmp_path / "simple").as_uri()
    assert files_of_index(index, "demo") == {"demo-1.0+cpu-py3-none-any.whl": A, "demo-1.0.tar.gz": B}
    assert files_of_index(index, "other") == {}


@pytest.mark.parametrize(
    ("file", "wheel", "fits"),
    [
        ("Demo_x-1.0-py3-none-any.whl", True, True),
        ("demo_x-1.0-cp27-cp27m-manylinux1_x86_64.whl", True, False),
        ("demo_x-1.0-py3-none-win_amd64.whl", True, False),
        ("demo_x-1.1-py3-none-any.whl", True, False),
        ("demo-x-1.0.tar.gz", True, False),
        ("demo-x-1.0.tar.gz", False, True),
        ("demo_x-1.0-py3-none-any.whl", False, False),
        ("not a file name", True, False),
    ],
)
def test_which_files_fit(file: str, wheel: bool, fits: bool) -> None:
    assert fits_platform(file, "demo-x", "1.0", wheel=wheel) is fits
