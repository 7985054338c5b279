"""What a node says of itself, as one JSON file: ``python -m launcher.site.node_report FOLDER``. Standard library only; it runs in a job.

FOLDER has ``questions.json``; the answer goes to ``report.json`` beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import FtlaunchError
from launcher.files import write_json
from launcher.image.disk import space_of
from launcher.image.unpack import mounts_by_kernel
from launcher.slurm.tools import NO_ANSWER, NO_PROGRAM, call, clean_environment

PATIENCE_S = 15.0


@dataclass(frozen=True)
class Tried:
    """Whether something works from this node."""

    works: bool | None
    """None: it was not tried."""
    why: str = ""
    """Why it does not work, or was not tried."""


def report(questions: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """All facts of this node. ``questions``: folders, local_disk, container, sbatch, script, home, index."""
    gpus, cuda = nvidia()
    return {
        "node": environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "host": socket.gethostname(),
        "partition": environ.get("SLURM_JOB_PARTITION"),
        "python": {"executable": sys.executable, "version": sys.version.split()[0]},
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "driver": gpus[0]["driver"] if gpus else kernel_driver(),
        "cuda": cuda,
        "visible_devices": environ.get("CUDA_VISIBLE_DEVICES"),
        "home": folder_facts(questions["home"]),
        "folders": {name: folder_facts(path) for name, path in questions["folders"].items()},
        "local_disk": [disk_facts(written, environ) for written in questions["local_disk"]],
        "network": {"index": asdict(index_reachable(sys.executable, questions.get("index"))), "hub": asdict(hub_reachable(environ))},
        "user_namespaces": namespaces(),
        "fuse": os.access("/dev/fuse", os.R_OK | os.W_OK),
        "container": container_facts(questions["container"]),
        "interfaces": interfaces(),
        "sbatch": asdict(submits(questions.get("sbatch"), questions.get("script"), environ)),
    }


def nvidia() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that are visible here with name, memory and driver, and the CUDA version that the driver announces."""
    asked = _said(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"])
    gpus = []
    for line in (asked or "").splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 3 and words[1].isdigit():
            gpus.append({"name": words[0], "memory_mib": int(words[1]), "driver": words[2]})
    announced = re.search(r"CUDA Version: (\d+\.\d+)", _said(["nvidia-smi"]) or "") if gpus else None
    return gpus, announced[1] if announced else None


def kernel_driver(file: str = "/proc/driver/nvidia/version") -> str | None:
    """The NVIDIA driver's version as the kernel has it; None without one."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", Path(file).read_text())
    except OSError:
        return None
    return found[1] if found else None


def folder_facts(path: str) -> dict[str, Any]:
    """Whether a folder, or the nearest one above it, can be seen and written here; and how much is free."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    facts: dict[str, Any] = {"path": path, "visible": Path(path).is_dir(), "nearest": str(place), "writable": False, "free_bytes": None}
    try:
        with tempfile.TemporaryFile(dir=place):
            facts["writable"] = True
    except OSError:
        pass
    try:
        state = os.statvfs(place)
        facts["free_bytes"] = state.f_bavail * state.f_frsize
    except OSError:
        pass
    return facts


def disk_facts(written: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """A folder of the site's ``local_disk`` on this node; ``why`` says why it cannot be used."""
    unset = [name for name in re.findall(r"\$\{?(\w+)\}?", written) if not environ.get(name)]
    if unset:
        return {"written": written, "path": None, "why": "is not set"}
    expanded = re.sub(r"\$\{?(\w+)\}?", lambda match: environ[match[1]], written)
    facts: dict[str, Any] = {"written": written, "path": expanded, "why": None}
    if not os.path.isdir(expanded):
        return {**facts, "why": "is not there"}
    if not os.access(expanded, os.W_OK | os.X_OK):
        return {**facts, "why": "is not writable"}
    try:
        space = space_of(Path(expanded))
    except OSError as error:
        return {**facts, "why": error.strerror or "cannot be looked at"}
    return {**facts, "free_bytes": space.free_bytes, "free_files": space.free_files, "ram_backed": space.ram_backed}


def index_reachable(python: str, index: str | None = None) -> Tried:
    """Whether pip's package index answers. ``index``: in the place of the one that pip is configured with."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "index", "versions", "pip", "--timeout", "5", "--retries", "0"]
    answer = call([*command, *(["--index-url", index] if index else [])], timeout_s=PATIENCE_S)
    if answer.code == 0:
        return Tried(True)
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return Tried(False, _without_password(lines[-1])[:300] if lines else f"pip ended with {answer.code}")


def hub_reachable(environ: Mapping[str, str]) -> Tried:
    """Whether the hub of models and data answers."""
    address = environ.get("HF_ENDPOINT")
    if not address:
        try:
            from huggingface_hub import constants
        except ImportError:
            return Tried(None, "HF_ENDPOINT is not set and huggingface_hub is not installed")
        address = constants.ENDPOINT
    if not re.match(r"https?://", str(address)):
        return Tried(None, "HF_ENDPOINT is no address")
    try:
        urllib.request.urlopen(urllib.request.Request(str(address), method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return Tried(True)
    except (OSError, ValueError) as error:
        return Tried(False, str(getattr(error, "reason", error))[:300])
    return Tried(True)


def namespaces() -> bool | None:
    """Whether a user namespace can be made; None when that cannot be tried."""
    answer = call(["unshare", "--user", "--map-root-user", "true"], timeout_s=PATIENCE_S)
    return None if answer.code in (NO_ANSWER, NO_PROGRAM) else answer.code == 0


def container_facts(command: str | None) -> dict[str, Any] | None:
    """None where the site uses no container."""
    if command is None:
        return None
    path = shutil.which(command)
    if path is None:
        return {"path": None, "version": None, "setuid": None}
    version = re.search(r"\d+\.\d+\S*", _said([path, "--version"]) or "")
    try:
        setuid: bool | None = mounts_by_kernel(path)
    except (FtlaunchError, OSError):
        setuid = None
    return {"path": path, "version": version[0] if version else None, "setuid": setuid}


def interfaces(folder: str = "/sys/class/net") -> list[dict[str, str]]:
    """Network interfaces that are up, without the loopback; ``kind`` is ib for InfiniBand, else ether."""
    found = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    for name in names:
        state, kind = _word(f"{folder}/{name}/operstate"), _word(f"{folder}/{name}/type")
        if kind != "772" and state in ("up", "unknown"):
            found.append({"name": name, "kind": "ib" if kind == "32" else "ether"})
    return found


def submits(sbatch: str | None, script: str | None, environ: Mapping[str, str]) -> Tried:
    """Whether a job like this one may be submitted from here. Submits nothing."""
    if sbatch is None or script is None:
        return Tried(None)
    answer = call([sbatch, "--test-only", script], environ=clean_environment(environ), timeout_s=PATIENCE_S)
    return Tried(True) if answer.code == 0 else Tried(False, answer.reason[:300])


def _word(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def _said(command: Sequence[str]) -> str | None:
    answer = call(command, timeout_s=PATIENCE_S)
    return answer.stdout if answer.code == 0 else None


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def main(folder: str) -> int:
    questions = json.loads(Path(folder, "questions.json").read_text(encoding="utf-8"))
    write_json(Path(folder, "report.json"), report(questions, os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
