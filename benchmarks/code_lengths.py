"""Writes launcher/bench/code_lengths.json, how long files of code are: python -m benchmarks.code_lengths

Every Python file of the standard library of this interpreter (without tests and what was installed, as staging takes ``stdlib``),
tokenised by a byte-level BPE of 49 152 entries that is trained on these same files, StarCoder's number, for want of its tokenizer.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

from launcher.files import write_text
from launcher.stage.random_start import train_tokenizer
from launcher.stage.sources import find_stdlib

FILE = Path(__file__).parents[1] / "launcher" / "bench" / "code_lengths.json"
VOCABULARY = 49152
BIN_TOKENS = 16
LONGEST = 16384
"""Longer files count as this long: no sequence length here comes near."""


def main() -> None:
    local = find_stdlib()
    read = (Path(local.root, name).read_text(encoding="utf-8", errors="replace") for name in sorted(local.files))
    texts = [text for text in read if text.strip()]
    tokenizer = train_tokenizer(_batches(texts), VOCABULARY)
    counts = [0] * (LONGEST // BIN_TOKENS)
    characters = tokens = 0
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer(batch, verbose=False)["input_ids"]):
            length = len(ids) + 1  # EOS
            counts[(min(length, LONGEST) - 1) // BIN_TOKENS] += 1
            characters, tokens = characters + len(text), tokens + length
    sha = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    what = f"files of Python {platform.python_version()}'s standard library, {len(texts)} of them, content {sha}"
    how = f"byte-level BPE of {VOCABULARY} entries trained on the same files, EOS counted; {characters / tokens:.2f} characters a token"
    rows = [", ".join(map(str, counts[start : start + 32])) for start in range(0, len(counts), 32)]
    body = ",\n    ".join(rows)
    text = f'{{\n  "what": "{what}",\n  "how": "{how}",\n  "made_by": "python -m benchmarks.code_lengths",\n'
    write_text(FILE, f'{text}  "bin_tokens": {BIN_TOKENS},\n  "counts": [\n    {body}\n  ]\n}}\n', mode=0o644)
    for length in (128, 512, 1024, 2048, 4096):
        useful = sum(count * min(length, BIN_TOKENS * index + (BIN_TOKENS + 1) / 2) for index, count in enumerate(counts))
        print(f"padded to {length}: {useful / (length * sum(counts)):.3f} useful")
    print(f"{len(texts)} files, {characters / tokens:.2f} characters a token: {FILE}")


def _batches(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), 256):
        yield texts[start : start + 256]


if __name__ == "__main__":
    main()
