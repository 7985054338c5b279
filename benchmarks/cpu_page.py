"""Writes docs/benchmarks/cpu.md, contests against a plain Trainer and tables on this machine's CPU: python -m benchmarks.cpu_page

``--folder`` keeps what was measured. On two shared cores it takes from 20 minutes to an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from launcher.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "cpu.md"

TINY = "presets/bench/tiny.yaml"
AGAINST = ("--against", "trainer")

BENCHES = {
    "bench-tiny": (TINY, "--sequence-length", "1024", "--warm-up", "1", "--steps", "4", *AGAINST),
    "bench-tiny-micro-batch-2": (
        *(TINY, "--sequence-length", "1024", "--micro-batch", "2"),
        *("--set", "name=bench-tiny-micro-batch-2", "--warm-up", "1", "--steps", "4", *AGAINST),
    ),
    "bench-tiny-4096": (
        *(TINY, "--sequence-length", "4096", "--set", "training.effective_batch=4"),
        *("--set", "name=bench-tiny-4096", "--warm-up", "1", "--steps", "2", *AGAINST),
    ),
    "bench-starcoder2-100m": (
        *("presets/bench/starcoder2-100m.yaml", "--sequence-length", "1024", "--warm-up", "1", "--steps", "2", *AGAINST),
    ),
    "bench-tiny-configurations": (
        *(TINY, "--sequence-length", "1024", "--attention", "eager,sdpa", "--checkpointing", "none,full", "--adapter", "none,lora"),
        *("--micro-batch", "1,4", "--set", "name=bench-tiny-configurations", "--warm-up", "1", "--steps", "2"),
    ),
    "bench-tiny-lengths": (
        *(TINY, "--sequence-length", "1024,2048,4096", "--attention", "eager,sdpa", "--checkpointing", "none", "--adapter", "none"),
        *("--micro-batch", "1", "--set", "name=bench-tiny-lengths", "--warm-up", "1", "--steps", "2"),
    ),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "cpu", help="where measurements are kept")
    parser.add_argument("--only", default="", help="measure what contains this in its name, take the others from the folder")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, take all from the folder")
    chosen = parser.parse_args(arguments)
    for name, words in BENCHES.items():
        if chosen.only in name and not chosen.page_only:
            command = ["bench", *words, "--site", "local", "--out", str(chosen.folder / name)]
            subprocess.run([sys.executable, "-m", "launcher.cli", *command], cwd=ROOT, check=True)
    pages = [chosen.folder / name / ("against" if "--against" in words else "bench") for name, words in BENCHES.items()]
    parts = [_HEAD, *(_demoted(page.with_suffix(".md").read_text(encoding="utf-8")) for page in pages if page.with_suffix(".md").exists())]
    write_text(PAGE, "\n\n".join(part.rstrip("\n") for part in parts) + "\n", mode=0o644)
    found = [page.with_suffix(".json") for page in pages if page.with_suffix(".json").exists()]
    results = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in found}
    write_text(PAGE.with_suffix(".json"), json.dumps(results, indent=2) + "\n", mode=0o644)
    print(PAGE)
    return 0


def _demoted(page: str) -> str:
    """With its headings one level lower."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in page.splitlines())


_HEAD = """# On CPU

Written by `python -m benchmarks.cpu_page` (`make bench-cpu`). The machine is shared with other work, so seconds say nothing beyond it;
the contenders take turns step by step, and their ratios are what is meant. One thread each, fp32."""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
