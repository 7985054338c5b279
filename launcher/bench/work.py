"""Processes of a bench: each cell in its own, in the image where the site has one, so that a crash is a row and not the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.bench.cell import READY
from launcher.errors import ActionError, MissingError
from launcher.files import write_json
from launcher.image.enter import bind, clean_environment, enter
from launcher.node import free_port
from launcher.plan import Container, Plan
from launcher.ranks import scrubbed
from launcher.shipped import PACKAGE

IN_IMAGE = "/opt/ftlaunch"
"""Where the package is bound in the container."""

CELL_S = 1800.0
"""A cell that takes longer hangs: it is ended and its row says so."""

POLL_S = 0.05

Module = Literal["material", "measure", "rival"]


@dataclass(frozen=True)
class Workshop:
    """How a bench's processes are started, and the folder they share."""

    folder: Path
    container: Container
    python: str
    """The interpreter, when there is no container."""
    environ: Mapping[str, str]
    sees: tuple[Path, ...] = ()
    """Other folders that the processes need: the model's."""

    def run(self, module: Module, name: str, request: Mapping[str, Any], *, ranks: int = 1, gpus: int = 0) -> dict[str, Any]:
        """Run ``launcher.bench.<module>`` to its end and give its result: ``outcome`` and ``reason`` are always among it."""
        port = free_port()
        return wait([self.start(module, name, request, rank=rank, ranks=ranks, gpus=gpus, port=port) for rank in range(ranks)])

    def start(
        self, module: Module, name: str, request: Mapping[str, Any], *, rank: int = 0, ranks: int = 1, gpus: int = 0, port: int = 0
    ) -> Worker:
        """Where the request asks for ``turns``, the process takes them over its pipes.

        Errors: MissingError where the interpreter or the container's command cannot be started.
        """
        place = self.folder / "cells" / name
        place.mkdir(parents=True, exist_ok=True)
        result = place / "result.json"
        if rank == 0:
            result.unlink(missing_ok=True)
            write_json(place / "request.json", {**request, "result": str(result)})
        values = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        argv, environ = self._command(["-m", f"launcher.bench.{module}", str(place / "request.json")], values, gpus=gpus)
        log = place / f"rank-{rank}.log"
        try:
            with open(log, "wb") as words:
                answers = subprocess.PIPE if request.get("turns") else words
                process = subprocess.Popen(
                    argv, env=environ, cwd=self.folder, stdin=subprocess.PIPE, stdout=answers, stderr=words, start_new_session=True
                )
        except OSError as error:
            raise MissingError(f"{argv[0]} cannot be started: {error.strerror}", code="no-interpreter") from error
        return Worker(process, result, log)

    def _command(self, arguments: Sequence[str], ranks: Mapping[str, str], *, gpus: int) -> tuple[list[str], dict[str, str]]:
        cache = self.folder / "cache"
        own = {
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HOME": str(cache / "huggingface"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCH_EXTENSIONS_DIR": str(cache / "torch_extensions"),
            "XDG_CACHE_HOME": str(cache / "xdg"),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            **({"ACCELERATE_USE_CPU": "true"} if gpus == 0 else {}),
        }
        if self.container.use == "none":
            code = self.folder / "code"  # a folder with this package only: the site-packages around it may belong to another environment
            code.mkdir(exist_ok=True)
            if not (code / "launcher").is_symlink():
                (code / "launcher").symlink_to(PACKAGE)
            return [self.python, *arguments], {**scrubbed(self.environ), **own, **ranks, "PYTHONPATH": str(code)}
        assert self.container.image is not None, "apptainer needs an image"
        binds = [bind(str(self.folder)), bind(str(PACKAGE), f"{IN_IMAGE}/launcher", read_only=True)]
        binds += [bind(str(path)) for path in self.sees]
        inside = {**own, "PYTHONPATH": IN_IMAGE}
        argv = enter(
            self.container, self.container.image, ["python3", *arguments], binds=binds, env=inside, gpus=gpus > 0, cwd=str(self.folder)
        )
        slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")  # of the job's only task; the ranks' own are given
        return argv, {**{name: value for name, value in clean_environment(self.environ).items() if name not in slurm}, **ranks}


@dataclass(frozen=True)
class Worker:
    """A started process. Where contenders take turns it says when it is ready, and waits for ``go``."""

    process: subprocess.Popen[bytes]
    result: Path
    log: Path

    def ready(self) -> bool:
        """Wait until it wants its next turn; False when it has ended instead."""
        assert self.process.stdout is not None
        return any(line.strip() == READY.encode() for line in self.process.stdout)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """With everything it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def wait(workers: Sequence[Worker], *, limit_s: float = CELL_S, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Wait for all; when one fails or time is up the others are ended. Gives rank 0's result, or what the logs say."""
    until = clock() + limit_s
    codes: list[int | None] = []
    try:
        while True:
            codes = [worker.process.poll() for worker in workers]
            if all(code is not None for code in codes) or any(code not in (None, 0) for code in codes) or clock() > until:
                break
            time.sleep(POLL_S)
    finally:
        for worker in workers:
            worker.end()
    return _result(workers[0].result, codes, workers, limit_s)


def _result(file: Path, codes: Sequence[int | None], workers: Sequence[Worker], limit_s: float) -> dict[str, Any]:
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found
    bad = next((rank for rank, code in enumerate(codes) if code not in (None, 0)), None)
    if bad is None:
        return {"outcome": "failed", "reason": f"no result within {limit_s / 60:.0f} minutes"}
    code = codes[bad]
    if code in (-9, 137):
        return {"outcome": "out of memory", "reason": "killed by signal 9, as the kernel does when RAM runs out"}
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return {"outcome": "failed", "reason": f"{how}: {last_line(workers[bad].log)}"}


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no word in its log"


def require_material(result: Mapping[str, Any], log: Path) -> None:
    """Errors: ActionError when the material of a bench could not be made."""
    if result["outcome"] != "measured":
        raise ActionError(f"model and data of the bench: {result['reason']}", code="bench-material", file=str(log))


def planned_for(plan: Plan, request: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The request of ``measure``: the plan lies beside it."""
    from launcher.plan import write_plan

    place.mkdir(parents=True, exist_ok=True)
    write_plan(plan, place / "plan.json")
    return {**request, "plan": str(place / "plan.json")}
