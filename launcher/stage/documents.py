"""The documents of all sources: read once into Arrow files on disk, what is empty dropped, then chosen by seed and weight.

Knows nothing of tokens. Runs in the staging process (Python 3.9; pyarrow and datasets).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.stage.formats import COLUMNS, document_of
from launcher.stage.mixture import Chosen, Part, choose
from launcher.stage.records import Rows, from_dataset, from_files, from_records
from launcher.stage.sources import Local, find_stdlib, split_of

COLUMN = "text"
BATCH_CHARACTERS = 1 << 24
BATCH_DOCUMENTS = 1000


@dataclass(frozen=True)
class Source:
    """Where rows come from and what they are."""

    source: dict[str, Any]
    """``stdlib``; ``records`` or ``files`` with root and files; ``dataset`` with root and splits."""
    format: str
    columns: dict[str, str]
    """Our name (``formats.COLUMNS``) → the data's."""
    weight: float
    label: str
    key: str
    """Of the preset: ``data`` or ``data.sources.N``."""


@dataclass(frozen=True)
class Selection:
    """Which documents are used."""

    num_samples: int | None
    seed: int
    eval_share: float
    split: str


@dataclass
class Dropped:
    """What was left out, and how much of it."""

    empty: int = 0
    """Documents of white space only."""
    invalid_utf8: int = 0
    """Source files that are not UTF-8."""
    names: list[str] = field(default_factory=list)
    """The first few of those files."""


@dataclass(frozen=True)
class Split:
    """Memory-mapped documents of all sources laid end to end, and which of them are used, in this order."""

    stores: list[Any]
    """One ``datasets.Dataset`` with one column for each source."""
    formats: list[str]
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def documents(self, batch: int = 256) -> Iterator[list[tuple[str, str]]]:
        """Format and content (as ``formats.document_of`` gave it) of the documents in this order, in batches."""
        starts = [0]
        for store in self.stores:
            starts.append(starts[-1] + len(store))
        for first in range(0, len(self.order), batch):
            numbers = self.order[first : first + batch]
            owners = [bisect_right(starts, number) - 1 for number in numbers]
            contents: list[str] = [""] * len(numbers)
            for owner in set(owners):
                places = [place for place, of in enumerate(owners) if of == owner]
                for place, text in zip(places, self.stores[owner][[numbers[place] - starts[owner] for place in places]][COLUMN]):
                    contents[place] = text
            yield [(self.formats[owner], text) for owner, text in zip(owners, contents)]


@dataclass(frozen=True)
class Documents:
    train: Split
    eval: Split
    """Empty when nothing is held out."""
    parts: list[Part]
    """What each source gives."""
    dropped: Dropped


def local_of(source: Mapping[str, Any]) -> Local:
    """The files of a request's source."""
    return find_stdlib() if source["kind"] == "stdlib" else Local(source["kind"], source["root"], tuple(source["files"]))


def read_documents(sources: Sequence[Source], selection: Selection, scratch: Path) -> Documents:
    """Read everything once, drop what is empty, choose. ``scratch`` keeps the Arrow files.

    The evaluation documents are those of the sources' splits of that name; where no source has one, the held-out share of the chosen
    ones. Errors: UsageError naming file, line or row, and key.
    """
    dropped = Dropped()
    trains, held_outs = [], []
    for number, source in enumerate(sources):
        train, held_out = _rows(source, selection.split, dropped)
        trains.append(_store(_filled(source, train, dropped), scratch / f"train-{number}.arrow"))
        held_outs.append(None if held_out is None else _store(_filled(source, held_out, dropped), scratch / f"eval-{number}.arrow"))
    splits = [(source.format, store) for source, store in zip(sources, held_outs) if store is not None]
    chosen: Chosen = choose(
        [len(store) for store in trains],
        [source.weight for source in sources],
        num_samples=selection.num_samples,
        eval_share=0.0 if splits else selection.eval_share,
        seed=selection.seed,
    )
    formats = [source.format for source in sources]
    if splits:
        every = [store for _, store in splits]
        evaluation = Split(every, [form for form, _ in splits], list(range(sum(map(len, every)))))
    else:
        evaluation = Split(trains, formats, chosen.held_out)
    return Documents(Split(trains, formats, chosen.train), evaluation, chosen.parts, dropped)


def _rows(source: Source, split: str, dropped: Dropped) -> tuple[Rows, Rows | None]:
    """The rows for the training and those of the evaluation's split, None without one."""
    kind, root = source.source["kind"], source.source.get("root", "")
    if kind == "dataset":
        held_out = from_dataset(Path(root) / "eval", f"{source.label} (eval)", source.key) if "eval" in source.source["splits"] else None
        return from_dataset(Path(root) / "train", f"{source.label} (train)", source.key), held_out
    local = local_of(source.source)
    if local.kind == "files":
        if COLUMNS[source.format] != ("text",):
            raise UsageError(
                f"{source.label} is source files, which have no columns",
                key=f"{source.key}.format",
                hint=f"format: text or fim, or JSONL with the columns {', '.join(source.columns.values())}",
            )
        return _skipping(local, dropped, source.key), None
    eval_names = [name for name in local.files if split_of(name) == split]
    train_names = [name for name in local.files if name not in eval_names]
    if not train_names:  # a single file may be called valid.jsonl
        train_names, eval_names = eval_names, []
    train = from_records(local, train_names, source.columns, source.key)
    return train, from_records(local, eval_names, source.columns, source.key) if eval_names else None


def _skipping(local: Local, dropped: Dropped, key: str) -> Rows:
    skipped: list[str] = []
    yield from from_files(local, local.files, skipped, key)
    dropped.invalid_utf8 += len(skipped)
    dropped.names = [*dropped.names, *skipped][:20]


def _filled(source: Source, rows: Rows, dropped: Dropped) -> Iterator[str]:
    for values, place in rows:
        document = document_of(source.format, values, source.columns, place)
        if document is None:
            dropped.empty += 1
        else:
            yield document


def _store(found: Iterable[str], path: Path) -> Any:
    """Write texts as an Arrow stream and map it."""
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema([(COLUMN, pa.large_string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(found):
            writer.write_batch(pa.record_batch([pa.array(batch, type=pa.large_string())], schema=schema))
    return Dataset.from_file(str(path))


def _batches(found: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in found:
        batch.append(text)
        size += len(text)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
