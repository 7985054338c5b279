"""A rank that trains nothing: counts steps, writes metrics and checkpoints, obeys a stop. Tests put it in the place of ``launcher.train``.

``toy.json`` in the run folder says how it behaves: ``steps``, ``more`` (steps that a life after the first does instead), ``step_s``,
``every`` (steps between checkpoints), ``shows`` (files that it reads into what it leaves of its environment) and ``faults``, a list of
``{"rank", "step", "what": exit code or "kill" or "hang", "lives": [...]}``; step 0 is before the handlers.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from launcher import checkpoint, metrics
from launcher.errors import EXIT_DO_NOT_RETRY
from launcher.run import ExitRecord, Run, may_commit, now, write_exit_record


def main() -> None:
    run, life, rank = Run(Path(sys.argv[1])), int(os.environ["FTLAUNCH_LIFE"]), int(os.environ["RANK"])
    toy = json.loads((run.root / "toy.json").read_text())
    faults = [fault for fault in toy.get("faults", []) if fault["rank"] == rank and life in fault.get("lives", [life])]
    meet(faults, 0, run, life, rank)
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: asked.append(number))
    shown = {name: Path(name).read_text() for name in toy.get("shows", [])}
    (run.life(life) / f"environment-{rank}.json").write_text(json.dumps({**os.environ, **shown}))
    plan, done = run.plan(life), [manifest for manifest in checkpoint.committed(run) if manifest.life < life]
    step = done[-1].step if done else 0
    end = step + toy["more"] if life and "more" in toy else toy["steps"]
    while step < end:
        if asked:
            save(run, life, rank, step, "stop", plan.world_size)
            leave(run, life, rank, step, 85, "stopped")
        if rank == 0 and not may_commit(run, life):
            leave(run, life, rank, step, EXIT_DO_NOT_RETRY, "a newer life owns the run")
        time.sleep(toy["step_s"])
        step += 1
        if rank == 0:
            metrics.append(run.metrics_file, "train", step=step, loss=1 / step, life=life)
        if step % toy.get("every", 1000) == 0:
            save(run, life, rank, step, "steps", plan.world_size)
        meet(faults, step, run, life, rank)
    save(run, life, rank, step, "end", plan.world_size)
    leave(run, life, rank, step, 0, "finished")


def meet(faults: list[dict], step: int, run: Run, life: int, rank: int) -> None:
    for fault in faults:
        if fault["step"] == step:
            if fault["what"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault["what"] == "hang":
                time.sleep(600)
            leave(run, life, rank, step, fault["what"], f"a fault at step {step}")


def save(run: Run, life: int, rank: int, step: int, reason: checkpoint.Reason, world_size: int) -> None:
    if rank == 0 and not run.checkpoint(step).exists() and step:
        stage = checkpoint.stage_folder(run, step, life)
        stage.mkdir(parents=True)
        (stage / "weights").write_text(f"weights of step {step}\n")
        checkpoint.commit(run, step, life, reason, None, world_size)


def leave(run: Run, life: int, rank: int, step: int, code: int, reason: str) -> None:
    write_exit_record(run, life, ExitRecord(rank, code, step, reason, socket.gethostname(), now()))
    sys.stdout.flush()
    os._exit(code)


main()
