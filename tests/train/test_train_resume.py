"""One rank: stop and resume, checkpoints that are torn, what is written when. In this process, without starting ranks."""

import json
import shutil

import pytest
from training_runs import (
    LORA,
    SEQUENCE,
    Dataset,
    history,
    load_file,
    make_data,
    make_model,
    make_run,
    state_of,
    torch,
    train_here,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher import checkpoint, metrics
from launcher.errors import EXIT_STOPPED, RunFailed, UsageError
from launcher.files import write_json
from launcher.run import take_lease
from launcher.train import evaluate, loop
from launcher.train.batches import NO_TARGET, Samples, collate
from launcher.train.stop import Stop

pytestmark = pytest.mark.train

PATHS = {
    "adamw, padded": {},
    "adafactor, flattened, cosine": {
        "data": {"packing": "flatten"},
        "training": {"optimizer": "adafactor", "schedule": "cosine"},
        "attention": "eager",
    },
    "bf16 compute, activation checkpointing": {"training": {"dtype": "bf16", "activation_checkpointing": "full"}},
    "bf16 compute, flattened": {"data": {"packing": "flatten"}, "training": {"dtype": "bf16"}},
    "lora": {"adapter": LORA, "training": {"activation_checkpointing": "full"}},
    "device_map": {"parallelism": "device_map"},
    "single, constant, no clipping": {"parallelism": "single", "training": {"schedule": "constant", "max_grad_norm": 0.0}},
}

PARAMETERS = 64 * 32 + 2 * (32 * (32 + 16 + 16 + 32) + 96 + 2 * 32 * 64 + 96 + 4 * 32) + 64
"""Of the tiny starcoder2: its embedding (the head is the same), two layers with biases and norms, the last norm."""


@pytest.mark.parametrize("sections", PATHS.values(), ids=PATHS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, model, data, sections):
    whole, cut = (make_run(tmp_path / name, model, data, **sections) for name in ("whole", "cut"))
    assert train_here(whole) == 0
    assert train_here(cut, stop_at=3) == EXIT_STOPPED
    assert len(history(cut)) == 3
    assert train_here(cut, life=1) == 0
    assert history(cut) == history(whole) and len(history(whole)) == 8
    assert state_of(cut, 8) == state_of(whole, 8)
    assert history(whole)[-1][2] < history(whole)[0][2], "it learns"


def test_stop_and_end_are_written_down(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "never"})
    assert train_here(run, stop_at=3) == EXIT_STOPPED
    assert train_here(run, life=1) == 0
    events = [{key: event[key] for key in event if key != "time"} for event in run.events()]
    assert events == [
        {"event": "attention", "life": 0, "kind": "sdpa", "layers": 2, "operators": ["math"]},  # its dropout allows nothing else on CPU
        {"event": "parameters", "life": 0, "trained": PARAMETERS, "all": PARAMETERS},
        {"event": "stop_seen", "life": 0, "step": 3},
        {"event": "checkpoint", "life": 0, "step": 3, "reason": "stop"},
        {"event": "attention", "life": 1, "kind": "sdpa", "layers": 2, "operators": ["math"]},
        {"event": "parameters", "life": 1, "trained": PARAMETERS, "all": PARAMETERS},
        {"event": "checkpoint", "life": 1, "step": 8, "reason": "end", "epoch": 1},
    ]
    records = metrics.read(run.metrics_file, "checkpoint")
    assert [(record["step"], record["life"]) for record in records] == [(3, 0), (8, 1)]
    assert records[1]["bytes"] == sum(
        (run.checkpoint(8) / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors", "trainer.json")
    )


def test_a_finished_run_only_writes_its_model_again(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data)
    assert train_here(run) == 0
    shutil.rmtree(run.model)
    lines = run.metrics_file.read_text()
    assert train_here(run, life=1) == 0
    assert run.metrics_file.read_text() == lines
    assert (run.model / "model.safetensors").exists()


def test_a_stop_before_the_first_step_saves_nothing(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data)
    stop = Stop()
    stop.request()
    assert train_here(run, stop=stop) == EXIT_STOPPED
    assert not run.metrics_file.exists() and not list(run.root.glob("checkpoints/*"))


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing file", "manifest gone", "optimizer missing from the manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, model, data, damage):
    whole, run = (make_run(tmp_path / name, model, data, checkpoint={"every": "2"}) for name in ("whole", "run"))
    assert train_here(whole) == 0
    assert train_here(run, stop_at=5) == EXIT_STOPPED
    _damage(run.checkpoint(5), damage)
    assert train_here(run, life=1) == 0
    assert [event["step"] for event in run.events("checkpoint_refused")] == [5]
    assert [folder.name.rpartition("-")[0] for folder in run.checkpoints.glob("refused-*")] == ["refused-step-00000005-1"]
    assert metrics.read(run.metrics_file, "train")[4]["life"] == 1, "step 5 was computed again"
    assert history(run) == history(whole) and state_of(run, 8) == state_of(whole, 8)


