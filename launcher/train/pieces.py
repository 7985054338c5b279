"""Tensors that ranks may hold in part, and files of them that any other number of ranks can read.

A piece is a contiguous stretch of the flattened tensor: what FSDP2 (rows) and DeepSpeed (flat partitions) leave on a rank. A file is
safetensors: whole tensors in their shape, parts flat with their place in the header, so that a reader takes only the stretch it needs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from launcher.errors import RunFailed

Read = Callable[[str, int, int], torch.Tensor]
"""Name, first entry, number of entries → that stretch of the flattened tensor, on CPU."""


@dataclass(frozen=True)
class Piece:
    tensor: torch.Tensor
    """This rank's entries, live: a view of what is trained, in any shape."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Where the entries begin in the flattened whole."""
    written: bool
    """Whether this rank is the one that writes these entries into a checkpoint."""

    @property
    def is_whole(self) -> bool:
        return self.tensor.shape == self.shape


def whole_piece(tensor: torch.Tensor, *, written: bool) -> Piece:
    return Piece(tensor, tuple(tensor.shape), 0, written)


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write the pieces that are this rank's to write, flushed to disk."""
    own = {name: piece for name, piece in pieces.items() if piece.written}
    parts = {name: {"shape": piece.shape, "start": piece.start} for name, piece in own.items() if not piece.is_whole}
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, piece in own.items():
        values = _detached(piece.tensor if piece.is_whole else piece.tensor.flatten())
        # one tensor may be the state of several parameters, which safetensors refuses
        tensors[name] = values.clone() if values.data_ptr() in seen else values
        seen.add(values.data_ptr())
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", **({"parts": json.dumps(parts)} if parts else {})})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class PieceFiles:
    """Files that together hold every tensor once, whoever wrote them. Use as a context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files = [safetensors.safe_open(path, framework="pt") for path in paths]
        self._places: dict[str, list[tuple[int, int, int]]] = {}
        """Name → (first entry, entries, number of the file)."""
        for number, file in enumerate(self._files):
            parts = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = tuple(file.get_slice(name).get_shape())
                whole, start = (tuple(parts[name]["shape"]), parts[name]["start"]) if name in parts else (shape, 0)
                self.shapes[name] = whole
                self._places.setdefault(name, []).append((start, math.prod(shape), number))

    def __enter__(self) -> PieceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()  # unmaps them

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Errors: RunFailed when the files do not hold the stretch."""
        found = torch.empty(0)
        filled = 0
        for place, size, number in self._places.get(name, []):
            first, last = max(start, place), min(start + count, place + size)
            if first >= last:
                continue
            stretch = self._stretch(number, name, first - place, last - place)
            if last - first == count:
                return stretch
            if filled == 0:
                found = torch.empty(count, dtype=stretch.dtype)
            found[first - start : last - start] = stretch
            filled += last - first
        if filled != count:
            raise RunFailed(f"{name}: the checkpoint holds {filled} of {count} entries from {start} on", code="foreign-checkpoint")
        return found

    def whole(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def _stretch(self, number: int, name: str, first: int, last: int) -> torch.Tensor:
        """Entries of one file's flattened tensor; of a matrix only the rows that hold them are read."""
        part = self._files[number].get_slice(name)
        shape = part.get_shape()
        if not shape:
            return torch.as_tensor(self._files[number].get_tensor(name)).flatten()
        row = math.prod(shape[1:])
        rows: torch.Tensor = part[first // row : -(-last // row)]
        return rows.flatten()[first % row : first % row + last - first]


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """On CPU with a storage of its own, as safetensors demands; copied only where that is not so already."""
    values = tensor.detach().to("cpu").contiguous()
    return values if values.untyped_storage().nbytes() == values.numel() * values.element_size() else values.clone()
