"""Which of our GPU kinds a node has, from what Slurm calls it and the node's features. Pure; a guess is never made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.preset.hardware import Gpu, Hardware

ALIASES: Mapping[str, str] = {"volta": "v100"}
"""What sites call a GPU → the type that our hardware files name."""

MEMORIES_GB: Mapping[str, tuple[int, ...]] = {"v100": (16, 32), "a100": (40, 80), "h100": (80, 94, 96)}
"""Memories that a GPU is sold with."""

USUAL_GB: Mapping[str, int] = {"h100": 80}
"""Taken where nothing names the memory: the others are sold under names of their own (NVL, GH200)."""

_SIZES_GB = frozenset([8, 10, 11, 12, 16, 20, 24, 32, 40, 45, 46, 48, 64, 80, 94, 96, 128, 141, 144, 180, 192])

SLICE = re.compile(r"\d+c?\.?\d*g\.\d+gb", re.IGNORECASE)
"""A part of a GPU (MIG): ``1g.10gb``, ``a100_3g.20gb``."""


@dataclass(frozen=True)
class Kind:
    """``name``: None where the memory of the GPU could not be told: then ``possible`` has the kinds that it may be."""

    family: str
    name: str | None
    hardware: str | None = None
    """Our hardware file of it."""
    possible: tuple[str, ...] = ()


def kind_of(gres_type: str | None, features: Sequence[str], hardware: Sequence[Hardware]) -> Kind | None:
    """None where neither the type nor a feature says which GPU it is, and for a slice of one."""
    if gres_type is not None and SLICE.search(gres_type):
        return None
    texts = [text.lower() for text in ([gres_type] if gres_type else []) + [*features]]
    family = next((found for text in texts if (found := _family(text, hardware))), None)
    if family is None:
        return Kind(texts[0], texts[0]) if gres_type else None
    words = {word for text in texts for word in _words(text)}
    files = _files(family, words, hardware)
    sizes, variants = _sizes(texts, family), MEMORIES_GB.get(family, ())
    if not sizes and family in USUAL_GB:
        sizes = {USUAL_GB[family]}
    if len(sizes) > 1 or (not sizes and len(variants) > 1):
        return Kind(family, None, possible=tuple(_name(size, files, family) for size in (sorted(sizes) or variants)))
    size = next(iter(sizes or files))
    return Kind(family, _name(size, files, family), files[size].name if size in files else None)


def _files(family: str, words: set[str], hardware: Sequence[Hardware]) -> dict[int, Hardware]:
    """Memory in GB → our file of such a GPU: of several the one of which the most is said (``pcie``) and nothing is unsaid."""
    best: dict[int, tuple[int, Hardware]] = {}
    for one in hardware:
        if one.gpu is None or one.gpu.gres_type != family:
            continue
        size = _memory_gb(one.gpu)
        special = set(_words(one.name)) - {family, f"{size}gb"}
        if special <= words and (size not in best or len(special) > best[size][0]):
            best[size] = len(special), one
    return {size: one for size, (_, one) in best.items()}


def _name(size: int, files: Mapping[int, Hardware], family: str) -> str:
    gpu = files[size].gpu if size in files else None
    return f"{family}-{size}gb" if gpu is None else gpu.kind


def _family(text: str, hardware: Sequence[Hardware]) -> str | None:
    """The type as our hardware files have it."""
    gpus = {_words(one.name)[0]: one.gpu.gres_type for one in hardware if one.gpu is not None}
    types = {**gpus, **{name: name for name in gpus.values() if name}}
    for word in _words(text):
        bare = re.sub(r"(?<=[a-z]{5})\d+$", "", word)  # volta32
        for name in (word, ALIASES.get(word), ALIASES.get(bare)):
            if types.get(name or ""):
                return types[name or ""]
    return None


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word]


def _sizes(texts: Sequence[str], family: str) -> set[int]:
    """Memories in GB that the words name: beside the GPU's name or ``gpu``; elsewhere (node features also name RAM) with their unit only,
    and only a memory that this GPU is sold with.
    """
    names = (family, *(alias for alias, meant in ALIASES.items() if meant == family))
    found = set()
    for text in texts:
        about = any(name in text for name in names) or "gpu" in text
        rest = text
        for name in names:
            rest = rest.replace(name, " ")
        for match in re.finditer(r"(?<![\d.a-z])(\d{1,3})(gi?b?)?(?![\d.a-z])", rest):
            if int(match[1]) in _SIZES_GB and (about or (match[2] and int(match[1]) in MEMORIES_GB.get(family, ()))):
                found.add(int(match[1]))
    return found


def _memory_gb(gpu: Gpu) -> int:
    """As the vendor sells it: what the driver reports is a little less."""
    return min((size for size in _SIZES_GB if size >= gpu.memory_gib), default=round(gpu.memory_gib))
