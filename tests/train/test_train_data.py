"""From staged formats and packed rows to losses: exact targets, EOS learned, packed documents as if each were alone."""

import json

import pytest
from training_runs import SEQUENCE, VOCABULARY, make_data, make_model, make_run, torch, train_here
from transformers import AutoTokenizer

from launcher import metrics
from launcher.errors import UsageError
from launcher.stage.prepare import prepare
from launcher.stage.random_start import train_tokenizer
from launcher.stage.samples import Sample, Tally, pack, write_samples
from launcher.train.batches import NO_TARGET, Samples, collate

pytestmark = pytest.mark.train

EOS = 0
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def packed(folder, separate, length=SEQUENCE):
    """The same samples as rows of whole documents."""
    (folder / "scratch").mkdir(parents=True)
    samples = (Sample(separate.tokens_and_targets(index)[0].tolist()) for index in range(len(separate)))
    write_samples(pack(samples, length), folder / "train", folder / "scratch", Tally(), lambda: None, packed=True)
    return Samples(folder / "train")


def test_packed_rows(tmp_path):
    separate = Samples(make_data(tmp_path / "separate", 20) / "train")
    rows = packed(tmp_path / "packed", separate)
    batch = collate(rows, [0, 2], "documents", SEQUENCE)
    assert batch.input_ids_BS.shape == batch.targets_BS.shape == batch.position_ids_BS.shape == batch.documents_BS.shape == (2, SEQUENCE)
    assert batch.attention_mask_BS is None and batch.num_tokens == 2 * SEQUENCE
    for b, index in enumerate((0, 2)):
        lengths = rows.lengths(index).tolist()
        pads = SEQUENCE - sum(lengths)
        assert batch.position_ids_BS[b].tolist() == [position for length in (*lengths, pads) for position in range(length)]
        assert batch.documents_BS[b].tolist() == [number for number, length in enumerate((*lengths, pads)) for _ in range(length)]
        lasts = torch.tensor(lengths).cumsum(0) - 1
        assert batch.targets_BS[b, lasts].tolist() == [NO_TARGET] * len(lengths)
        inside = batch.targets_BS[b, : sum(lengths)] != NO_TARGET
        assert int(inside.sum()) == sum(lengths) - len(lengths) == rows.num_targets[index]
        assert bool((batch.targets_BS[b, sum(lengths) :] == NO_TARGET).all())
    assert collate(rows, [], "documents", SEQUENCE).num_tokens == 0
    with pytest.raises(UsageError, match="the preset's sequence_length is 8"):
        collate(rows, [0], "documents", 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_bigcode", "llama"])
def test_training_on_packed_documents_is_training_on_each_alone(tmp_path, model_type, attention):
    """A step holds all documents, so that both ways have the same steps: losses and gradients are equal, then so are the next ones."""
    model = make_model(tmp_path / "model", model_type)
    separate = Samples(make_data(tmp_path / "none", 20) / "train")
    rows = packed(tmp_path / "documents", separate)
    records = {}
    for packing, number in (("none", len(separate)), ("documents", len(rows))):
        training = {"effective_batch": number, "micro_batch": 4, "epochs": 4, "warmup": 0}
        run = make_run(
            tmp_path / f"run-{packing}", model, tmp_path / packing, training=training, attention=attention, data={"packing": packing},
            checkpoint={"every": "never"},
        )  # fmt: skip
        assert train_here(run) == 0
        records[packing] = metrics.read(run.metrics_file, "train")
    for alone, together in zip(records["none"], records["documents"], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert together["useful_tokens"] == alone["useful_tokens"]
    assert records["none"][0]["tokens"] == len(separate) * SEQUENCE
    assert records["documents"][0]["tokens"] == len(rows) * SEQUENCE < 0.8 * len(separate) * SEQUENCE
    assert len({record["loss"] for record in records["documents"]}) == 4, "it learns"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """All bytes; EOS is 0 and also the padding token, as many code models have it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer(iter([["abc"]]), 258)
    made.pad_token = made.eos_token
    made.chat_template = CHATML
    made.save_pretrained(str(folder))
    return folder


@pytest.fixture
def staged(tmp_path, tokenizer):
    """Stage rows as a process of ``ftlaunch stage`` does, and give the samples."""

    def run(rows, format, columns, packing, **changes):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder, scratch = tmp_path / f"{format}-{packing}", tmp_path / f"scratch-{format}-{packing}"
        scratch.mkdir()
        source = {"kind": "records", "root": str(tmp_path), "files": ["d.jsonl"]}
        request = {
            "task": "data", "packing": packing, "sequence_length": SEQUENCE, "long_documents": "cut", "append_eos": True,
            "needs_eval": False,
            "sources": [{"source": source, "format": format, "columns": columns, "weight": 1, "label": "d", "key": "data", "sha": "0"}],
            "selection": {"num_samples": None, "seed": 1, "eval_share": 0.0, "split": "valid"}, "fim": {"rate": 0.5, "spm_rate": 0.5},
            "tokenizer": str(tokenizer), "folder": str(folder), "scratch": str(scratch), **changes,
        }  # fmt: skip
        facts = prepare(request, lambda line: None)
        samples = Samples(folder / "train")
        assert int(samples.num_targets.sum()) == facts["train_targets"]
        return samples

    return run


def learned(samples, packing, tokenizer, length=SEQUENCE):
    """What is learned, as text, in the order of the rows; a new piece after each gap."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    batch = collate(samples, range(len(samples)), packing, length)
    pieces = [[]]
    for targets in batch.targets_BS.tolist():
        for token in (*targets, NO_TARGET):
            if token != NO_TARGET:
                pieces[-1].append(token)
            elif pieces[-1]:
                pieces.append([])
    return [loaded.decode(piece) for piece in pieces if piece]


@pytest.mark.parametrize("packing", ["none", "flatten", "documents"])
def test_eos_is_learned_also_where_it_is_the_padding_token(staged, tokenizer, packing):
    samples = staged([{"content": text} for text in ("abcd", "xyz", "0123456789")], "text", {"text": "content"}, packing)
    assert sorted(learned(samples, packing, tokenizer)) == ["123456789<|endoftext|>", "bcd<|endoftext|>", "yz<|endoftext|>"]
    batch = collate(samples, range(len(samples)), packing, SEQUENCE)
    assert int((batch.targets_BS == EOS).sum()) == 3, "every real EOS, and no pad"


def test_eos_is_learned_between_the_documents_of_a_block(staged):
    samples = staged([{"content": "abcdefghij"}] * 10, "text", {"text": "content"}, "concatenate")
    batch = collate(samples, range(len(samples)), "concatenate", SEQUENCE)
    assert int((batch.targets_BS == EOS).sum()) >= 8


@pytest.mark.parametrize("packing", ["none", "flatten", "documents"])
def test_only_completions_are_targets(staged, tokenizer, packing):
    rows = [{"q": "2+2=", "a": "4"}, {"q": "", "a": "xy"}, {"q": "a" * SEQUENCE, "a": "never"}, {"q": "b" * 20, "a": "cut off"}]
    samples = staged(rows, "prompt_completion", {"prompt": "q", "completion": "a"}, packing)
    assert sorted(learned(samples, packing, tokenizer)) == ["4<|endoftext|>", "cut ", "y<|endoftext|>"]


@pytest.mark.parametrize("packing", ["none", "documents", "concatenate"])
def test_only_answers_are_targets(staged, tokenizer, packing):
    talk = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    samples = staged(rows * 2, "chat", {"messages": "messages"}, packing, sequence_length=80)
    second = {"concatenate": "two<|end|><|endoftext|>"}.get(packing, "two<|end|>")
    found = learned(samples, packing, tokenizer, 80)
    assert found[:2] == ["one<|end|>", second] and set(found) <= {"one<|end|>", second}


def test_rows_without_lengths_hold_one_document(tmp_path):
    samples = Samples(make_data(tmp_path, 4, full=True) / "train")
    batch = collate(samples, [0, 1], "documents", SEQUENCE)
    assert batch.documents_BS.tolist() == [[0] * SEQUENCE] * 2
    assert int(batch.input_ids_BS.max()) < VOCABULARY
