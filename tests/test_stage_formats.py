"""Prompt and completion, chat, fill in the middle: exact tokens and labels on small tokenizers, and what is said of bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.stage.documents import Selection, Source, read_documents
from launcher.stage.fim import MARKS, Fim, Marks, marks_of
from launcher.stage.formats import COLUMNS, Place, document_of
from launcher.stage.sources import Kind, find_local
from launcher.stage.tokens import Encoder, Formats, Tokens

pytestmark = pytest.mark.train

EOS = 0
TEXT = "def f(x):\n    return x + 1\n\n\ndef g(y):\n    return f(y) * 2\n"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
ALTERNATING = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
ALTERNATING += "{% endif %}[{{ m['content'] }}]{% endfor %}"
FORGETFUL = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}[{{ m['content'] }}]{% else %}[]{% endif %}{% endfor %}"

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "é😀?"},
    {"role": "assistant", "content": "Oui 😀"},
]


def bpe(marks: Marks | None = None) -> Any:
    """All bytes and a few merges; EOS is 0."""
    from launcher.stage.random_start import train_tokenizer

    names = [] if marks is None else [marks.prefix, marks.middle, marks.suffix, *([marks.end] if marks.end else [])]
    return train_tokenizer(iter([[TEXT] * 10]), 300, names)


def spaced(marks: Marks) -> Any:
    """As SentencePiece: every text begins with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["</s>", "<unk>", "▁", *sorted(set(TEXT) - {" "}), *[name for name in vars(marks).values() if name]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [name for name in vars(marks).values() if name]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", additional_special_tokens=special)


def tokens(tokenizer: Any, format: str, row: dict[str, Any], **changes: Any) -> list[Tokens]:
    document = document_of(format, row, {name: name for name in COLUMNS[format]}, Place("d.jsonl", 3, 3))
    assert document is not None
    settings: dict[str, Any] = {"append_eos": True, "seed": 4, "fim": {"rate": 1.0, "spm_rate": 0.0, "split": False}, "room": 64}
    return list(Formats(tokenizer, {format}, **{**settings, **changes}).tokens([[(format, document)]], "train"))


def learned_text(tokenizer: Any, found: Tokens) -> str:
    assert found.learned is not None
    return str(tokenizer.decode([token for token, flag in zip(found.ids, found.learned) if flag]))


def test_only_the_completion_is_learned() -> None:
    tokenizer = bpe()
    (found,) = tokens(tokenizer, "prompt_completion", {"prompt": "# add\ndef", "completion": " f(x):\n"})
    prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("# add\ndef", " f(x):\n"))
    assert found == Tokens([*prompt, *completion], [False] * len(prompt) + [True] * len(completion), EOS)
    (found,) = tokens(tokenizer, "prompt_completion", {"prompt": "", "completion": "x"}, append_eos=False)
    assert found == Tokens(tokenizer("x")["input_ids"], [True], None)


def test_a_completion_gets_no_space_that_it_does_not_have() -> None:
    tokenizer = spaced(MARKS[3])
    (found,) = tokens(tokenizer, "prompt_completion", {"prompt": "def ", "completion": "f(x)"})
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["▁", *"def", "▁", *"f(x)"]
    (found,) = tokens(tokenizer, "prompt_completion", {"prompt": "", "completion": "f"})
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["▁", "f"], "the beginning of a text has its space"


@pytest.mark.parametrize(("template", "after"), [(CHATML, "\n"), (MARKED, "")], ids=["prefix differences", "generation marks"])
def test_only_the_assistants_turns_are_learned(template: str, after: str) -> None:
    tokenizer = bpe()
    tokenizer.chat_template = template
    (found,) = tokens(tokenizer, "chat", {"messages": TALK})
    whole = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in TALK)
    assert tokenizer.decode(found.ids) == whole
    assert learned_text(tokenizer, found) == f"Two.<|im_end|>{after}Oui 😀<|im_end|>{after}"
    assert found.end is None, "the template ends turns"


def test_a_tokenizer_without_a_template_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"data\.format: the tokenizer has no chat template \(an instruct model's tokenizer, chat_templ"):
        tokens(bpe(), "chat", {"messages": TALK})


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (ALTERNATING, TALK, r"d\.jsonl:3: data\.messages_column: the chat template refuses this conversation: roles must alternate"),
        (FORGETFUL, TALK[1:], "writes what comes before message 1 differently once it is answered or continued"),
        (MARKED.replace("generation %", "generation -%").replace("== 'assistant'", "== 'x'"), TALK, "leaves nothing of the assistant's"),
    ],
    ids=["refused", "not a prefix", "nothing marked"],
)
def test_a_conversation_that_the_template_cannot_take(template: str, messages: Any, message: str) -> None:
    tokenizer = bpe()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=message):
        tokens(tokenizer, "chat", {"messages": messages})


