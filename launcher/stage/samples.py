"""Samples: documents cut, split, packed or concatenated, written as an Arrow data set that ``train.batches.Samples`` reads.

``input_ids`` and ``num_targets``; ``labels`` (−100 where a token is not learned) where a format masks; ``lengths`` of the documents of a
row where several share it with their borders kept. Pure but for the writing. Runs in the staging process (Python 3.9; pyarrow, datasets).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.stage.tokens import Tokens

HISTOGRAM_BIN_TOKENS = 16
WRITE_BATCH = 1000
NOT_LEARNED = -100
WINDOW_DOCUMENTS = 4096
WINDOW_TOKENS = 1 << 22
"""Documents that are packed with each other: the number that either of the two reaches first. It bounds memory, hardly the fill."""


@dataclass(frozen=True)
class Sample:
    """A row of the data set."""

    ids: list[int]
    learned: list[bool] | None = None
    """None: all are."""
    lengths: list[int] | None = None
    """Of its documents, whose first tokens are no targets; None: one document."""

    @property
    def num_targets(self) -> int:
        firsts = _firsts(self.lengths or [len(self.ids)])
        if self.learned is None:
            return len(self.ids) - len(firsts)
        return sum(self.learned) - sum(self.learned[first] for first in firsts)


@dataclass
class Tally:
    """What became of the documents of one split, counted while they pass."""

    documents: int = 0
    tokens: int = 0
    """Before anything was cut or dropped, EOS included."""
    cut_tokens: int = 0
    """Beyond the sequence length (packing none, flatten and documents)."""
    remainder_tokens: int = 0
    """After the last whole block (packing concatenate)."""
    short_samples: int = 0
    """Dropped, because they have no target: a single token, or a prompt that fills the whole sequence length."""
    samples: int = 0
    targets: int = 0
    kept_tokens: int = 0
    """In the samples."""
    length_histogram: list[int] = field(default_factory=list)
    """Number k: samples (the documents of packed rows) of 16·k + 1 … 16·k + 16 tokens."""


def cut(documents: Iterable[Tokens], sequence_length: int, tally: Tally, *, split: bool = False) -> Iterator[Sample]:
    """A document and what ends it, cut at the sequence length (so its end is there if everything is) or, to ``split``, cut into several."""
    for document in documents:
        ids, learned = _ended(document)
        tally.documents += 1
        tally.tokens += len(ids) + document.left_out
        tally.cut_tokens += document.left_out + (0 if split else max(0, len(ids) - sequence_length))
        for first, last in _bounds(len(ids), sequence_length) if split else [(0, sequence_length)]:
            sample = Sample(ids[first:last], None if learned is None else learned[first:last])
            if sample.num_targets:
                yield sample
            else:
                tally.short_samples += 1


def concatenate(documents: Iterable[Tokens], sequence_length: int, eos: int, tally: Tally) -> Iterator[Sample]:
    """Blocks of exactly the sequence length out of all documents, each followed by its end or EOS; an incomplete last one is dropped."""
    ids: list[int] = []
    learned: list[bool] = []
    for document in documents:
        end = eos if document.end is None else document.end
        tally.documents += 1
        tally.tokens += len(document.ids) + 1
        ids = [*ids, *document.ids, end]
        learned = [*learned, *(document.learned or [True] * len(document.ids)), True]
        whole = len(ids) - len(ids) % sequence_length
        for start in range(0, whole, sequence_length):
            of = learned[start : start + sequence_length]
            sample = Sample(ids[start : start + sequence_length], None if all(of) else of)
            if sample.num_targets:
                yield sample
            else:
                tally.short_samples += 1
        ids, learned = ids[whole:], learned[whole:]
    tally.remainder_tokens = len(ids)


def pack(samples: Iterable[Sample], sequence_length: int) -> Iterator[Sample]:
    """Rows of whole documents, best fit decreasing within a window: the longest first, each into the fullest row that has room for it.

    Nothing but the order and the lengths decides. Rows are in the order of their first documents, documents of a row in their own.
    """
    for window in _windows(samples):
        for row in _best_fit([len(sample.ids) for sample in window], sequence_length):
            members = [window[number] for number in row]
            learned = [flag for member in members for flag in member.learned or [True] * len(member.ids)]
            yield Sample(
                [token for member in members for token in member.ids],
                None if all(member.learned is None for member in members) else learned,
                [len(member.ids) for member in members],
            )


def write_samples(
    samples: Iterable[Sample],
    folder: Path,
    scratch: Path,
    tally: Tally,
    each: Callable[[], None],
    *,
    masked: bool = False,
    packed: bool = False,
) -> None:
    """Write a data set that ``datasets.load_from_disk`` reads; ``each`` is called after every batch.

    ``masked``: with labels. ``packed``: with the lengths of the documents of a row.
    """
    import pyarrow as pa
    from datasets import Dataset

    fields = [("input_ids", pa.list_(pa.int32())), ("num_targets", pa.int32())]
    fields += [("labels", pa.list_(pa.int32()))] if masked else []
    fields += [("lengths", pa.list_(pa.int32()))] if packed else []
    schema = pa.schema(fields)
    stream = scratch / f"{folder.name}-samples.arrow"

    def batch_of(rows: Sequence[Sample]) -> pa.RecordBatch:
        columns: dict[str, list[Any]] = {
            "input_ids": [row.ids for row in rows],
            "num_targets": [row.num_targets for row in rows],
            "labels": [_labels(row) for row in rows] if masked else [],
            "lengths": [row.lengths for row in rows],
        }
        return pa.record_batch([pa.array(columns[name], type=kind) for name, kind in fields], schema=schema)

    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows: list[Sample] = []
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


def _ended(document: Tokens) -> tuple[list[int], list[bool] | None]:
    if document.end is None:
        return document.ids, document.learned
    return [*document.ids, document.end], None if document.learned is None else [*document.learned, True]


def _bounds(size: int, length: int) -> list[tuple[int, int]]:
    """Pieces of ``length``; where a last one of a single token would be left, which could not be learned, it gets one from before."""
    bounds = list(range(0, size, length))
    if size % length == 1 and size > length > 2:
        bounds[-1] -= 1
    return list(zip(bounds, [*bounds[1:], size])) or [(0, 0)]


def _windows(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    window: list[Sample] = []
    tokens = 0
    for sample in samples:
        window.append(sample)
        tokens += len(sample.ids)
        if len(window) == WINDOW_DOCUMENTS or tokens >= WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    yield window


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the documents of each row."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []
    """(tokens left, row), sorted."""
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        at = bisect_left(spaces, (sizes[number], -1))
        space, row = spaces.pop(at) if at < len(spaces) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        if space > sizes[number]:
            insort(spaces, (space - sizes[number], row))
    return sorted(sorted(row) for row in rows)


def _firsts(lengths: Sequence[int]) -> list[int]:
    """Where each document begins."""
    starts, position = [], 0
    for length in lengths:
        if length:
            starts.append(position)
        position += length
    return starts


def _labels(sample: Sample) -> list[int]:
    if sample.learned is None:
        return sample.ids
    return [token if flag else NOT_LEARNED for token, flag in zip(sample.ids, sample.learned)]


def _count(sample: Sample, tally: Tally) -> None:
    tally.samples += 1
    tally.targets += sample.num_targets
    tally.kept_tokens += len(sample.ids)
    for length in sample.lengths or [len(sample.ids)]:
        index = (length - 1) // HISTOGRAM_BIN_TOKENS
        tally.length_histogram += [0] * (index + 1 - len(tally.length_histogram))
        tally.length_histogram[index] += 1
