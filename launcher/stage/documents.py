"""The documents: read from records, source files or a fetched data set into one Arrow file on disk, then chosen by seed.

Knows nothing of tokens. Runs in the staging process (Python 3.9; pyarrow and datasets).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.stage.sources import Local, find_stdlib, split_of

COLUMN = "text"
BATCH_CHARACTERS = 1 << 24
BATCH_DOCUMENTS = 1000


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
class Documents:
    """Memory-mapped documents and which of them are used, in this order."""

    train: Any
    """``datasets.Dataset`` with one column."""
    train_order: list[int]
    eval: Any
    """None when nothing is held out."""
    eval_order: list[int]
    dropped: Dropped


@dataclass(frozen=True)
class Selection:
    """Which documents are used."""

    text_column: str
    num_samples: int | None
    seed: int
    eval_share: float
    split: str


def local_of(source: dict[str, Any]) -> Local:
    """The files of a request's source."""
    return find_stdlib() if source["kind"] == "stdlib" else Local(source["kind"], source["root"], tuple(source["files"]))


def read_documents(source: dict[str, Any], selection: Selection, scratch: Path) -> Documents:
    """Read everything once, drop what is empty, choose. ``scratch`` keeps the Arrow files.

    The evaluation documents are those of the split of that name where there is one, else the held-out share of the chosen ones.
    Errors: UsageError naming file, line and key.
    """
    dropped = Dropped()
    if source["kind"] == "dataset":
        splits = {name: _from_dataset(Path(source["root"]) / name) for name in source["splits"]}
        train, held_out = splits["train"], splits.get("eval")
    else:
        local = local_of(source)
        names = local.files
        if local.kind == "files":
            train, held_out = _from_files(local, names, dropped), None
        else:
            eval_names = [name for name in names if split_of(name) == selection.split]
            train_names = [name for name in names if name not in eval_names]
            if not train_names:  # a single file may be called valid.jsonl
                train_names, eval_names = eval_names, []
            train = _from_records(local, train_names, selection.text_column)
            held_out = _from_records(local, eval_names, selection.text_column) if eval_names else None
    train_documents = _store(_filled(train, dropped), scratch / "train.arrow")
    order = list(range(len(train_documents)))
    random.Random(selection.seed).shuffle(order)
    order = order[: selection.num_samples]
    if held_out is not None:
        eval_documents = _store(_filled(held_out, dropped), scratch / "eval.arrow")
        return Documents(train_documents, order, eval_documents, list(range(len(eval_documents))), dropped)
    if selection.eval_share == 0:
        return Documents(train_documents, order, None, [], dropped)
    num_held_out = max(1, round(len(order) * selection.eval_share))
    return Documents(train_documents, order[:-num_held_out], train_documents, order[-num_held_out:], dropped)


def texts(documents: Any, order: list[int], batch: int = 256) -> Iterator[list[str]]:
    """The texts in this order, in batches."""
    for start in range(0, len(order), batch):
        yield documents[order[start : start + batch]][COLUMN]


def _filled(found: Iterable[str], dropped: Dropped) -> Iterator[str]:
    for text in found:
        if text and not text.isspace():
            yield text
        else:
            dropped.empty += 1


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


def _from_dataset(folder: Path) -> Iterator[str]:
    from datasets import load_from_disk

    for batch in load_from_disk(str(folder)).iter(batch_size=BATCH_DOCUMENTS):
        yield from ("" if text is None else text for text in batch[COLUMN])


def _from_files(local: Local, names: Iterable[str], dropped: Dropped) -> Iterator[str]:
    for name in names:
        try:
            yield (Path(local.root) / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            dropped.invalid_utf8 += 1
            if len(dropped.names) < 20:
                dropped.names.append(name)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", file=error.filename, key="data.path", code="unreadable") from None


def _from_records(local: Local, names: Iterable[str], column: str) -> Iterator[str]:
    for name in names:
        file = Path(local.root) / name
        yield from _from_parquet(file, column) if file.suffix == ".parquet" else _from_jsonl(file, column)


def _from_jsonl(file: Path, column: str) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"is not UTF-8 (byte {error.start + 1} of the line)", file=str(file), line=number, key="data.path", code="not-utf8"
                ) from None
            except ValueError as error:
                raise UsageError(
                    f"is not JSON: {error}", file=str(file), line=number, key="data.path", hint="JSONL has one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise UsageError("is not a JSON object", file=str(file), line=number, key="data.path")
            if column not in record:
                raise no_column(column, list(record), str(file), number)
            value = record[column]
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{column} is not text but {type(value).__name__}", file=str(file), line=number, key="data.text_column")
            yield value or ""


def _from_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(str(file)) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise no_column(column, schema.names, str(file))
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UsageError(f"{column} is not text but {kind}", file=str(file), key="data.text_column")
            for batch in table.iter_batches(batch_size=BATCH_DOCUMENTS, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except UnicodeDecodeError:
        raise UsageError(f"{column} is not UTF-8", file=str(file), key="data.path", code="not-utf8") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"is no readable Parquet file: {error}", file=str(file), key="data.path") from None


def no_column(column: str, there: list[str], file: str, line: int | None = None) -> UsageError:
    return UsageError(
        f"no column {column!r}; there are: {', '.join(sorted(there)) or 'none'}",
        file=file,
        line=line,
        key="data.text_column",
        code="no-column",
    )