def parts_of(tokenizer: Any, found: Tokens, marks: Marks) -> tuple[str, list[str]]:
    """The order of the marks, and the text after each."""
    names = {
        tokenizer.convert_tokens_to_ids(name): letter for name, letter in ((marks.prefix, "P"), (marks.middle, "M"), (marks.suffix, "S"))
    }
    assert found.ids[0] in names
    order, parts = "", []
    for token in found.ids:
        if token in names:
            order += names[token]
            parts.append([])
        else:
            parts[-1].append(token)
    return order, [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("marks", MARKS[:3], ids=lambda marks: marks.prefix)
def test_fill_in_the_middle(marks: Marks) -> None:
    tokenizer = bpe(marks)
    (psm,) = tokens(tokenizer, "fim", {"text": TEXT})
    order, (prefix, suffix, middle) = parts_of(tokenizer, psm, marks)
    assert order == "PSM"
    assert prefix + middle + suffix == TEXT and min(map(len, (prefix, middle, suffix))) > 0
    assert psm.end == EOS and psm.learned is None
    (spm,) = tokens(tokenizer, "fim", {"text": TEXT}, fim={"rate": 1.0, "spm_rate": 1.0, "split": False})
    assert parts_of(tokenizer, spm, marks) == ("PSM", ["", suffix, prefix + middle]), (
        "prefix and middle are one stretch after the last mark"
    )
    assert tokens(tokenizer, "fim", {"text": TEXT}) == [psm], "a function of the seed and the sample"
    assert tokens(tokenizer, "fim", {"text": TEXT}, seed=2) != [psm]
    (plain,) = tokens(tokenizer, "fim", {"text": TEXT}, fim={"rate": 0.0, "spm_rate": 0.5, "split": False})
    assert plain == Tokens(tokenizer(TEXT)["input_ids"], None, EOS)


def test_code_llamas_middle_ends_with_its_own_token_and_begins_without_a_space() -> None:
    tokenizer = spaced(MARKS[3])
    (found,) = tokens(tokenizer, "fim", {"text": TEXT}, room=None)
    names = tokenizer.convert_ids_to_tokens(found.ids)
    text = "".join(names).replace("▁<PRE>▁", "", 1)
    prefix, suffix, middle = text.replace("▁<SUF>", "|").replace("▁<MID>", "|").split("|")
    assert (prefix + middle + suffix).replace("▁", " ") == TEXT
    assert found.end == tokenizer.convert_tokens_to_ids("▁<EOT>")


@pytest.mark.parametrize("seed", range(6))
def test_a_rearranged_document_fits_its_sample(seed: int) -> None:
    """What is too long loses the end of its suffix, else the beginning of its prefix, never the middle, and its end is still learned."""
    marks, room = MARKS[0], 24
    tokenizer = bpe(marks)
    whole = tokenizer(TEXT * 3)["input_ids"]
    fim = {"rate": 1.0, "spm_rate": 0.0, "split": False}
    (found,) = tokens(tokenizer, "fim", {"text": TEXT * 3}, fim=fim, seed=seed, room=room)
    _, (prefix, suffix, middle) = parts_of(tokenizer, found, marks)
    assert len(found.ids) + 1 <= room and found.end == EOS
    assert prefix + middle + suffix in TEXT * 3
    assert found.left_out >= len(whole) - room
    pieces = tokens(tokenizer, "fim", {"text": TEXT * 3}, fim={**fim, "split": True}, seed=seed, room=room)
    joined = [parts_of(tokenizer, piece, marks)[1] for piece in pieces]
    assert len(pieces) == -(-len(whole) // (room - 4)) and all(len(piece.ids) < room for piece in pieces)
    if not any(piece.left_out for piece in pieces):
        assert "".join(prefix + middle + suffix for prefix, suffix, middle in joined) == TEXT * 3


def test_rates_hold_over_many_documents() -> None:
    marks = MARKS[0]
    tokenizer = bpe(marks)
    formats = Formats(tokenizer, {"fim"}, append_eos=True, seed=3, fim={"rate": 0.4, "spm_rate": 0.25, "split": False}, room=64)
    found = list(formats.tokens([[("fim", "abc def ghi")] * 2000], "train"))
    p, s = (tokenizer.convert_tokens_to_ids(name) for name in (marks.prefix, marks.suffix))
    rearranged = [each.ids for each in found if each.ids[0] == p]
    assert len(rearranged) / 2000 == pytest.approx(0.4, abs=0.04)
    spm = sum(ids[1] == s and ids[-1] != s and ids.index(tokenizer.convert_tokens_to_ids(marks.middle)) > 1 for ids in rearranged)
    assert 0.25 * 0.8 < spm / len(rearranged) < 0.25 * 1.2 + 0.1, "a PSM of an empty prefix looks the same"
    assert list(formats.tokens([[("fim", "abc def ghi")] * 2000], "eval")) != found, "splits draw apart"


def test_a_tokenizer_without_the_marks_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"data\.format: the tokenizer has no tokens for filling in the middle; looked for <fim_prefix>, <fim-p"
    ):
        marks_of(bpe())
    with pytest.raises(UsageError, match=r"training\.sequence_length: 7 is too short"):
        Fim(Encoder(bpe(MARKS[0])), EOS, rate=1, spm_rate=0, seed=1, room=7, split=False)


CHAT = "messages_column"


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("prompt_completion", {"prompt": "a"}, "completion_column: no column 'completion'; there are: prompt"),
        ("prompt_completion", {"prompt": "a", "completion": " \n"}, "completion_column: completion is empty: there is nothing"),
        ("prompt_completion", {"prompt": None, "completion": "b"}, 'prompt_column: prompt is not text but nothing (null) (a text; ""'),
        ("prompt_completion", {"prompt": "a", "completion": 3}, "completion_column: completion is not text but int"),
        ("chat", {"conversations": []}, f"{CHAT}: no column 'messages'; there are: conversations"),
        ("chat", {"messages": []}, f"{CHAT}: messages is empty (a list such as [{{"),
        ("chat", {"messages": "hello"}, f"{CHAT}: messages is a text that is not JSON"),
        ("chat", {"messages": [{"from": "human", "value": "x"}]}, f"{CHAT}: messages[0] has from, value: role and content are needed"),
        ("chat", {"messages": [{"role": "human", "content": "x"}]}, f"{CHAT}: messages[0].role is 'human' (one of system, user"),
        ("chat", {"messages": [{"role": "user", "content": ["x"]}]}, f"{CHAT}: messages[0].content is not text but list"),
        ("chat", {"messages": [TALK[1], {"role": "assistant", "content": ""}]}, f"{CHAT}: messages[1].content is empty: the assistant"),
        ("chat", {"messages": TALK[:2]}, f"{CHAT}: messages has no turn of the assistant: there is nothing to learn"),
        ("prompt_completion", {"prompt": "a", "completion": "b\ud800"}, "prompt_column: a text with U+D800, half of a character (text"),
        ("chat", {"messages": [{"role": "user", "content": "\udc00"}, TALK[2]]}, f"{CHAT}: a text with U+DC00, half of a character"),
    ],
    ids=[
        "no completion", "empty completion", "no prompt", "completion is a number", "no messages", "empty messages", "messages are text",
        "no role", "wrong role", "content is a list", "empty answer", "no answer", "half a character", "half a character in a talk",
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, format: str, row: Any, message: str) -> None:
    good = {"prompt": "a", "completion": "b"} if format == "prompt_completion" else {"messages": TALK}
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (good, row)))
    with pytest.raises(UsageError) as caught:
        read(path, format)
    assert str(caught.value).startswith(f"{path}:2: data.{message}")


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "d.parquet"
    rows = [{"prompt": "a", "completion": "b", "messages": TALK}, {"prompt": "a", "completion": "", "messages": TALK[:2]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    for format, message in (
        ("prompt_completion", "completion_column: row 2: completion is empty"),
        ("chat", "messages_column: row 2: messages has no"),
    ):
        with pytest.raises(UsageError) as caught:
            read(path, format)
        assert str(caught.value).startswith(f"{path}: data.{message}")


def read(path: Path, format: str) -> Any:
    local = find_local(path, "**/*.py")
    kind: Kind = local.kind
    source = Source({"kind": kind, "root": local.root, "files": list(local.files)}, format, {n: n for n in COLUMNS[format]}, 1, "d", "data")
    return read_documents([source], Selection(None, 1, 0.0, "valid"), path.parent)


def test_a_fetched_data_set_of_conversations(tmp_path: Path) -> None:
    from datasets import Dataset

    def fetched(*rows: Any) -> Source:
        Dataset.from_list([{"messages": row} for row in rows]).save_to_disk(str(tmp_path / "raw/train"))
        where = {"kind": "dataset", "root": str(tmp_path / "raw"), "splits": ["train"]}
        return Source(where, "chat", {"messages": "conversation"}, 1, "some/talks", "data.sources.1")

    found = read_documents([fetched(TALK, TALK[1:3])], Selection(None, 1, 0.0, "valid"), tmp_path)
    talks = [json.loads(text)["messages"] for batch in found.train.documents() for _, text in batch]
    assert sorted(talks, key=len) == [TALK[1:3], TALK]
    with pytest.raises(UsageError) as caught:
        read_documents([fetched(TALK, TALK[:2])], Selection(None, 1, 0.0, "valid"), tmp_path)
    assert str(caught.value).startswith(
        "some/talks (train): data.sources.1.messages_column: row 2: conversation has no turn of the assistant"
    )


def test_source_files_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(
        UsageError, match=r"data\.format: d is source files, which have no columns \(format: text or fim, or JSONL with the col"
    ):
        read(tmp_path, "chat")
