"""What becomes of documents: read, chosen, tokenised, cut or concatenated. In this process, with the real libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.stage.documents import Selection, Source, Split, read_documents
from launcher.stage.formats import COLUMNS
from launcher.stage.samples import Tally, concatenate, cut
from launcher.stage.sources import find_local
from launcher.stage.tokens import Tokens

pytestmark = pytest.mark.train

EOS, LENGTH = 0, 16


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bytes and a few merges; EOS is 0."""
    from launcher.stage.random_start import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter([["def f(x):\n    return x\n"] * 10]), 270).save_pretrained(str(folder))
    return folder


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    def run(path: Path, **changes: Any) -> tuple[dict[str, Any], Path]:
        from launcher.stage.prepare import prepare

        selection = {"num_samples": None, "seed": 7, "eval_share": 0.0, "split": "valid"}
        selection.update({name: changes.pop(name) for name in list(changes) if name in selection})
        request: dict[str, Any] = {
            "task": "data",
            "sources": [{**asdict(source_of(path, changes.pop("format", "text"))), "sha": None}],
            "selection": selection,
            "packing": "none",
            "sequence_length": LENGTH,
            "long_documents": "cut",
            "append_eos": True,
            "fim": {"rate": 0.5, "spm_rate": 0.5},
            "needs_eval": False,
            "tokenizer": str(tokenizer),
            "folder": str(tmp_path / "out"),
            "scratch": str(tmp_path / "scratch"),
        }
        (tmp_path / "scratch").mkdir(exist_ok=True)
        return prepare({**request, **changes}, lambda line: None), tmp_path / "out"

    return run


def source_of(path: Path, format: str = "text", weight: float = 1.0, key: str = "data", column: str = "content") -> Source:
    local = find_local(path, "**/*.py")
    columns = {"text": column} if format in ("text", "fim") else {name: name for name in COLUMNS[format]}
    return Source({"kind": local.kind, "root": local.root, "files": list(local.files)}, format, columns, weight, path.name, key)


def jsonl(path: Path, contents: list[Any], column: str = "content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": number, column: text}) + "\n" for number, text in enumerate(contents)))
    return path


def samples_of(folder: Path) -> list[list[int]]:
    from datasets import load_from_disk

    data = load_from_disk(str(folder))
    assert data["num_targets"][:] == [len(sample) - 1 for sample in data["input_ids"]]
    assert str(data.features["input_ids"].feature.dtype) == "int32"
    return list(data["input_ids"])


def decoded(tokenizer: Path, samples: list[list[int]]) -> list[str]:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    return [loaded.decode(sample) for sample in samples]


def test_samples_are_the_documents_with_eos_where_not_cut(prepared: Any, tmp_path: Path, tokenizer: Path) -> None:
    long = "".join(chr(ord("A") + number % 26) for number in range(40))
    facts, out = prepared(jsonl(tmp_path / "d.jsonl", ["ab", long, "a" + "é€😀\r\n\t"]))
    found = decoded(tokenizer, samples_of(out / "train"))
    assert sorted(found) == sorted(["ab<|endoftext|>", long[:LENGTH], "aé€😀\r\n\t<|endoftext|>"])
    assert (facts["train_samples"], facts["eval_samples"]) == (3, 0)
    assert facts["cut_share"] == pytest.approx((41 - LENGTH) / (3 + 41 + facts["train"]["tokens"] - 44))
    assert not (out / "eval").exists()
    assert sum(facts["length_histogram"]["counts"]) == 3


def test_append_eos_false_adds_none(prepared: Any, tmp_path: Path) -> None:
    _, out = prepared(jsonl(tmp_path / "d.jsonl", ["abc", "xyz"]), append_eos=False)
    assert not [sample for sample in samples_of(out / "train") if EOS in sample]


def test_documents_without_a_target_are_dropped_and_counted(prepared: Any, tmp_path: Path) -> None:
    facts, out = prepared(jsonl(tmp_path / "d.jsonl", ["Q", "  \n", "", None, "ok then"]), append_eos=False)
    assert len(samples_of(out / "train")) == facts["train_samples"] == 1
    assert facts["dropped"]["empty"] == 3
    assert facts["train"]["short_samples"] == 1


