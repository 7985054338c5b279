"""All of the GPU tables, on the one NVIDIA GPU of this machine: python -m benchmarks.gpu_tables [--only NAME] [--folder DIR]

Runs the benches below one after the other and copies their tables to docs/benchmarks. A bench that was stopped goes on where it was.
NEVER RUN YET: no GPU was at hand when it was written; nothing it would say is known.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.observe import has_nvidia

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "benchmarks"

LENGTHS = "1024,2048,4096"
KERNELS = "sdpa,sdpa:flash,sdpa:efficient,sdpa:math,eager,flex,xformers,flash2"
"""torch's own choice, its backends by name, and the others; what the stack lacks is a row that says so."""


@dataclass(frozen=True)
class Bench:
    name: str
    """Of its page: docs/benchmarks/<name>-<gpu>.md."""
    arguments: tuple[str, ...]
    """After ``ftlaunch bench``."""
    table: str = "bench"


def _of(preset: str, *more: str) -> tuple[str, ...]:
    return (f"presets/bench/{preset}.yaml", *more)


BENCHES = [
    bench
    for preset in ("santacoder", "starcoder2-3b", "starcoder2-7b")
    for bench in (
        Bench(f"{preset}-configurations", _of(preset, "--attention", "sdpa", "--adapter", "none", "--sequence-length", LENGTHS)),
        Bench(f"{preset}-attention", _of(preset, "--attention", KERNELS, "--adapter", "none", "--sequence-length", LENGTHS)),
        Bench(f"{preset}-adapters", _of(preset, "--attention", "sdpa", "--adapter", "none,lora,qlora", "--sequence-length", "1024,2048")),
        Bench(
            f"{preset}-against",
            _of(preset, "--against", "trainer", "--set", "data.packing=flatten", "--sequence-length", LENGTHS, "--micro-batch", "4"),
            "against",
        ),
    )
]
"""Configurations: the checkpointing and MFU tables. The contest has pads to leave out, so its samples are not concatenated."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="benches whose name contains this")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench", help="where measurements are kept")
    parser.add_argument("--print-only", action="store_true", help="print the commands")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder.resolve()
    benches = [bench for bench in BENCHES if chosen.only in bench.name]
    commands = {bench.name: ["bench", *bench.arguments, "--site", "local", "--out", str(folder / bench.name)] for bench in benches}
    if chosen.print_only:
        for command in commands.values():
            print("ftlaunch", *command)
        return 0
    if not has_nvidia():
        print("gpu_tables needs an NVIDIA GPU and its driver: this machine has none", file=sys.stderr)
        return 4
    failed = 0
    for bench in benches:
        failed += subprocess.run([sys.executable, "-m", "launcher.cli", *commands[bench.name]], cwd=ROOT).returncode != 0
        page = folder / bench.name / bench.table
        if page.with_suffix(".json").exists():
            gpu = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["gpu"]
            for made in page.parent.glob(f"{bench.table}.*"):
                shutil.copyfile(made, PAGES / f"{bench.name}-{gpu}{made.suffix}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
