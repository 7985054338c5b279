"""From staged samples to the tensors of a micro batch. Knows padding and packing, not models.

B rows, S positions, T documents of a row. Targets are already shifted: ``targets_BS[b, s]`` is what follows ``input_ids_BS[b, s]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk

from launcher.errors import UsageError

NO_TARGET = -100


@dataclass(frozen=True)
class MicroBatch:
    input_ids_BS: torch.Tensor
    targets_BS: torch.Tensor
    attention_mask_BS: torch.Tensor | None = None
    """1 for tokens, 0 for pads; only with packing ``none``: packed rows have their pads as a document of their own."""
    position_ids_BS: torch.Tensor | None = None
    documents_BS: torch.Tensor | None = None
    """Number of the document that a position belongs to; only where several share a row and must not see each other."""
    num_tokens: int = 0
    """Positions computed, pads included; 0 for a dummy."""


class Samples:
    """A staged data set: ``input_ids``, ``num_targets``; ``labels`` where not every token is learned; ``lengths`` of the documents of a row
    where several share it.
    """

    def __init__(self, folder: Path) -> None:
        dataset = load_from_disk(str(folder))
        assert isinstance(dataset, Dataset)
        self.folder = folder
        self._rows = dataset.with_format("numpy")
        self.num_targets = np.asarray(self._rows["num_targets"][:], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def tokens_and_targets(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Token ids and, of the same length, what follows each (``NO_TARGET`` where that is not trained on).

        Errors: UsageError when the row's number of targets is not what staging wrote, since every loss is divided by it.
        """
        row = self._rows[int(index)]
        tokens = np.asarray(row["input_ids"], dtype=np.int64)
        targets = np.append(np.asarray(row.get("labels", tokens), dtype=np.int64)[1:], NO_TARGET)
        targets[_ends(row) - 1] = NO_TARGET  # what follows the end of a document is another one
        if int((targets != NO_TARGET).sum()) != self.num_targets[index]:
            message = f"sample {index} has {int((targets != NO_TARGET).sum())} targets, its num_targets says {self.num_targets[index]}"
            raise UsageError(message, code="bad-data", file=str(self.folder), hint="stage the data again")
        return tokens, targets

    def lengths(self, index: int) -> np.ndarray[Any, Any]:
        """Tokens of each document of a row."""
        return np.diff(_ends(self._rows[int(index)]), prepend=0)


def collate(samples: Samples, indices: Sequence[int], packing: str, sequence_length: int) -> MicroBatch:
    """One micro batch; without samples a dummy. Errors: UsageError when a sample does not have the length that the preset says."""
    if len(indices) == 0:
        return dummy()
    rows = [samples.tokens_and_targets(index) for index in indices]
    longest = max(len(tokens) for tokens, _ in rows)
    if longest > sequence_length or (packing == "concatenate" and any(len(tokens) != sequence_length for tokens, _ in rows)):
        message = f"samples {list(map(int, indices))}: up to {longest} tokens, the preset's sequence_length is {sequence_length}"
        raise UsageError(message, code="bad-data", file=str(samples.folder), hint="stage the data again")
    if packing == "flatten":
        return _flatten(rows)
    if packing == "documents":
        return _stack_documents(rows, [samples.lengths(index) for index in indices], sequence_length)
    return _stack(rows, sequence_length, masked=packing == "none")


def dummy() -> MicroBatch:
    """What every model can compute and what weighs nothing: no targets, so its loss sum is 0 and so are its gradients."""
    return MicroBatch(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), NO_TARGET))


def _ends(row: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Where each document of a staged row ends."""
    return np.cumsum(np.asarray(row.get("lengths", [len(row["input_ids"])]), dtype=np.int64))


def _stack(rows: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], length: int, *, masked: bool) -> MicroBatch:
    input_ids_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    targets_BS = torch.full((len(rows), length), NO_TARGET)
    mask_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    for b, (tokens, targets) in enumerate(rows):
        input_ids_BS[b, : len(tokens)] = torch.from_numpy(tokens)
        targets_BS[b, : len(tokens)] = torch.from_numpy(targets)
        mask_BS[b, : len(tokens)] = 1
    return MicroBatch(input_ids_BS, targets_BS, mask_BS if masked else None, num_tokens=input_ids_BS.numel())


def _stack_documents(
    rows: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], lengths: Sequence[np.ndarray[Any, Any]], length: int
) -> MicroBatch:
    """Rows of whole documents, each with positions from 0; the few pads at the end of a row are a document without targets."""
    stacked = _stack(rows, length, masked=False)
    positions_BS, documents_BS = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for b, (tokens, _) in enumerate(rows):
        of_row = [*lengths[b].tolist(), length - len(tokens)]
        positions_BS[b] = torch.cat([torch.arange(size) for size in of_row])
        documents_BS[b] = torch.repeat_interleave(torch.arange(len(of_row)), torch.tensor(of_row))
    return replace(stacked, position_ids_BS=positions_BS, documents_BS=documents_BS)


def _flatten(rows: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> MicroBatch:
    lengths = [len(tokens) for tokens, _ in rows]
    return MicroBatch(
        input_ids_BS=torch.from_numpy(np.concatenate([tokens for tokens, _ in rows]))[None],
        targets_BS=torch.from_numpy(np.concatenate([targets for _, targets in rows]))[None],
        position_ids_BS=torch.cat([torch.arange(length) for length in lengths])[None],
        # alone in its row it needs no mask, without which kernels skip what is not causal
        documents_BS=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None] if len(rows) > 1 else None,
        num_tokens=sum(lengths),
    )