def test_without_one_good_checkpoint_it_stops(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "2"})
    assert train_here(run, stop_at=5) == EXIT_STOPPED
    for folder in run.checkpoints.glob("step-*"):
        _damage(folder, "flipped byte")
    with pytest.raises(RunFailed, match=r"no checkpoint in .* is whole: .*SHA-256 differs"):
        train_here(run, life=1)
    assert len(list(run.checkpoints.glob("step-*"))) == 3, "nothing was removed or renamed"


def _damage(folder, damage):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-7])
    elif damage == "missing file":
        file.unlink()
    elif damage == "manifest gone":
        (folder / checkpoint.MANIFEST).unlink()
    else:
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        del manifest["files"]["optimizer.safetensors"]
        write_json(folder / checkpoint.MANIFEST, manifest)


def test_leftovers_of_a_killed_save_are_swept(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data)
    torn = checkpoint.stage_folder(run, 3, 0)
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    no_marker = run.checkpoint(8)
    no_marker.mkdir()
    assert train_here(run, life=1) == 0
    assert not torn.exists()
    assert checkpoint.verify(no_marker) is None


def test_an_older_life_writes_nothing(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data)
    take_lease(run, 4, None)
    with pytest.raises(RunFailed, match="a newer life than 3 owns"):
        train_here(run, life=3)
    assert not run.metrics_file.exists() and not run.model.exists()


def test_a_life_that_becomes_the_older_one_stops_writing(tmp_path, model, data, monkeypatch):
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "1"})
    rate = loop.learning_rate

    def take_over_at_step_4(step, total_steps, training):
        if step == 4:
            take_lease(run, 1, None)
        return rate(step, total_steps, training)

    monkeypatch.setattr(loop, "learning_rate", take_over_at_step_4)
    with pytest.raises(RunFailed, match="a newer life than 0 owns"):
        train_here(run)
    assert [record["step"] for record in metrics.read(run.metrics_file, "train")] == [1, 2, 3]
    assert [manifest.step for manifest in checkpoint.committed(run)] == [1, 2, 3]


def test_checkpoints_by_epoch_stay_and_others_rotate(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, training={"epochs": 2}, checkpoint={"every": "1", "keep": 2})
    assert train_here(run) == 0
    assert [(manifest.step, manifest.epoch, manifest.reason) for manifest in checkpoint.committed(run)] == [
        (8, 1, "steps"),
        (13, None, "steps"),
        (14, None, "steps"),
        (15, 2, "end"),
    ]


def test_checkpoints_by_the_clock_of_rank_0(tmp_path, model, data, monkeypatch):
    clock = iter(range(0, 10_000, 25))  # every look at the clock is 25 s later
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "never", "minutes": 1, "keep": 9})
    assert train_here(run) == 0
    assert [(manifest.step, manifest.reason) for manifest in checkpoint.committed(run)] == [(3, "minutes"), (6, "minutes"), (8, "end")]


