"""One life of one rank: from the run folder to an exit code and an exit record. Knows nothing of how training is done."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launcher.errors import EXIT_DO_NOT_RETRY, EXIT_STOPPED, FtlaunchError, UsageError
from launcher.plan import Plan
from launcher.run import ExitRecord, Run, now, write_exit_record
from launcher.train.place import Place, find_place, nvidia_driver, prepare_environment
from launcher.train.rendezvous import Meeting, meet
from launcher.train.stop import Stop
from launcher.train.supported import require_supported

LOG = logging.getLogger("launcher.train")


@dataclass
class Progress:
    """How far this rank came, for its exit record."""

    step: int = 0


def live(arguments: Sequence[str], stop: Stop) -> NoReturn:
    """Train the run folder named by the only argument, leave an exit record, and end the process.

    It ends at once, without the clean-up of the communication libraries: that can wait for ranks that are gone, and gloo's in
    torch 2.3 hangs after a stop (seen).
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    if len(arguments) != 1:
        LOG.error("usage: python -m launcher.train RUN_FOLDER")
        _leave(EXIT_DO_NOT_RETRY)
    run, life, progress = Run(Path(arguments[0])), int(os.environ.get("FTLAUNCH_LIFE", "0")), Progress()
    rank = 0
    try:
        place = find_place(os.environ)
        rank = place.rank
        code = _train(run, life, place, stop, progress)
        reason = "stopped" if code == EXIT_STOPPED else "finished"
    except BaseException as error:
        code = EXIT_DO_NOT_RETRY if _is_permanent(error) else 1
        reason = str(error).split("\n")[0] if isinstance(error, FtlaunchError) else f"{type(error).__name__}: {error}".split("\n")[0]
        LOG.error("rank %d: %s", rank, reason, exc_info=not isinstance(error, FtlaunchError))
    run.life(life).mkdir(parents=True, exist_ok=True)
    write_exit_record(run, life, ExitRecord(rank, code, progress.step, reason, socket.gethostname(), now()))
    _leave(code)


def _train(run: Run, life: int, place: Place, stop: Stop, progress: Progress) -> int:
    plan = _read_plan(run, life)
    if place.world_size != plan.world_size:
        raise UsageError(
            f"{place.world_size} ranks were started, the plan has {plan.world_size}", code="world-size", file=str(run.plan_file(life))
        )
    staged = require_supported(plan)
    prepare_environment(os.environ, plan, place)
    driver = nvidia_driver()
    if driver is not None and place.rank == 0 and plan.layout.gpus_per_node:
        run.append_event("driver", life=life, driver=driver)  # where the site does not say it, later plans know it from here
    if plan.layout.nodes > 1:
        _meet(run, life, plan, place)

    from launcher.train.loop import train
    from launcher.train.ranks import connect

    return train(run, life, plan, staged, connect(plan, place), stop, progress)


def _meet(run: Run, life: int, plan: Plan, place: Place) -> None:
    """Prove that the nodes reach each other. Errors: UsageError; ConnectionError where an earlier life trained: other nodes may do."""
    number, local = divmod(place.rank, plan.layout.ranks_per_node)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if local or address is None or port is None:  # said by connect
        return
    started = [event for event in run.events("started") if event["life"] == life]
    names = started[-1]["nodes"] if started else [address, *map(str, range(1, plan.layout.nodes))]
    network = plan.site["network"]
    site, within_s = str(plan.site["name"]), float(network["rendezvous_s"])
    try:
        meet(Meeting(address, int(port), names, site, network["ifname"], network["host_suffix"], within_s), number)
    except UsageError as error:
        if run.metrics_file.exists():
            raise ConnectionError(str(error)) from error
        raise


def _leave(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _read_plan(run: Run, life: int) -> Plan:
    try:
        return run.plan(life)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"not a plan that this code reads: {error}", code="bad-plan", file=str(run.plan_file(life))) from error


def _is_permanent(error: BaseException) -> bool:
    """Whether another life would meet the same: what a user must change, a missing package, too little memory."""
    if isinstance(error, (FtlaunchError, ImportError, MemoryError)):
        return True
    out_of_memory = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in out_of_memory)
