"""Rows as blocks: stretches that are sequences of their own, causal and blind for the others. And torch's attention over each of them.

A mask over whole rows would have sdpa compute what the mask hides, and would keep its fastest kernel away.
B batch, H heads, S sequence, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class Blocks:
    """Stretches of the batch's B × S positions, one after the other. None goes over the end of a row; pads are blocks too.

    No dataclass: FSDP2 would give each layer a copy of one, and ``made`` is for all.
    """

    def __init__(self, lengths: Sequence[int], window: int | None) -> None:
        self.lengths = lengths
        self.window = window
        """Positions that a query sees at most, itself among them; None: all before it."""
        self.made: dict[torch.device, Any] = {}
        """What a library makes of the blocks, once for all layers on a device."""

    def of_rows(self, rows: int, length: int) -> Iterator[list[int]]:
        """The lengths of each row's blocks."""
        assert sum(self.lengths) == rows * length
        row: list[int] = []
        for block in self.lengths:
            row.append(block)
            if sum(row) == length:
                yield row
                row = []
        assert not row, "no block goes over the end of a row"


def attend_each(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    dropout: float = 0.0,
    blocks: Blocks | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An entry of transformers' attention interface: sdpa, block by block. The output is B S H D."""
    assert blocks is not None and attention_mask is None, "every forward pass goes through borders()"
    rows, heads, length, _dimension = query_BHSD.shape
    # under autocast the rotary tables, which are fp32, leave queries and keys in fp32 beside half values
    query, key = query_BHSD.to(value.dtype), key.to(value.dtype)
    group = heads // key.shape[1]
    grouped = group > 1 and _takes_groups(query)
    if group > 1 and not grouped:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        size, window = query.shape[2], blocks.window
        band = None
        if window is not None and size > window:
            band = torch.ones(size, size, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, band, dropout, is_causal=band is None, scale=scaling, **({"enable_gqa": True} if grouped else {})
        )

    outputs = []
    for row, lengths in enumerate(blocks.of_rows(rows, length)):
        pieces = zip(*(torch.split(tensor[row : row + 1], lengths, dim=2) for tensor in (query, key, value)))
        outputs.append(torch.cat([attend(*piece) for piece in pieces], dim=2))
    return torch.cat(outputs).transpose(1, 2).contiguous(), None


def _takes_groups(query: torch.Tensor) -> bool:
    """Whether torch has a fast kernel that reads grouped keys as they are: flash, for 16 bits, from Ampere on."""
    return query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)
