"""Samples: documents tokenised, cut or concatenated, written as an Arrow data set of ``input_ids`` and ``num_targets``.

Pure but for the writing. Runs in the staging process (Python 3.9; pyarrow and datasets).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HISTOGRAM_BIN_TOKENS = 16
WRITE_BATCH = 1000


@dataclass
class Tally:
    """What became of the documents of one split, counted while they pass."""

    documents: int = 0
    tokens: int = 0
    """Before anything was cut or dropped, EOS included."""
    cut_tokens: int = 0
    """Beyond the sequence length (packing none and flatten)."""
    remainder_tokens: int = 0
    """After the last whole block (packing concatenate)."""
    short_samples: int = 0
    """Dropped, because a sample needs two tokens to have a target."""
    samples: int = 0
    targets: int = 0
    length_histogram: list[int] = field(default_factory=list)
    """Number k: samples of 16·k + 1 … 16·k + 16 tokens."""


def cut(documents: Iterable[list[int]], sequence_length: int, eos: int | None, tally: Tally) -> Iterator[list[int]]:
    """One sample a document: its tokens and EOS, cut at the sequence length (so EOS is there if everything is)."""
    for tokens in documents:
        sample = tokens if eos is None else [*tokens, eos]
        tally.documents += 1
        tally.tokens += len(sample)
        tally.cut_tokens += max(0, len(sample) - sequence_length)
        if len(sample) < 2:
            tally.short_samples += 1
        else:
            yield sample[:sequence_length]


def concatenate(documents: Iterable[list[int]], sequence_length: int, eos: int, tally: Tally) -> Iterator[list[int]]:
    """Blocks of exactly the sequence length out of all documents, each followed by EOS; the last, incomplete block is dropped."""
    kept: list[int] = []
    for tokens in documents:
        tally.documents += 1
        tally.tokens += len(tokens) + 1
        kept = [*kept, *tokens, eos]
        whole = len(kept) - len(kept) % sequence_length
        for start in range(0, whole, sequence_length):
            yield kept[start : start + sequence_length]
        kept = kept[whole:]
    tally.remainder_tokens = len(kept)


def write_samples(samples: Iterable[list[int]], folder: Path, scratch: Path, tally: Tally, each: Callable[[], None]) -> None:
    """Write a data set that ``datasets.load_from_disk`` reads; ``each`` is called after every batch."""
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("num_targets", pa.int32())])
    stream = scratch / f"{folder.name}-samples.arrow"

    def batch_of(rows: list[list[int]]) -> pa.RecordBatch:
        arrays = [pa.array(rows, type=schema.field(0).type), pa.array([len(row) - 1 for row in rows], type=pa.int32())]
        return pa.record_batch(arrays, schema=schema)

    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows: list[list[int]] = []
        for sample in samples:
            _count(sample, tally)
            rows.append(sample)
            if len(rows) == WRITE_BATCH:
                writer.write_batch(batch_of(rows))
                rows = []
                each()
        writer.write_batch(batch_of(rows))
    Dataset.from_file(str(stream)).save_to_disk(str(folder))
    stream.unlink()


def _count(sample: list[int], tally: Tally) -> None:
    tally.samples += 1
    tally.targets += len(sample) - 1
    index = (len(sample) - 1) // HISTOGRAM_BIN_TOKENS
    tally.length_histogram += [0] * (index + 1 - len(tally.length_histogram))
    tally.length_histogram[index] += 1
