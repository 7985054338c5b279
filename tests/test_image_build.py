"""Building with a script for Apptainer: the cache, the claim, mirrors, interruption, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.errors import ActionError, MissingError, UsageError
from launcher.image.build import ensure_image
from launcher.image.claim import Holder, claim
from launcher.image.mirrors import Sources, debian_mirror, machine_sources, write_sources
from launcher.image.verify import verify_image
from launcher.preset.reading import read_stack
from launcher.preset.site import Mirrors, Site
from launcher.preset.stack import Stack
from launcher.run import boot_id, process_start

LOADED = read_stack("cpu")
LOCK = LOADED.file.with_suffix(".lock").read_text()
DOCKER = {"kind": "docker", "image": "example/python:3.11", "digest": "sha256:" + "0" * 64}
STACK = Stack.model_validate({**LOADED.value.model_dump(), "base": DOCKER, "debian_packages": []})

APPTAINER = """#!{python}
import json, os, pathlib, re, sys, time
here = pathlib.Path(__file__).parent
command, *arguments = sys.argv[1:]
if command == "build":
    here.joinpath("builds").open("a").write(json.dumps([sys.argv[1:], os.environ["APPTAINER_TMPDIR"], sorted(os.listdir())]) + "\\n")
    definition = pathlib.Path("image.def").read_text()
    mounted = arguments[arguments.index("--bind") + 1].split(":")[0]
    here.joinpath("pip.conf").write_text(pathlib.Path(mounted, "pip.conf").read_text())
    pathlib.Path(arguments[-2]).write_text(re.search("ftlaunch.identity (.*)", definition)[1])
    {build}
elif command == "inspect":
    text = pathlib.Path(arguments[-1]).read_text()
    if len(text) != 64: sys.exit("FATAL: not a SIF")
    found = {{"ftlaunch.identity": text, "ftlaunch.debian-packages": "bash=1 apt=2.0=3", "ftlaunch.unpacked-kib": "7"}}
    print(json.dumps({{"data": {{"attributes": {{"labels": found}}}}}}))
elif command == "test":
    {test}
elif command == "--version":
    print("apptainer version 0.0")
