"""torch's CUDA caching allocator, replayed: how much it reserves for a sequence of allocations, and how small a GPU would do. One stream.

When memory runs short, segments that nothing lies in are given back, as torch does; of expandable segments (PYTORCH_CUDA_ALLOC_CONF=
expandable_segments:True: one of each kind, which grows at its end) the pages that nothing lies in.
Rules as in c10/cuda/CUDACachingAllocator.cpp (torch 2.13): blocks of 512 bytes, small ones (to 1 MiB) from segments of 2 MiB, middling
ones (below 10 MiB) from segments of 20 MiB, larger ones from segments rounded to 2 MiB; best fit, split, joined again when freed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1024**2
PAGE = {True: 2 * MIB, False: 20 * MIB}
"""Of expandable segments, for small blocks and for others."""


@dataclass(eq=False)
class Block:
    number: int
    size: int
    small: bool
    start: int = 0
    """Offset in its segment."""
    free: bool = False
    before: Block | None = None
    after: Block | None = None


Trace = Sequence[tuple[int, int]]
"""(key, bytes) of an allocation, (key, -1) when it is freed, in order."""


def replay(trace: Trace, allocator: CachingAllocator) -> CachingAllocator:
    """Errors: NoMemory."""
    held: dict[int, Block] = {}
    for key, num_bytes in trace:
        if num_bytes >= 0:
            held[key] = allocator.allocate(num_bytes)
        else:
            allocator.release(held.pop(key))
    return allocator


def smallest_capacity(trace: Trace, at_least: int, at_most: int, tolerance: float = 0.002) -> int:
    """Bytes of the smallest GPU on which the trace runs, to a share of ``tolerance``; ``at_most`` is known to be enough."""
    while at_most - at_least > tolerance * at_most:
        middle = (at_least + at_most) // 2
        try:
            replay(trace, CachingAllocator(middle))
            at_most = middle
        except NoMemory:
            at_least = middle
    return at_most


class NoMemory(Exception):
    """The capacity is too small."""


class CachingAllocator:
    def __init__(self, capacity: float = float("inf"), *, expandable: bool = False) -> None:
        self.capacity = capacity
        self.expandable = expandable
        self.reserved = 0
        self.peak_reserved = 0
        self.peak_used_pages = 0
        """Bytes of the pages of expandable segments that something lies in."""
        self._used: dict[tuple[bool, int], int] = {}
        self._used_bytes = 0
        self._last: dict[bool, Block | None] = {True: None, False: None}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, Block] = {}
        self._next = 0

    def allocate(self, num_bytes: int) -> Block:
        size = max(512, -(-num_bytes // 512) * 512)
        small = size <= MIB
        free = self._free[small]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            block = self._blocks[free.pop(at)[1]]
            block.free = False
        else:
            block = self._grow(size, small) if self.expandable else self._segment(size, small)
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            other = self._new(rest, small, block.start + size)
            other.before, other.after = block, block.after
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            if self._last[small] is block:
                self._last[small] = other
            self._give(other)
        if self.expandable:
            self._use(block, 1)
        return block

    def release(self, block: Block) -> None:
        if self.expandable:
            self._use(block, -1)
        for other in (block.before, block.after):
            if other is not None and other.free:
                free = self._free[other.small]
                free.pop(bisect_left(free, (other.size, other.number)))
                block.size += other.size
                if other is block.before:
                    block.start, block.before = other.start, other.before
                    if block.before is not None:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after is not None:
                        block.after.before = block
                if self._last[block.small] is other:
                    self._last[block.small] = block
                del self._blocks[other.number]
        self._give(block)

    def _segment(self, size: int, small: bool) -> Block:
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + segment > self.capacity:
            self._give_back()
            if self.reserved + segment > self.capacity:
                raise NoMemory
        self._reserve(segment)
        return self._new(segment, small)

    def _give_back(self) -> None:
        for free in self._free.values():
            for size, number in list(free):
                block = self._blocks[number]
                if block.before is None and block.after is None:
                    free.remove((size, number))
                    del self._blocks[number]
                    self.reserved -= size

    def _grow(self, size: int, small: bool) -> Block:
        last, page = self._last[small], PAGE[small]
        if last is not None and last.free:
            free = self._free[small]
            free.pop(bisect_left(free, (last.size, last.number)))
            more = -(-(size - last.size) // page) * page
            last.size, last.free, block = last.size + more, False, last
        else:
            more = -(-size // page) * page
            block = self._new(more, small, 0 if last is None else last.start + last.size)
            block.before = last
            if last is not None:
                last.after = block
            self._last[small] = block
        self._reserve(more)
        return block

    def _reserve(self, num_bytes: int) -> None:
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _use(self, block: Block, change: int) -> None:
        page = PAGE[block.small]
        for number in range(block.start // page, (block.start + block.size - 1) // page + 1):
            before = self._used.get((block.small, number), 0)
            self._used[block.small, number] = before + change
            self._used_bytes += page * ((before + change > 0) - (before > 0))
        self.peak_used_pages = max(self.peak_used_pages, self._used_bytes)

    def _new(self, size: int, small: bool, start: int = 0) -> Block:
        self._next += 1
        block = Block(self._next, size, small, start)
        self._blocks[block.number] = block
        return block

    def _give(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.number))
