"""How long a user waits for ``--help`` and ``check``: ``python -m benchmarks.startup [--rounds N]``. No test: it measures a clock.

Each command starts a fresh process; the commands take turns, so that a busy machine slows all of them alike, and the median of the
rounds counts. The first round only warms the file cache. Exits with 1 when a median is above its budget or torch was loaded.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.preset.reading import shipped_presets

HELP_BUDGET_S = 0.35
CHECK_BUDGET_S = 0.8

FTLAUNCH = [str(Path(sys.executable).with_name("ftlaunch"))]
PLAIN = "python -c pass"


def commands() -> dict[str, tuple[list[str], float | None]]:
    """Name → command and the seconds it may take."""
    found: dict[str, tuple[list[str], float | None]] = {
        PLAIN: ([sys.executable, "-c", "pass"], None),
        "ftlaunch --help": ([*FTLAUNCH, "--help"], HELP_BUDGET_S),
    }
    for name in shipped_presets():
        found[f"ftlaunch check {name}"] = ([*FTLAUNCH, "check", name], CHECK_BUDGET_S)
    return found


def seconds(command: list[str], environ: dict[str, str]) -> float:
    """Wall time of one start. A gate may refuse a preset on the local site, so 3 is as good an end as 0."""
    before = time.perf_counter()
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    passed = time.perf_counter() - before
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return passed


def heavy_imports(command: list[str], environ: dict[str, str]) -> set[str]:
    """What is loaded of that which only the training needs."""
    done = subprocess.run(
        command, env={**environ, "PYTHONPROFILEIMPORTTIME": "1"}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    loaded = set(re.findall(r"^import time:.*\|\s*([A-Za-z0-9_]+)", done.stderr, re.M))
    assert "launcher" in loaded or command[0] == sys.executable, "nothing was traced"
    return loaded & {"torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "submitit"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    failed = False
    with tempfile.TemporaryDirectory() as home:
        # An empty home and no site: what is measured is what ships.
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("FTLAUNCH_", "SBATCH_"))} | {"HOME": home}
        taken: dict[str, list[float]] = {name: [] for name in commands()}
        for number in range(rounds + 1):
            for name, (command, _) in commands().items():
                passed = seconds(command, environ)
                if number:
                    taken[name].append(passed)
        bare = statistics.median(taken[PLAIN])
        print(f"medians of {rounds} starts, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
        print(f"{'seconds':>7}  {'fastest':>7}  {'× bare':>6}  {'budget':>6}  command")
        for name, (command, budget) in commands().items():
            median, heavy = statistics.median(taken[name]), heavy_imports(command, environ)
            above = budget is not None and median > budget
            failed = failed or above or bool(heavy)
            remark = "  above its budget" if above else ""
            remark += f"  loads {', '.join(sorted(heavy))}" if heavy else ""
            print(f"{median:7.3f}  {min(taken[name]):7.3f}  {median / bare:6.1f}  {budget or '':>6}  {name}{remark}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
