"""Several sources mixed by weight: exact proportions, nothing held out is trained on, the same from the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.preset.schema import Data
from launcher.stage.documents import Selection, Source, Split, read_documents
from launcher.stage.mixture import Chosen, apportion, choose
from launcher.stage.sources import find_local


def owners(chosen: list[int], sizes: list[int]) -> list[int]:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    counts = Counter(next(number for number, end in enumerate(ends) if row < end) for row in chosen)
    return [counts[number] for number in range(len(sizes))]


def mixed(sizes: list[int], weights: list[float], num_samples: int | None = None, eval_share: float = 0.0, seed: int = 1) -> Chosen:
    return choose(sizes, weights, num_samples=num_samples, eval_share=eval_share, seed=seed)


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (10, [0.7, 0.3], [7, 3]),
        (10, [1, 1, 1], [4, 3, 3]),
        (1000, [0.1, 0.2, 0.7], [100, 200, 700]),
        (7, [70, 30], [5, 2]),
        (0, [1, 2], [0, 0]),
        (1, [1, 5], [0, 1]),
    ],
    ids=str,
)
def test_apportion(total: int, weights: list[float], parts: list[int]) -> None:
    assert apportion(total, weights) == parts


@pytest.mark.parametrize("seed", [1, 2], ids=str)
@pytest.mark.parametrize(
    ("sizes", "weights", "num_samples", "parts"),
    [
        ([1000, 1000], [0.7, 0.3], 500, [350, 150]),
        ([1000, 1000], [0.7, 0.3], None, [1000, 428]),
        ([900, 50, 300], [6, 1, 3], None, [300, 50, 150]),
        ([40, 1000], [0.5, 0.5], 400, [200, 200]),
    ],
    ids=["enough", "as many as need no repetition", "the smallest decides", "again and again"],
)
def test_an_epoch_holds_the_exact_proportions(
    sizes: list[int], weights: list[float], num_samples: int | None, parts: list[int], seed: int
) -> None:
    chosen = mixed(sizes, weights, num_samples, seed=seed)
    assert owners(chosen.train, sizes) == parts == [part.train for part in chosen.parts]
    assert chosen == mixed(sizes, weights, num_samples, seed=seed)
    assert chosen.train != mixed(sizes, weights, num_samples, seed=seed + 7).train
    repeats = Counter(chosen.train)
    for number, size in enumerate(sizes):
        times = [repeats[row] for row in range(sum(sizes[:number]), sum(sizes[:number]) + size)]
        assert max(times) - min(times) <= 1, "no document comes twice more often than another of its source"
    first = owners(chosen.train[: len(chosen.train) // 2], sizes)
    assert all(abs(half - part / 2) < 4 * part**0.5 for half, part in zip(first, parts)), "sources are shuffled, not one after the other"


@pytest.mark.parametrize("num_samples", [None, 200, 2000], ids=str)
def test_what_is_held_out_is_never_trained_on(num_samples: int | None) -> None:
    sizes = [400, 60]
    chosen = mixed(sizes, [3, 1], num_samples, eval_share=0.1)
    assert not set(chosen.held_out) & set(chosen.train)
    assert len(set(chosen.held_out)) == len(chosen.held_out) > 0
    total = len(chosen.train)
    assert owners(chosen.train, sizes) == apportion(total, [3, 1])
    if num_samples is not None:
        assert total == num_samples - round(num_samples * 0.1)
    assert [part.held_out for part in chosen.parts] == owners(chosen.held_out, sizes)


def test_one_source_is_never_repeated() -> None:
    assert sorted(mixed([5], [1], 100).train) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([5, 0], [1, 1], r"data\.sources\.1: no document is left of this source"),
        ([500, 500], [1000, 1], r"data\.sources\.1\.weight: 1 gives none of the 100 training samples"),
    ],
    ids=["empty", "too little weight"],
)
def test_a_source_that_gives_nothing_is_refused(sizes: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(sizes, weights, 100)


def source(folder: Path, weight: float, number: int, **columns: str) -> Source:
    local = find_local(folder, "**/*.py")
    format = "prompt_completion" if "prompt" in columns else "text"
    found: dict[str, Any] = {"kind": local.kind, "root": local.root, "files": list(local.files)}
    return Source(found, format, columns, weight, folder.name, f"data.sources.{number}")


def texts(split: Split) -> list[tuple[str, str]]:
    return [document for batch in split.documents(batch=7) for document in batch]


@pytest.mark.train
def test_sources_of_several_formats_with_their_splits(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "tasks").mkdir()
    for number in range(30):
        (tmp_path / f"code/f{number:02}.py").write_text(f"x = {number}")
    for name, count in (("train", 40), ("valid", 3)):
        rows = [json.dumps({"q": f"{name} {number}", "a": str(number)}) + "\n" for number in range(count)]
        (tmp_path / f"tasks/{name}.jsonl").write_text("".join(rows))
    sources = [source(tmp_path / "code", 1, 0, text="content"), source(tmp_path / "tasks", 3, 1, prompt="q", completion="a")]
    found = read_documents(sources, Selection(40, 1, 0.5, "valid"), tmp_path)
    train, held_out = texts(found.train), texts(found.eval)
    assert Counter(format for format, _ in train) == {"text": 10, "prompt_completion": 30}
    assert len(set(train)) == 40 and all(json.loads(text)[0].startswith("train ") for format, text in train if format != "text")
    assert [json.loads(text) for _, text in held_out] == [[f"valid {number}", str(number)] for number in range(3)], (
        "a split wins over the share"
    )
    (tmp_path / "tasks/train.jsonl").write_text('{"q": "x", "a": ""}\n')
    with pytest.raises(UsageError, match=r"train\.jsonl:1: data\.sources\.1\.completion_column: a is empty"):
        read_documents(sources, Selection(40, 1, 0.5, "valid"), tmp_path)


def test_what_a_source_leaves_out_is_as_data_has_it() -> None:
    data = Data.model_validate(
        {
            "format": "fim",
            "text_column": "code",
            "sources": [{"path": "a", "weight": 0.7}, {"name": "o/b", "revision": "v1", "format": "chat", "text_column": "x"}],
        }
    )
    first, second = data.several
    assert (first.format, first.text_column, first.glob, first.weight) == ("fim", "code", "**/*.py", 0.7)
    assert (second.format, second.text_column, second.messages_column, second.revision) == ("chat", "x", "messages", "v1")
    (only,) = Data.model_validate({"name": "o/a", "subset": "s"}).several
    assert (only.name, only.subset, only.format) == ("o/a", "s", "text")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "o/a", "sources": [{"path": "b"}]}, "give exactly one of name, path and sources"),
        ({"sources": [{"path": "b", "name": "o/a"}]}, "give exactly one of name and path"),
        ({"sources": []}, "at least 1 item"),
        ({"sources": [{"path": "b", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"path": "b"}], "subset": "x"}, "subset: belongs to name"),
        ({"path": "b", "fim_rate": 0.5}, "fim_rate: has no effect with format text; set format: fim"),
        ({"path": "b", "format": "fim", "fim_rate": 1.5}, "less than or equal to 1"),
        ({"path": "b", "format": "prompt_completion", "prompt_column": "completion"}, "prompt_column: is the same as completion_column"),
    ],
    ids=["name and sources", "two in a source", "none", "weight", "subset", "fim_rate", "rate", "one column"],
)
def test_data_that_makes_no_sense_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data.model_validate(value)
