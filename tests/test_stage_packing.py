"""Documents packed into rows and split where they are too long: every token once, borders, determinism, how full the rows are."""

from __future__ import annotations

import random

import pytest

from launcher.stage import samples as samples_module
from launcher.stage.samples import Sample, Tally, concatenate, cut, pack
from launcher.stage.tokens import Tokens

LENGTH = 64
EOS = 0


def documents(number: int, longest: int = LENGTH, seed: int = 1) -> list[Sample]:
    """Lengths as code has them: many short ones, some as long as a row. Tokens tell the document and the position."""
    draw = random.Random(seed)
    sizes = [max(2, min(longest, round(draw.lognormvariate(3, 1)))) for _ in range(number)]
    return [Sample([1000 * document + position for position in range(size)]) for document, size in enumerate(sizes)]


def parts_of(row: Sample) -> list[list[int]]:
    assert row.lengths is not None
    starts = [sum(row.lengths[:number]) for number in range(len(row.lengths))]
    return [row.ids[start : start + length] for start, length in zip(starts, row.lengths)]


@pytest.mark.parametrize("number", [0, 1, 2, 500], ids=str)
def test_every_document_is_whole_in_one_row_once(number: int) -> None:
    given = documents(number)
    rows = list(pack(given, LENGTH))
    assert sorted(part for row in rows for part in parts_of(row)) == sorted(sample.ids for sample in given)
    assert all(2 <= len(row.ids) <= LENGTH for row in rows)
    assert [row.num_targets for row in rows] == [len(row.ids) - len(row.lengths or []) for row in rows]
    firsts = [row.ids[0] for row in rows]
    assert firsts == sorted(firsts), "rows in the order of their first documents"
    assert all(part == sorted(part) for part in ([document[0] for document in parts_of(row)] for row in rows))


def test_packing_is_a_function_of_order_and_lengths() -> None:
    given = documents(300)
    assert list(pack(given, LENGTH)) == list(pack(iter(given), LENGTH))
    assert list(pack(given, LENGTH)) != list(pack(given[::-1], LENGTH))


def test_rows_are_full(record_property: pytest.RecordProperty) -> None:
    """Against padding, and against the least number of rows that the tokens could fill."""
    given = documents(3000)
    rows = list(pack(given, LENGTH))
    tokens = sum(len(sample.ids) for sample in given)
    packed, padded = tokens / (len(rows) * LENGTH), tokens / (len(given) * LENGTH)
    record_property("full_share", packed)
    print(f"{len(given)} documents, {tokens} tokens: {len(rows)} rows, {packed:.2%} full; padded {padded:.2%}")
    assert packed > 0.99 > 0.5 > padded


def test_windows_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "WINDOW_DOCUMENTS", 50)
    given = documents(200)
    unread = iter(given)
    stream = pack(unread, LENGTH)
    next(stream)
    assert next(unread) is given[50]
    stream = pack(given, LENGTH)
    rows = list(stream)
    assert sum(len(row.ids) for row in rows) > 0
    monkeypatch.undo()
    assert len(list(pack(given, LENGTH))) <= len(rows) + 1, "a larger window needs no more rows"


def test_labels_stay_with_their_tokens() -> None:
    rows = list(pack([Sample([1, 2, 3, 4], [False, False, True, True]), Sample([5, 6, 7]), Sample([8, 9], [False, True])], 9))
    assert rows == [Sample([1, 2, 3, 4, 5, 6, 7, 8, 9], [False, False, True, True, True, True, True, False, True], [4, 3, 2])]
    assert rows[0].num_targets == 2 + 2 + 1, "the first token of a document follows nothing"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13], ids=str)
def test_a_long_document_is_split_into_pieces_that_can_all_be_learned(size: int) -> None:
    tally = Tally()
    pieces = list(cut([Tokens(list(range(1, size + 1)), end=EOS)], 4, tally, split=True))
    assert [token for piece in pieces for token in piece.ids] == [*range(1, size + 1), EOS]
    assert all(2 <= len(piece.ids) <= 4 for piece in pieces)
    assert (tally.cut_tokens, tally.short_samples, tally.tokens) == (0, 0, size + 1)


def test_a_prompt_that_fills_the_sample_is_dropped_and_counted() -> None:
    tally = Tally()
    given = [Tokens([1, 2, 3, 4, 5], [False, False, False, False, True]), Tokens([6, 7], [False, True], EOS)]
    assert list(cut(given, 4, tally)) == [Sample([6, 7, EOS], [False, True, True])]
    assert (tally.documents, tally.short_samples, tally.cut_tokens) == (2, 1, 1)


def test_blocks_keep_labels() -> None:
    given = [Tokens([1, 2, 3], [False, True, True], EOS), Tokens([4, 5, 6])]
    blocks = list(concatenate(given, 4, EOS, Tally()))
    assert blocks == [Sample([1, 2, 3, EOS], [False, True, True, True]), Sample([4, 5, 6, EOS])]
