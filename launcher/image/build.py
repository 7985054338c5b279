"""Stack → image file: cached by identity, built without root into a temporary name, tested, renamed. A failure leaves only its log."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ActionError, FtlaunchError, MissingError, UsageError
from launcher.files import hash_file, write_json, write_text
from launcher.image.apptainer import ask, find_apptainer, labels, last_line
from launcher.image.claim import SCRATCH, Holder, claim
from launcher.image.definition import build_arguments, identity, image_files, render_definition
from launcher.image.disk import choose_folder
from launcher.image.enter import apptainer_folders, clean_environment
from launcher.image.mirrors import debian_mirror, machine_sources, write_sources
from launcher.image.sweep import remove_tree
from launcher.plan import Container
from launcher.preset.site import Site
from launcher.preset.stack import Stack
from launcher.run import now

SCRATCH_BYTES = {False: 4 << 30, True: 24 << 30}
"""Free space that a build wants beside the image, without and with CUDA libraries (measured: 1.6 and 11 GiB)."""


SQUASH = ("--mksquashfs-args", "-Xcompression-level 3")
"""gzip, which every kernel reads, at a level that takes half of the time for 8 % more bytes."""


@dataclass(frozen=True)
class ImageRecord:
    """``<image>.json``: what is known of an image without opening it."""

    identity: str
    stack: str
    machine: str
    versions: dict[str, str]
    """The stack's pins."""
    debian_packages: dict[str, str]
    test: str
    """What its ``%test`` printed."""
    build_s: float
    bytes: int
    unpacked_bytes: int
    apptainer: str
    time: str


def ensure_image(
    stack: Stack, lock_text: str, site: Site, images: Path, *, force: bool = False, log: Callable[[str], Any], own: Path | None = None
) -> Container:
    """The stack's image in ``images``, ``<stack>-<12 hex of its identity>.sif``: the one that is there, else built now.

    A second builder of the same image waits for the first and takes its result. ``force`` builds again. ``log`` gets lines of progress.
    Errors: MissingError (no Apptainer, no debootstrap, no mirror), GateError (no disk has room), UsageError (stack, lock, site),
    ActionError (the build or its test failed; names the log).
    """
    command, images = find_apptainer(site.container), images.absolute()
    base_sha256 = _base_sha256(stack)
    wanted = identity(stack, lock_text, base_sha256=base_sha256, own=own)
    image = image_file(stack, wanted, images)
    container = Container("apptainer", str(image), wanted, command, tuple(site.container.binds), dict(site.container.env))
    before = _mtime(image)
    if before is not None and not force:
        if _is_whole(command, image, wanted):
            return container
        log(f"{image} is damaged: building it again")
    images.mkdir(parents=True, exist_ok=True)
    text = render_definition(stack, lock_text, base_sha256=base_sha256, own=own)

    def waiting(holder: Holder | None) -> None:
        who = f"process {holder.pid} on {holder.host}" if holder else "another process"
        log(f"{who} builds {image.name}: waiting for it")

    def done() -> bool:
        return _mtime(image) not in (None, before)

    held = images / f".{image.name}.lock"
    with _termination_raises(), _scratch(site, stack) as scratch, claim(held, scratch=str(scratch), waiting=waiting, done=done) as mine:
        if mine and not done():
            log(f"building {image} (log: {_log_file(image)})")
            argv = _command(command, stack, text, image_files(stack, lock_text), site, held / image.name, scratch)
            _build(command, argv, stack, wanted, held / image.name, image, scratch)
            log(f"built {image}")
    return container


