"""The rows of a source, one after the other, each with the place where it stands: JSONL, Parquet, source files, a fetched data set.

Knows nothing of what a row means. Runs in the staging process (Python 3.9; pyarrow and datasets).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.stage.formats import Place
from launcher.stage.sources import Local

Rows = Iterator[tuple[Mapping[str, Any], Place]]
"""Values by the names that ``formats.COLUMNS`` has for them."""

BATCH_ROWS = 1000


def from_records(local: Local, names: Iterable[str], columns: Mapping[str, str], key: str) -> Rows:
    """Of JSONL and Parquet files. ``columns``: our name → the data's. Errors: UsageError naming file, line or row, and key."""
    for name in names:
        file = Path(local.root) / name
        yield from _from_parquet(file, columns, key) if file.suffix == ".parquet" else _from_jsonl(file, columns, key)


def from_dataset(folder: Path, label: str, key: str) -> Rows:
    """Of a fetched data set, whose columns have our names already. ``label``: its name and split."""
    from datasets import load_from_disk

    row = 0
    for batch in load_from_disk(str(folder)).iter(batch_size=BATCH_ROWS):
        names = list(batch)
        for values in zip(*(batch[name] for name in names)):
            row += 1
            yield dict(zip(names, values)), Place(label, None, row, key)


def from_files(local: Local, names: Iterable[str], skipped: list[str], key: str) -> Rows:
    """Of source files, each one text; those that are not UTF-8 are added to ``skipped``."""
    for row, name in enumerate(names, start=1):
        try:
            yield {"text": (Path(local.root) / name).read_bytes().decode("utf-8")}, Place(name, None, row, key)
        except UnicodeDecodeError:
            skipped.append(name)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror}", file=error.filename, key=f"{key}.path", code="unreadable") from None


def no_column(name: str, column: str, there: Iterable[str], place: Place) -> UsageError:
    """``name``: ours, ``column``: as the preset calls it."""
    message = f"no column {column!r}; there are: {', '.join(sorted(there)) or 'none'}"
    return UsageError(message, file=place.file, line=place.line, key=f"{place.key}.{name}_column", code="no-column")


def _from_jsonl(file: Path, columns: Mapping[str, str], key: str) -> Rows:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = Place(str(file), number, number, key)
            record = _json(line, place)
            for name, column in columns.items():
                if column not in record:
                    raise no_column(name, column, list(record), place)
            yield {name: record[column] for name, column in columns.items()}, place


def _json(line: bytes, place: Place) -> dict[str, Any]:
    def wrong(message: str, **more: Any) -> UsageError:
        return UsageError(message, file=place.file, line=place.line, key=f"{place.key}.path", **more)

    try:
        record = json.loads(line.decode("utf-8-sig" if place.line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise wrong(f"is not UTF-8 (byte {error.start + 1} of the line)", code="not-utf8") from None
    except ValueError as error:
        raise wrong(f"is not JSON: {error}", hint="JSONL has one JSON object a line") from None
    if not isinstance(record, dict):
        raise UsageError("is not a JSON object", file=place.file, line=place.line, key=f"{place.key}.path")
    return record


def _from_parquet(file: Path, columns: Mapping[str, str], key: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place, row = Place(str(file), None, 0, key), 0
    try:
        with pq.ParquetFile(str(file)) as table:
            schema = table.schema_arrow
            for name, column in columns.items():
                if column not in schema.names:
                    raise no_column(name, column, schema.names, place)
                kind = schema.field(column).type
                if name != "messages" and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise UsageError(f"{column} is not text but {kind}", file=str(file), key=f"{key}.{name}_column")
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=list(columns.values())):
                for record in batch.to_pylist():
                    row += 1
                    yield {name: record[column] for name, column in columns.items()}, Place(str(file), None, row, key)
    except UnicodeDecodeError:
        raise UsageError(f"row {row + 1} or one soon after it is not UTF-8", file=str(file), key=f"{key}.path", code="not-utf8") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"is no readable Parquet file: {error}", file=str(file), key=f"{key}.path") from None