"""


def site(tmp_path: Path, *, build: str = "pass", test: str = "print('all well')", **mirrors: object) -> Site:
    script = tmp_path / "apptainer"
    script.write_text(APPTAINER.format(python=sys.executable, build=build, test=test))
    script.chmod(0o755)
    (tmp_path / "scratch").mkdir(exist_ok=True)
    plain = {
        "name": "here",
        "source": "test",
        "scheduler": "none",
        "container": {"command": str(script), "binds": ["/data"], "env": {"A": "1"}},
    }
    return Site.model_validate({**plain, "local_disk": [str(tmp_path / "scratch")], "mirrors": mirrors})


def builds(tmp_path: Path) -> list[list[object]]:
    path = tmp_path / "builds"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def left(tmp_path: Path) -> list[str]:
    """Everything in the images folder and in the scratch folder but logs."""
    found = [*(tmp_path / "images").iterdir(), *(tmp_path / "scratch").iterdir()]
    return sorted(path.name for path in found if path.name != "logs")


def test_built_once_then_taken_from_the_cache(tmp_path: Path) -> None:
    said: list[str] = []
    first = ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=said.append)
    assert first.image is not None and first.identity is not None
    image = Path(first.image)
    assert image.name == f"cpu-{first.identity[:12]}.sif"
    assert image.read_text() == first.identity
    assert (first.command, first.binds, first.env) == (str(tmp_path / "apptainer"), ("/data",), {"A": "1"})
    assert left(tmp_path) == [image.name, f"{image.name}.json"]
    record = json.loads(Path(f"{image}.json").read_text())
    assert (record["test"], record["debian_packages"], record["unpacked_bytes"]) == ("all well", {"bash": "1", "apt": "2.0=3"}, 7 * 1024)
    assert said == [f"building {image} (log: {tmp_path}/images/logs/{image.stem}.log)", f"built {image}"]
    assert ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=said.append) == first
    assert len(builds(tmp_path)) == 1
    assert ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", force=True, log=said.append) == first
    assert len(builds(tmp_path)) == 2


def test_how_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/x")
    ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=print)
    [[arguments, temporary, beside]] = builds(tmp_path)
    assert isinstance(arguments, list)
    assert arguments[:2] == ["build", "--fakeroot"]
    assert not [word for word in arguments if "build-arg" in word]
    assert str(temporary).startswith(str(tmp_path / "scratch" / "ftlaunch-build-"))
    assert beside == ["check.py", "image.def", "requirements.lock", "stack.json"]


def test_mirrors_are_no_part_of_the_identity_and_reach_the_build(tmp_path: Path) -> None:
    plain = ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=print)
    other = site(tmp_path, pip_index="https://user:secret@mirror.invalid/simple")
    assert ensure_image(STACK, LOCK, other, tmp_path / "images", force=True, log=print).identity == plain.identity
    assert "index-url = https://user:secret@mirror.invalid/simple" in (tmp_path / "pip.conf").read_text()
    assert not [word for arguments, *_ in builds(tmp_path) for word in arguments if "secret" in word]  # type: ignore[attr-defined]
    assert [path for path in (tmp_path / "images").rglob("*") if path.is_file() and "secret" in path.read_text()] == []


def test_a_failed_build_names_its_log_and_leaves_nothing_else(tmp_path: Path) -> None:
    failing = site(tmp_path, build="print('E: no such package'); sys.exit('FATAL: while running engine')")
    with pytest.raises(ActionError, match="the build ended with 1: E: no such package") as error:
        ensure_image(STACK, LOCK, failing, tmp_path / "images", log=print)
    [log] = (tmp_path / "images" / "logs").iterdir()
    assert error.value.findings[0].hint == f"open {log}"
    assert "E: no such package" in log.read_text()
    assert left(tmp_path) == []


def test_an_image_whose_test_fails_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ActionError, match="the image's test failed: torch is 1, the lock pins 2"):
        ensure_image(STACK, LOCK, site(tmp_path, test="sys.exit('torch is 1, the lock pins 2')"), tmp_path / "images", log=print)
    assert left(tmp_path) == []


def test_a_damaged_image_is_built_again(tmp_path: Path) -> None:
    image = Path(str(ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=print).image))
    image.write_text("half of it")
    said: list[str] = []
    ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=said.append)
    assert said[0] == f"{image} is damaged: building it again"
    assert len(image.read_text()) == 64


def test_without_apptainer(tmp_path: Path) -> None:
    nowhere = Site.model_validate(
        {"name": "x", "source": "x", "scheduler": "none", "container": {"command": str(tmp_path / "none"), "module": "Apptainer"}}
    )
    with pytest.raises(MissingError, match=r"is not on this machine \(module load Apptainer\)") as error:
        ensure_image(STACK, LOCK, nowhere, tmp_path / "images", log=print)
    assert error.value.exit_code == 4
    assert not (tmp_path / "images").exists()


CHILD = """
import pathlib, signal, sys
sys.path.insert(0, sys.argv[2])
import test_image_build as t
signal.signal(signal.SIGINT, signal.default_int_handler)
path = pathlib.Path(sys.argv[1])
t.ensure_image(t.STACK, t.LOCK, t.Site.model_validate_json((path / "site.json").read_text()), path / "images", log=print)
"""
HANG = "here.joinpath('pid').write_text(str(os.getpid())); here.joinpath('started').open('w').write('x'); time.sleep(600)"


def child_that_builds(tmp_path: Path) -> subprocess.Popen[bytes]:
    """Another process in the middle of a build that never ends."""
    os.mkfifo(tmp_path / "started")
    (tmp_path / "site.json").write_text(site(tmp_path, build=HANG).model_dump_json())
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (tmp_path / "started").read_text()
    return child


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda stop: stop.name)
def test_an_interrupted_build_leaves_only_its_log(tmp_path: Path, stop: signal.Signals) -> None:
    child = child_that_builds(tmp_path)
    child.send_signal(stop)
    assert child.wait() != 0
    assert left(tmp_path) == []
    assert process_start(int((tmp_path / "pid").read_text())) is None


def test_what_a_killed_builder_left_is_taken_over(tmp_path: Path) -> None:
    child = child_that_builds(tmp_path)
    child.kill()
    child.wait()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    before = left(tmp_path)
    assert [name.rpartition(".")[2] for name in before if not name.startswith("ftlaunch-build-")] == ["lock"]
    assert len(before) == 2
    said: list[str] = []
    done = ensure_image(STACK, LOCK, site(tmp_path), tmp_path / "images", log=said.append)
    name = Path(str(done.image)).name
    assert left(tmp_path) == [name, f"{name}.json"]
    assert [line.split()[0] for line in said] == ["building", "built"]


def test_a_second_builder_waits_and_takes_the_result(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    said: list[str] = []

    def log(line: str) -> None:
        said.append(line)
        if "waiting for it" in line:
            (tmp_path / "go").write_text("x")

    first = threading.Thread(
        target=lambda: ensure_image(STACK, LOCK, site(tmp_path, build="here.joinpath('go').read_text()"), tmp_path / "images", log=log)
    )
    first.start()
    while not said:
        threading.Event().wait(0.01)
    second = ensure_image(STACK, LOCK, site(tmp_path, build="here.joinpath('go').read_text()"), tmp_path / "images", log=log)
    first.join()
    assert len(builds(tmp_path)) == 1
    assert Path(str(second.image)).is_file()
    assert any(line.endswith("waiting for it") and f"process {os.getpid()} on" in line for line in said)


# ---- the claim


def write_lease(folder: Path, holder: Holder) -> None:
    folder.mkdir()
    (folder / "lease.json").write_text(json.dumps(holder.__dict__))


def test_a_dead_holder_loses_its_claim_and_scratch(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    start = process_start(dead.pid)
    dead.wait()
    scratch, precious = tmp_path / "ftlaunch-build-x", tmp_path / "precious"
    for folder in (scratch, precious):
        folder.mkdir()
    for name in (scratch, precious):
        write_lease(tmp_path / "claim", Holder(os.uname().nodename, boot_id(), dead.pid, start or 0, str(name)))
        with claim(tmp_path / "claim", scratch=None, waiting=print, done=lambda: False) as mine:
            assert mine
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_silent_holder_on_another_machine_is_dead(tmp_path: Path) -> None:
    write_lease(tmp_path / "claim", Holder("elsewhere", "boot", 1, 1))
    seen: list[Holder | None] = []

    def waiting(holder: Holder | None) -> None:
        seen.append(holder)
        os.utime(tmp_path / "claim" / "lease.json", (0, 0))

    with claim(tmp_path / "claim", scratch=None, waiting=waiting, done=lambda: False, poll_s=0) as mine:
        assert mine
    assert seen == [Holder("elsewhere", "boot", 1, 1)]


# ---- mirrors


def test_the_site_wins_over_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "ca.crt"
    bundle.write_text("certificate")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in {"PIP_INDEX_URL": "machine", "PIP_FIND_LINKS": "/machine", "PIP_CERT": str(bundle), "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)
    found = machine_sources(Mirrors())
    assert (found.pip["index-url"], found.pip["find-links"], found.ca_bundle) == ("machine", "/machine", bundle)
    assert "no-cache-dir" not in found.pip
    assert machine_sources(Mirrors(pip_index="site")).pip == {"index-url": "site"}
    assert machine_sources(Mirrors(pip_find_links="/site")).pip["find-links"] == "/site"
    with pytest.raises(UsageError, match="the CA bundle /no/such is not there"):
        machine_sources(Mirrors(ca_bundle="/no/such"))


def test_local_indexes_and_wheels_get_a_place_in_the_build(tmp_path: Path) -> None:
    index, wheels, mount = tmp_path / "index" / "simple", tmp_path / "my wheels", tmp_path / "mnt"
    for folder in (index, wheels, mount):
        folder.mkdir(parents=True)
    bundle = tmp_path / "x.crt"
    bundle.write_text("certificate")
    pip = {
        "index-url": "https://mirror.invalid/simple",
        "extra-index-url": f"{index.as_uri()}\nhttps://b.invalid",
        "find-links": wheels.as_uri(),
    }
    binds = write_sources(Sources(pip, {"Acquire::Check-Date": "false"}, bundle), mount)
    assert binds == [f"{tmp_path}/extra-index-url-0:/mnt/extra-index-url-0:ro", f"{tmp_path}/find-links-1:/mnt/find-links-1:ro"]
    assert [(tmp_path / name).readlink() for name in ("extra-index-url-0", "find-links-1")] == [index.parent, wheels]
    assert (mount / "pip.conf").read_text() == (
        "[global]\nindex-url = https://mirror.invalid/simple\n"
        "extra-index-url = file:///mnt/extra-index-url-0/simple\n    https://b.invalid\n"
        "find-links = /mnt/find-links-1\ncert = /mnt/ca.crt\n"
    )
    assert (mount / "apt.conf").read_text() == 'Acquire::Check-Date "false";\nAcquire::https::CaInfo "/mnt/ca.crt";\n'
    assert (mount / "ca.crt").read_text() == "certificate"


def test_a_debian_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert debian_mirror(Mirrors(debian="http://mirror.invalid/debian"), "bookworm") == "http://mirror.invalid/debian"
    with pytest.raises(UsageError, match="holds a password"):
        debian_mirror(Mirrors(debian="http://user:pass@mirror.invalid/debian"), "bookworm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match=r"no Debian mirror for bookworm is known on this machine \(name one in mirrors\.debian"):
        debian_mirror(Mirrors(), "bookworm")


# ---- an image that the user brings


def test_an_image_of_ones_own(tmp_path: Path) -> None:
    here = site(tmp_path)
    with pytest.raises(UsageError, match="there is no such file") as error:
        verify_image(tmp_path / "mine.sif", here, file="p.yaml", line=3)
    assert (error.value.findings[0].file, error.value.findings[0].line, error.value.findings[0].key) == ("p.yaml", 3, "stack.image")
    (tmp_path / "mine.sif").write_text("something else")
    with pytest.raises(UsageError, match="not an Apptainer image"):
        verify_image(tmp_path / "mine.sif", here)
