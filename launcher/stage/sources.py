"""Local data and local models as files: which files are meant, whether they are complete, and the hash of their content.

Knows nothing of what is inside the files. Standard library only (Python 3.9); used on the host and in the container.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import UsageError
from launcher.files import digest, hash_file, write_json
from launcher.supported import TOKENIZER_FILES

RECORD_SUFFIXES = (".jsonl", ".parquet")
STDLIB_WITHOUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""What ``from_pretrained`` reads of a folder."""
RACY_S = 2.0
"""A file that changed so shortly before it was hashed may change again without its time moving."""

Kind = Literal["records", "files"]


@dataclass(frozen=True)
class Local:
    """Local data. ``records``: JSONL and Parquet, a sample a record. ``files``: a sample a file."""

    kind: Kind
    root: str
    files: tuple[str, ...]
    """Relative to ``root``, in order."""


def find_local(path: Path, glob: str, key: str = "data") -> Local:
    """What ``data.path`` means: a JSONL or Parquet file, a folder of such files, or a folder of source files.

    ``key``: of the preset, of the source. Errors: UsageError.
    """
    if path.is_file():
        if path.suffix not in RECORD_SUFFIXES:
            raise UsageError(f"{path} is neither .jsonl nor .parquet", key=f"{key}.path", hint="or name a folder of source files")
        return Local("records", str(path.parent), (path.name,))
    if not path.is_dir():
        raise UsageError(f"{path} does not exist", key=f"{key}.path", code="no-file")
    top = _matching(path, [f"*{suffix}" for suffix in RECORD_SUFFIXES])
    try:
        sources = _matching(path, [glob])
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"{glob!r} is no pattern: {error}", key=f"{key}.glob", hint="for example **/*.py") from None
    if top and sources and set(top) != set(sources):
        raise UsageError(
            f"{path} holds {top[0]} and also {sources[0]}, which data.glob matches",
            key=f"{key}.path",
            hint="name the file, or a folder of one kind",
        )
    if sources and not top:
        return Local("files", str(path), sources)
    records = tuple(sorted({*top, *_matching(path, [f"*/*{suffix}" for suffix in RECORD_SUFFIXES])}))
    if not records:
        raise UsageError(f"{path} holds no .jsonl, no .parquet and nothing that {glob} matches", key=f"{key}.path", hint="see data.glob")
    return Local("records", str(path), records)


def find_stdlib(root: Path | None = None) -> Local:
    """The Python sources of the standard library, without its tests; by default that of the running interpreter."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = [name for name in _matching(root, ["**/*.py"]) if not STDLIB_WITHOUT & set(name.split("/")) and not leaves(root, name)]
    if not files:
        raise UsageError(f"the interpreter has no sources of its standard library in {root}", key="data.path")
    return Local("files", str(root), tuple(files))


def leaves(root: Path, name: str) -> bool:
    """Whether a file of ``root`` is a link to somewhere outside it (which a container would not see)."""
    file = root / name
    return file.resolve() != root.resolve() / name and root.resolve() not in file.resolve().parents


def split_of(name: str) -> str:
    """The split that a record file's name says: ``valid`` for ``valid.jsonl``, ``valid-00000-of-00002.parquet``, ``valid/x.jsonl``."""
    first, _, rest = name.partition("/")
    return first if rest else re.sub(r"(-\d+-of-\d+)?\.[a-z]+$", "", first)


def content_sha(local: Local, cache: Path | None = None, *, key: str = "data.path") -> str:
    """SHA-256 over names (of a folder's files) and contents. ``cache``: a folder that remembers it by ``fingerprint``.

    Errors: UsageError that names ``key`` when a file cannot be read.
    """
    started = time.time()
    known = known_sha(local, cache, key=key)
    if known is not None:
        return known
    root, contents, newest = Path(local.root), [], 0.0
    mark = fingerprint(local, key=key)
    try:
        for name in local.files:
            newest = max(newest, (root / name).stat().st_mtime)
            contents.append((name if len(local.files) > 1 else "", hash_file(root / name)))
    except OSError as error:
        raise _unreadable(error, key) from None
    sha = digest(contents)
    if cache is not None and newest < started - RACY_S:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(cache / f"{mark}.json", {"sha256": sha, "root": local.root}, mode=0o644)
    return sha


def combined_sha(shas: Sequence[str]) -> str:
    """One hash of several sources' content, in their order; that of the only one as it is."""
    return shas[0] if len(shas) == 1 else digest(list(shas))


def known_sha(local: Local, cache: Path | None, *, key: str = "data.path") -> str | None:
    """``content_sha`` where it was computed before and no file has changed since; reads no content. Errors: UsageError."""
    if cache is None:
        return None
    try:
        return str(json.loads((cache / f"{fingerprint(local, key=key)}.json").read_text())["sha256"])
    except FileNotFoundError:
        return None


def fingerprint(local: Local, *, key: str = "data.path") -> str:
    """Hash of names, sizes and times of change: what can be known of the content without reading it. Errors: UsageError."""
    root = Path(local.root)
    try:
        states = [(root / name).stat() for name in local.files]
    except OSError as error:
        raise _unreadable(error, key) from None
    listing = [local.root, *([name, state.st_size, state.st_mtime_ns] for name, state in zip(local.files, states))]
    return digest(listing)


def _unreadable(error: OSError, key: str) -> UsageError:
    return UsageError(f"cannot be read: {error.strerror}", file=error.filename, key=key, code="unreadable")


def find_model(folder: Path, key: str) -> Local:
    """The files of a whole model that a training may read. Errors: UsageError naming what is missing."""
    shards = check_model(folder, key)
    top = {file.name for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES and file.is_file()}
    return Local("files", str(folder), tuple(sorted(top | set(shards))))


def check_model(folder: Path, key: str) -> list[str]:
    """That a folder has config, all its safetensors, which are the answer, and a tokenizer. Errors: UsageError naming what is missing."""

    def demand(found: bool, what: str, hint: str | None = None) -> None:
        if not found:
            raise UsageError(f"{folder} has no {what}", key=key, code="incomplete-model", hint=hint)

    demand(folder.is_dir(), "model: it is not a folder")
    demand(_filled(folder / "config.json"), "config.json")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UsageError("is no index of weights", file=str(index), key=key, code="incomplete-model") from None
        for shard in shards:
            demand(_filled(folder / shard), f"{shard}, which its index names")
    else:
        shards = ["model.safetensors"]
        demand(
            _filled(folder / "model.safetensors"), "safetensors weights", "save them with save_pretrained; pickled weights are never loaded"
        )
    tokenizer = any(_filled(folder / name) for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"))
    demand(tokenizer, "tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    return shards


def tokenizer_sha(folder: Path) -> str:
    """Hash of the tokenizer's files."""
    return digest({name: hash_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()})


def _matching(root: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    found = {file for pattern in patterns for file in root.glob(pattern) if file.is_file()}
    names = [file.relative_to(root).as_posix() for file in found]
    return tuple(sorted(name for name in names if not any(part.startswith(".") for part in name.split("/"))))


def _filled(file: Path) -> bool:
    return file.is_file() and os.path.getsize(file) > 0