def test_concatenate_gives_exact_blocks_of_one_stream(prepared: Any, tmp_path: Path, tokenizer: Path) -> None:
    contents = [letter * (3 + 5 * number) for number, letter in enumerate("ABCDEFGHIJ")]
    facts, out = prepared(jsonl(tmp_path / "d.jsonl", contents), packing="concatenate")
    samples = samples_of(out / "train")
    assert {len(sample) for sample in samples} == {LENGTH}
    total = facts["train"]["tokens"]
    assert (facts["train_samples"], facts["train"]["remainder_tokens"]) == divmod(total, LENGTH)
    assert facts["train_targets"] == len(samples) * (LENGTH - 1)
    assert facts["cut_share"] == 0
    stream = "".join(decoded(tokenizer, [[token for sample in samples for token in sample]])).split("<|endoftext|>")
    assert len(stream) >= 8
    assert set(stream[:-1]) <= set(contents), "whole documents between EOS"
    assert any(text.startswith(stream[-1]) for text in contents)


@pytest.mark.parametrize("lengths", [[], [0], [3], [4], [1, 1, 1], [9, 1, 30, 2], [3, 3, 3, 3]], ids=str)
def test_concatenate_keeps_every_token_but_the_remainder(lengths: list[int]) -> None:
    documents = [[10 * number + 1] * length for number, length in enumerate(lengths)]
    tally = Tally()
    blocks = [block.ids for block in concatenate(map(Tokens, documents), 4, EOS, tally)]
    stream = [token for document in documents for token in [*document, EOS]]
    assert [token for block in blocks for token in block] == stream[: len(stream) // 4 * 4]
    assert tally.remainder_tokens == len(stream) % 4
    assert tally.tokens == len(stream)


@pytest.mark.parametrize(
    ("length", "sample", "cut_tokens"),
    [(2, [1, 1, EOS], 0), (3, [1, 1, 1, EOS], 0), (4, [1, 1, 1, 1], 1), (9, [1, 1, 1, 1], 6)],
    ids=["short", "with room for EOS", "EOS is cut", "cut"],
)
def test_cut(length: int, sample: list[int], cut_tokens: int) -> None:
    tally = Tally()
    assert [found.ids for found in cut([Tokens([1] * length, end=EOS)], 4, tally)] == [sample]
    assert tally.cut_tokens == cut_tokens


def contents_of(path: Path, tmp_path: Path, column: str = "content", **changes: Any) -> tuple[list[str], list[str], Any]:
    selection = Selection(**{"num_samples": None, "seed": 1, "eval_share": 0.0, "split": "valid", **changes})
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    found = read_documents([source_of(path, column=column)], selection, scratch)
    return texts(found.train), texts(found.eval), found.dropped


def texts(split: Split) -> list[str]:
    return [text for batch in split.documents() for _, text in batch]


def test_the_choice_goes_by_seed_and_number(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [f"text {number}" for number in range(3000)])
    whole, _, _ = contents_of(path, tmp_path)
    assert sorted(whole) == sorted(f"text {number}" for number in range(3000))
    assert contents_of(path, tmp_path)[0] == whole
    assert contents_of(path, tmp_path, num_samples=10)[0] == whole[:10]
    assert contents_of(path, tmp_path, seed=2)[0] != whole


def test_the_held_out_share_is_apart_from_the_rest(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [f"text {number}" for number in range(50)])
    train, evaluation, _ = contents_of(path, tmp_path, num_samples=40, eval_share=0.1)
    assert (len(train), len(evaluation)) == (36, 4)
    assert not set(train) & set(evaluation)
    assert train + evaluation == contents_of(path, tmp_path, num_samples=40)[0]


@pytest.mark.parametrize("names", [("train.jsonl", "valid.jsonl"), ("train/a.jsonl", "valid/a.jsonl")], ids=["files", "folders"])
def test_a_split_of_that_name_is_the_evaluation(tmp_path: Path, names: tuple[str, str]) -> None:
    jsonl(tmp_path / "data" / names[0], ["t1", "t2", "t3"])
    jsonl(tmp_path / "data" / names[1], ["v1", "v2"])
    train, evaluation, _ = contents_of(tmp_path / "data", tmp_path, num_samples=2, eval_share=0.5)
    assert len(train) == 2
    assert evaluation == ["v1", "v2"]
    assert sorted(contents_of(tmp_path / "data", tmp_path, split="other")[0]) == ["t1", "t2", "t3", "v1", "v2"]


def test_parquet_and_jsonl_give_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [f"text {number} é" for number in range(20)] + [None]
    path = jsonl(tmp_path / "d.jsonl", contents)
    pq.write_table(pa.table({"other": list(range(21)), "content": contents}), tmp_path / "d.parquet", row_group_size=7)
    assert contents_of(tmp_path / "d.parquet", tmp_path)[0] == contents_of(path, tmp_path)[0]


def test_source_files_that_are_not_utf8_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    (folder / "package").mkdir(parents=True)
    (folder / "a.py").write_bytes(b"a = 1\r\n")
    (folder / "package" / "b.py").write_text("b = 2\n")
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nä = 1".encode("latin-1"))
    (folder / "empty.py").write_text("\n")
    train, _, dropped = contents_of(folder, tmp_path)
    assert sorted(train) == ["a = 1\r\n", "b = 2\n"]
    assert (dropped.empty, dropped.invalid_utf8, dropped.names) == (1, 1, ["latin.py"])


@pytest.mark.parametrize(
    ("content", "line", "key", "message"),
    [
        pytest.param(b'{"text": "a", "id": 1}\n', 1, "data.text_column", "no column 'content'; there are: id, text", id="no such column"),
        pytest.param(b'{"content": "a"}\n\n{"content": 3}\n', 3, "data.text_column", "content is not text but int", id="no text"),
        pytest.param(b'{"content": "a"}\n{"content": "\xff"}\n', 2, "data.path", r"not UTF-8 \(byte 14 of the line\)", id="not UTF-8"),
        pytest.param(b'{"content": "a"}\n{"content"\n', 2, "data.path", "is not JSON", id="not JSON"),
        pytest.param(b'["content"]\n', 1, "data.path", "not a JSON object", id="no object"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path: Path, content: bytes, line: int, key: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        contents_of(path, tmp_path)
    finding = caught.value.findings[0]
    assert (finding.file, finding.line, finding.key) == (str(path), line, key)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match=r"d\.parquet: data\.path: is no readable Parquet file"):
        contents_of(path, tmp_path)
    pq.write_table(pa.table({"content": [1, 2]}), path)
    with pytest.raises(UsageError, match="content is not text but int64"):
        contents_of(path, tmp_path)
    with pytest.raises(UsageError, match=r"no column 'code'; there are: content"):
        contents_of(path, tmp_path, column="code")


def test_nothing_left_is_an_error(prepared: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training document is left"):
        prepared(jsonl(tmp_path / "d.jsonl", ["", "  "]))


def test_an_evaluation_needs_data(prepared: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split 'valid'") as caught:
        prepared(jsonl(tmp_path / "d.jsonl", ["abc"] * 5), needs_eval=True)
    assert caught.value.findings[0].key == "data.eval_share"
    assert not (tmp_path / "out").exists(), "said before the work"


CONFIGS: dict[str, dict[str, Any]] = {
    "starcoder2": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "rope_theta": 5e5},
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_random_start_is_its_seed_and_loads(model_type: str, tmp_path: Path, tokenizer: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from launcher.stage.random_start import model_config, save_model
    from launcher.stage.sources import check_model

    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    files = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        save_model(model_config({"model_type": model_type, "vocab_size": 270, **CONFIGS[model_type]}), loaded, seed, tmp_path / name)
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["one"] == files["again"] != files["two"]
    check_model(tmp_path / "one", "model.path")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "one"), local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.eos_token_id, model.config.pad_token_id) == (loaded.eos_token_id, loaded.pad_token_id)
    assert loaded.eos_token_id != loaded.pad_token_id
    if model_type == "llama":
        theta = getattr(model.config, "rope_theta", None) or model.config.rope_parameters["rope_theta"]
        assert theta == 5e5


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        pytest.param(
            {"model_type": "starcoder3"}, "model.config.model_type", r"no model type.*did you mean starcoder2\?", id="unknown type"
        ),
        pytest.param(
            {"model_type": "llama", "hiden_size": 32},
            "model.config.hiden_size",
            r"no argument.*did you mean hidden_size\?",
            id="unknown argument",
        ),
        pytest.param({"model_type": "llama", "vocab_size": 100}, "model.config.vocab_size", "100 is too small", id="small vocabulary"),
    ],
)
def test_a_wrong_config_is_said(config: dict[str, Any], key: str, message: str) -> None:
    from launcher.stage.random_start import model_config

    with pytest.raises(UsageError, match=message) as caught:
        model_config(config)
    assert caught.value.findings[0].key == key