def test_the_evaluation_loss_is_that_of_every_sample_by_itself(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, training={"epochs": 2}, evaluation={"every": "50%"})
    assert train_here(run) == 0
    evaluations = metrics.read(run.metrics_file, "eval")
    assert [(record["step"], record["epoch"]) for record in evaluations] == [(8, 64 / 60), (15, 2.0)]
    trained, samples = AutoModelForCausalLM.from_pretrained(run.model).eval(), Samples(data / "eval")
    total, count = 0.0, 0
    for index in range(len(samples)):
        tokens, targets = map(torch.from_numpy, samples.tokens_and_targets(index))
        with torch.no_grad():
            logits = trained(tokens[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=NO_TARGET).item()
        count += int((targets != NO_TARGET).sum())
    assert evaluations[-1]["loss"] == pytest.approx(total / count, abs=1e-6)


def test_evaluation_changes_nothing_in_training(tmp_path, model, data):
    plain, evaluated = (
        make_run(tmp_path / name, model, data, evaluation={"every": every}) for name, every in (("never", "never"), ("each", "1"))
    )
    assert (train_here(plain), train_here(evaluated)) == (0, 0)
    assert history(plain) == history(evaluated)


def test_a_stop_during_evaluation_saves_and_the_next_life_evaluates(tmp_path, model, data, monkeypatch):
    whole, run = (
        make_run(tmp_path / name, model, data, evaluation={"every": "3"}, checkpoint={"every": "never"}) for name in ("whole", "run")
    )
    assert train_here(whole) == 0
    stop = Stop()

    def collate_and_stop(*arguments):
        stop.request()
        return collate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "collate", collate_and_stop)
        assert train_here(run, stop=stop) == EXIT_STOPPED
    assert [(manifest.step, manifest.reason) for manifest in checkpoint.committed(run)] == [(3, "stop")]
    assert metrics.read(run.metrics_file, "eval") == []
    assert train_here(run, life=1) == 0
    losses = [[(record["step"], record["loss"]) for record in metrics.read(each.metrics_file, "eval")] for each in (whole, run)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [3, 6, 8]


def test_the_final_model_loads_with_its_tokenizer(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data)
    assert train_here(run) == 0
    final = dict(AutoModelForCausalLM.from_pretrained(run.model).named_parameters())
    saved = load_file(run.checkpoint(8) / "model.safetensors")
    assert final.keys() == saved.keys()
    assert all(torch.equal(final[name], saved[name]) for name in saved)
    assert AutoTokenizer.from_pretrained(run.model).decode([3]) == "w3"
    assert not list(run.root.glob(".model-*"))


def test_the_adapter_loads_on_its_base(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, adapter=LORA)
    assert train_here(run) == 0
    assert (run.model / "adapter_model.safetensors").exists() and not (run.model / "model.safetensors").exists()
    saved = load_file(run.checkpoint(8) / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert all(bool(saved[name].any()) for name in saved if "lora_B" in name), "every adapter tensor was trained"
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model).eval()(tokens).logits
        adapted = AutoModelForCausalLM.from_pretrained(run.model).eval()(tokens).logits
    assert (base - adapted).abs().max() > 1e-3


def test_blocks_are_trained_without_a_mask(tmp_path, model):
    blocks = make_data(tmp_path / "data", 20, full=True)
    run = make_run(tmp_path / "run", model, blocks, data={"packing": "concatenate"})
    assert train_here(run) == 0
    first, last = (metrics.read(run.metrics_file, "train")[index] for index in (0, -1))
    assert (first["tokens"], first["useful_tokens"]) == (8 * SEQUENCE, 8 * (SEQUENCE - 1))
    assert (last["tokens"], last["useful_tokens"]) == (4 * SEQUENCE, 4 * (SEQUENCE - 1)), "the last step takes what is left"


def test_flatten_computes_no_pads_and_the_same_losses(tmp_path, data):
    model = make_model(tmp_path / "model")
    padded, flat = (make_run(tmp_path / packing, model, data, data={"packing": packing}) for packing in ("none", "flatten"))
    assert (train_here(padded), train_here(flat)) == (0, 0)
    for one, other in zip(metrics.read(padded.metrics_file, "train"), metrics.read(flat.metrics_file, "train"), strict=True):
        assert one["samples_sha"] == other["samples_sha"] and one["useful_tokens"] == other["useful_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        samples = one["tokens"] // SEQUENCE
        assert one["tokens"] == samples * SEQUENCE and other["tokens"] == other["useful_tokens"] + samples


def test_other_data_than_planned_is_refused(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, make_data(tmp_path / "data", 9))
    shutil.rmtree(tmp_path / "data" / "train")
    Dataset.from_dict({"input_ids": [[1, 2]], "num_targets": [1]}).save_to_disk(str(tmp_path / "data" / "train"))
    with pytest.raises(UsageError, match="1 training samples, the plan was made for 9"):
        train_here(run)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, training={"learning_rate": 1e30, "warmup": 0, "max_grad_norm": 0.0})
    with pytest.raises(RunFailed, match=r"step \d+: the loss is nan"):
        train_here(run)
    assert all(record["loss"] == record["loss"] for record in metrics.read(run.metrics_file, "train"))