def find_image(stack: Stack, lock_text: str, images: Path) -> Path | None:
    """The stack's image where it was built already, by its record: Apptainer is not asked, which a login node may be without."""
    wanted = identity(stack, lock_text, base_sha256=_base_sha256(stack))
    image = image_file(stack, wanted, images)
    try:
        record = json.loads(Path(f"{image}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return image if record.get("identity") == wanted and image.is_file() and image.stat().st_size == record.get("bytes") else None


def image_file(stack: Stack, wanted: str, images: Path) -> Path:
    """Where the image of this identity lies, once it is built."""
    return images.absolute() / f"{stack.name}-{wanted[:12]}.sif"


def _build(command: str, argv: Sequence[str], stack: Stack, wanted: str, part: Path, image: Path, scratch: Path) -> None:
    """Build ``part``, test it, write its record, rename it to ``image``."""
    start = time.monotonic()
    own = apptainer_folders(scratch / "tmp")
    log_file = _log_file(image)
    log_file.parent.mkdir(exist_ok=True)
    _run(argv, scratch / "definition", own, log_file)
    test = ask([command, "test", str(part)], extra=own)
    if test.returncode != 0:
        raise ActionError(f"the image's test failed: {last_line(test.stderr)}", code="image-test", hint=f"open {log_file}")
    said, size = labels(command, part), part.stat().st_size
    packages = said.get("ftlaunch.debian-packages", "").split()
    record = ImageRecord(
        identity=wanted,
        stack=stack.name,
        machine=platform.machine(),
        versions=dict(stack.packages),
        debian_packages=dict(package.split("=", 1) for package in packages),
        test=test.stdout.strip(),
        build_s=round(time.monotonic() - start, 1),
        bytes=size,
        unpacked_bytes=int(said.get("ftlaunch.unpacked-kib", 4 * size // 1024)) * 1024,
        apptainer=ask([command, "--version"]).stdout.strip(),
        time=now(),
    )
    write_json(Path(f"{image}.json"), asdict(record), mode=0o644)
    part.chmod(0o755)
    os.replace(part, image)


def _command(command: str, stack: Stack, text: str, files: Mapping[str, str], site: Site, part: Path, scratch: Path) -> list[str]:
    """Lay out what the build reads, in ``scratch``: ``definition`` (where it runs) and ``mnt`` (bound to ``/mnt``); its argument list."""
    definition, mnt = scratch / "definition", scratch / "mnt"
    for folder in (definition, mnt, scratch / "tmp"):
        folder.mkdir()
    for name, content in {**files, "image.def": text}.items():
        write_text(definition / name, content, mode=0o644)
    mirror = None
    if stack.base.kind == "debootstrap":
        if shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            hint = "install the package debootstrap, or use a docker base"
            raise MissingError("debootstrap is not on this machine, which the stack's base is made with", code="no-debootstrap", hint=hint)
        mirror = debian_mirror(site.mirrors, stack.base.suite)
    elif stack.base.kind == "localimage":
        (definition / "base.sif").symlink_to(Path(stack.base.path).absolute())
    binds = [f"{mnt}:/mnt", *write_sources(machine_sources(site.mirrors), mnt)]
    options = [word for value in binds for word in ("--bind", value)]  # a build takes --mount once only (1.4.5)
    options += [word for name, value in build_arguments(stack, mirror).items() for word in ("--build-arg", f"{name}={value}")]
    return [command, "build", "--fakeroot", *SQUASH, *options, str(part), "image.def"]


def _run(argv: Sequence[str], cwd: Path, own: dict[str, str], log_file: Path) -> None:
    """Run the build in a process group of its own; when this process is interrupted, the group ends first."""
    with log_file.open("w", encoding="utf-8") as output:
        output.write(f"# {' '.join(argv)}\n")
        output.flush()
        environment = {**clean_environment(os.environ), **own}
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            umask=0o022,  # what root may not show to others, nobody could read in the image
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code != 0:
        said = [line for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        why = next((line for line in reversed(said) if "FATAL" not in line), "it said nothing")
        raise ActionError(f"the build ended with {code}: {why.strip()[-400:]}", code="image-build", hint=f"open {log_file}")


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """TERM and HUP unwind the stack as Ctrl-C does, so that they leave nothing behind either. Only the main thread hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    for stop, patience_s in ((signal.SIGINT, 10), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _scratch(site: Site, stack: Stack) -> Iterator[Path]:
    """A folder on local disk for everything temporary, tried before it is used, removed in the end.

    Errors: GateError when no disk has room; UsageError when programs cannot be started on it.
    """
    named = os.environ.get("APPTAINER_TMPDIR")
    folders = [named] if named else [*site.local_disk, tempfile.gettempdir()]
    disk = choose_folder(folders, SCRATCH_BYTES[stack.cuda is not None], environ=os.environ)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=disk.folder))
    try:
        probe = scratch / "probe"
        write_text(probe, "#!/bin/sh\nexit 0\n", mode=0o700)
        try:
            subprocess.run([str(probe)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            hint = "set APPTAINER_TMPDIR to a folder on a disk that is mounted with exec"
            raise UsageError(
                f"no program can be started in {disk.folder}, so nothing can be built there", code="tmpdir", hint=hint
            ) from error
        yield scratch
    finally:
        remove_tree(scratch)


def _is_whole(command: str, image: Path, wanted: str) -> bool:
    try:
        return labels(command, image).get("ftlaunch.identity") == wanted
    except FtlaunchError:
        return False


def _log_file(image: Path) -> Path:
    return image.parent / "logs" / f"{image.stem}.log"


def _mtime(image: Path) -> int | None:
    try:
        return image.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _base_sha256(stack: Stack) -> str | None:
    if stack.base.kind != "localimage":
        return None
    if not (path := Path(stack.base.path)).is_file():
        raise UsageError(f"the base image {path} is not there", code="missing-file", key="base.path")
    return hash_file(path)
