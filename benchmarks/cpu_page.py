"""Writes docs/benchmarks/cpu.md, the contest against a plain Trainer on this machine's CPU: python -m benchmarks.cpu_page

Two models, four contests; ``--folder`` keeps what was measured. On two shared cores it takes from 10 minutes to an hour.
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

CONTESTS = {
    "bench-tiny": ("presets/bench/tiny.yaml", "--sequence-length", "1024", "--warm-up", "1", "--steps", "4"),
    "bench-tiny-micro-batch-2": (
        *("presets/bench/tiny.yaml", "--sequence-length", "1024", "--micro-batch", "2"),
        *("--set", "name=bench-tiny-micro-batch-2", "--warm-up", "1", "--steps", "4"),
    ),
    "bench-tiny-4096": (
        *("presets/bench/tiny.yaml", "--sequence-length", "4096", "--set", "training.effective_batch=4"),
        *("--set", "name=bench-tiny-4096", "--warm-up", "1", "--steps", "2"),
    ),
    "bench-starcoder2-100m": ("presets/bench/starcoder2-100m.yaml", "--sequence-length", "1024", "--warm-up", "1", "--steps", "2"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "cpu", help="where measurements are kept")
    parser.add_argument("--only", default="", help="measure what contains this in its name, take the others from the folder")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, take all from the folder")
    chosen = parser.parse_args(arguments)
    for name, words in CONTESTS.items():
        if chosen.only in name and not chosen.page_only:
            command = ["bench", *words, "--against", "trainer", "--site", "local", "--out", str(chosen.folder / name)]
            subprocess.run([sys.executable, "-m", "launcher.cli", *command], cwd=ROOT, check=True)
    pages = [chosen.folder / name / "against" for name in CONTESTS]
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
the contenders take turns step by step, and their ratios are what is meant. One thread each, fp32.

Micro batch 1 is what the presets use, because on CPU it is ours' best: with several documents in a row, `flatten` gives sdpa a mask of the
whole row, so that no kernel skips what one document hides from another. The second section shows what that costs."""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
