"""Adapters as they are trained: each kind on each family, what is trained and saved, the weights below, resumes to the last bit."""

import json
import logging
from importlib.util import find_spec

import pytest
from training_runs import (
    LORA,
    history,
    load_file,
    make_model,
    make_run,
    rewrite_plan,
    state_of,
    torch,
    train_here,
    train_processes,
)
from transformers import AutoModelForCausalLM

from launcher import base_model, metrics
from launcher.errors import EXIT_STOPPED, RunFailed, UsageError
from launcher.train.adapter import Share, keep_nf4, quantisation, share_of
from launcher.train.assemble import adapter_of_checkpoint
from launcher.train.model import load_model
from launcher.train.ranks import Ranks

pytestmark = pytest.mark.train

CPU = torch.device("cpu")
FAMILIES = ("starcoder2", "gpt_bigcode", "llama")
NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install -e '.[gpu]'")
KINDS = ("lora", "rslora", "dora", pytest.param("qlora", marks=NEEDS_BITSANDBYTES))
SQUARE = {"starcoder2": "q_proj", "gpt_bigcode": "c_fc", "llama": "q_proj"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(root / family, family, dropout=True, tie_word_embeddings=family != "llama") for family in FAMILIES}


def loaded(tmp_path, model, data, adapter, **sections):
    run = make_run(tmp_path / "loaded", model, data, adapter=adapter, **sections)
    return load_model(run.plan(), str(model), Ranks(0, 1, CPU))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_adapter_is_the_uninterrupted_one_to_the_last_bit(tmp_path, models, data, family, kind):
    """With dropout in the model and in the adapter, an evaluation before the stop, and more in between."""
    sections = {"adapter": {**LORA, "kind": kind}, "evaluation": {"every": "2"}, "training": {"learning_rate": 2e-2}}
    whole, cut = (make_run(tmp_path / name, models[family], data, **sections) for name in ("whole", "cut"))
    assert train_here(whole) == 0
    assert train_here(cut, stop_at=3) == EXIT_STOPPED
    assert train_here(cut, life=1) == 0
    assert history(cut) == history(whole) and len(history(whole)) == 8
    assert state_of(cut, 8) == state_of(whole, 8)
    losses = [[record["loss"] for record in metrics.read(run.metrics_file, "eval")] for run in (whole, cut)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0], "it learns"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_of_bf16_moves_every_adapter_and_nothing_else(tmp_path, models, data, family, kind):
    run = make_run(tmp_path / "run", models[family], data, adapter={**LORA, "kind": kind}, training={"dtype": "bf16", "warmup": 0})
    before = load_model(run.plan(), str(models[family]), Ranks(0, 1, CPU))
    first = {name: parameter.detach().clone() for name, parameter in before.named_parameters() if parameter.requires_grad}
    assert train_here(run, stop_at=1) == EXIT_STOPPED
    saved = load_file(run.checkpoint(1) / "model.safetensors")
    assert saved.keys() == first.keys() and {tensor.dtype for tensor in saved.values()} == {torch.float32}
    moved = {name for name in saved if not torch.equal(saved[name], first[name])}
    still = {name for name in saved if "lora_A" in name}  # B is zero in the first step, so A has no gradient yet, only its decay
    assert saved.keys() - still <= moved and all(".lora_" in name for name in saved)


@pytest.mark.parametrize(
    ("kind", "scale"), [("lora", 2.0), ("rslora", 4.0), ("dora", 2.0), pytest.param("qlora", 2.0, marks=NEEDS_BITSANDBYTES)]
)
def test_kinds_are_what_they_are_called(tmp_path, models, data, kind, scale):
    model = loaded(tmp_path, models["llama"], data, {**LORA, "kind": kind})
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    assert layer.scaling["default"] == scale
    assert bool(layer.lora_magnitude_vector) == (kind == "dora")
    weight = layer.get_base_layer().weight
    assert (weight.dtype == torch.uint8) == (kind == "qlora")
    if kind == "qlora":
        assert (weight.quant_state.quant_type, weight.quant_state.nested, weight.numel()) == ("nf4", True, 32 * 32 // 2)
        assert type(model.get_submodule("base_model.model.lm_head")) is torch.nn.Linear
        assert layer.get_base_layer().compute_dtype == torch.float32


def test_chosen_layers_get_an_adapter_and_no_others(tmp_path, models, data):
    model = loaded(tmp_path, models["starcoder2"], data, {**LORA, "targets": ["q_proj", "c_fc"]})
    assert {name.split(".")[-4] for name, parameter in model.named_parameters() if parameter.requires_grad} == {"q_proj", "c_fc"}


@NEEDS_BITSANDBYTES
def test_the_share_is_printed_as_peft_prints_it(tmp_path, models, data, capsys, caplog):
    model = loaded(tmp_path, models["starcoder2"], data, {**LORA, "kind": "qlora"})
    model.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == str(share_of(model))
    run = make_run(tmp_path / "run", models["starcoder2"], data, adapter={**LORA, "kind": "qlora"})
    with caplog.at_level(logging.INFO, "launcher.train"):
        assert train_here(run, stop_at=1) == EXIT_STOPPED
    assert str(share_of(model)) in caplog.messages
    share = share_of(model)
    assert [(event["trained"], event["all"]) for event in run.events("parameters")] == [(share.trained, share.all)]


def test_fastcodes_share():
    """santacoder with rank 8 on c_attn and c_proj."""
    text = "trainable params: 3,588,096 || all params: 1,127,795,712 || trainable%: 0.3182"
    assert str(Share(3_588_096, 1_127_795_712)) == text


def test_modules_that_are_trained_whole(tmp_path, models, data):
    adapter = {**LORA, "modules_to_save": ["lm_head", "norm"]}
    whole, cut = (make_run(tmp_path / name, models["llama"], data, adapter=adapter) for name in ("whole", "cut"))
    assert train_here(whole) == 0
    assert train_here(cut, stop_at=3) == EXIT_STOPPED
    assert train_here(cut, life=1) == 0
    assert history(cut) == history(whole) and state_of(cut, 8) == state_of(whole, 8)
    saved = load_file(whole.checkpoint(8) / "model.safetensors")
    others = {name for name in saved if ".lora_" not in name}
    assert others == {f"base_model.model.{name}.modules_to_save.default.weight" for name in ("lm_head", "model.norm")}, "no other norm"
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        reread = AutoModelForCausalLM.from_pretrained(whole.model).eval()(tokens).logits
        there = load_model(whole.plan(), str(models["llama"]), Ranks(0, 1, CPU)).eval()
        there.load_state_dict(saved, strict=False)
        assert torch.equal(reread, there(tokens).logits)


@pytest.mark.parametrize(
    ("family", "modules", "message"),
    [
        ("starcoder2", ["embed_tokens"], "this model's head is its embedding"),
        ("gpt_bigcode", ["lm_head"], "this model's head is its embedding"),
        ("llama", ["lm_heat"], "the model has no module lm_heat"),
    ],
    ids=["tied embedding", "tied head", "unknown"],
)
def test_modules_to_save_that_cannot_be(tmp_path, models, data, family, modules, message):
    with pytest.raises(UsageError, match=message):
        loaded(tmp_path, models[family], data, {**LORA, "modules_to_save": modules})


@NEEDS_BITSANDBYTES
def test_the_head_of_gpt_bigcode_is_tied_even_in_4_bits(tmp_path, models, data):
    model = loaded(tmp_path, models["gpt_bigcode"], data, {**LORA, "kind": "qlora"})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@NEEDS_BITSANDBYTES
def test_qlora_after_an_evaluation_has_the_same_weights_and_gradients(tmp_path, models, data):
    """bitsandbytes packs weights anew on some CPUs when it is first called for inference, and then gives no gradients."""
    model = loaded(tmp_path, models["starcoder2"], data, {**LORA, "kind": "qlora", "dropout": 0.0})
    tokens = torch.arange(1, 9)[None]

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(tokens)
    model.train()
    after = gradients()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool(gradient.any()) for gradient in before.values())


@NEEDS_BITSANDBYTES
def test_the_base_in_4_bits_is_near_the_base(tmp_path, models):
    tokens = torch.arange(1, 9)[None]
    plain, packed = (
        AutoModelForCausalLM.from_pretrained(models["llama"], **arguments).eval()
        for arguments in ({}, quantisation({"kind": "qlora"}, "fp32"))
    )
    keep_nf4(packed)
    with torch.no_grad():
        one, other = plain(tokens).logits, packed(tokens).logits
    assert 0 < (one - other).abs().max() < 0.05 < one.std()


def test_the_base_is_written_down_and_compared(tmp_path, data):
    model = make_model(tmp_path / "model")
    run = make_run(tmp_path / "run", model, data, adapter=LORA)
    assert train_here(run, stop_at=2) == EXIT_STOPPED
    note = base_model.read_base(run.root)
    assert note == base_model.BaseModel(str(model), "", str(model), base_model.fingerprint(model))
    make_model(tmp_path / "moved")
    rewrite_plan(run, 1, staged={"model": str(tmp_path / "moved")})
    assert train_here(run, life=1, stop_at=4) == EXIT_STOPPED, "the same weights somewhere else"
    make_model(tmp_path / "other", dropout=False, hidden_size=64)
    rewrite_plan(run, 2, staged={"model": str(tmp_path / "other")})
    with pytest.raises(RunFailed, match=r"are not those that this run's adapter is trained on .*base_model\.json says which"):
        train_here(run, life=2)
    assert not (run.root / "model").exists()


def test_weights_that_were_replaced_where_they_lie(tmp_path, data):
    model = make_model(tmp_path / "model")
    run = make_run(tmp_path / "run", model, data, adapter=LORA)
    assert train_here(run, stop_at=2) == EXIT_STOPPED
    tuned = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[3, 4] += 1e-3
    tuned.save_pretrained(model)
    with pytest.raises(RunFailed, match="are not those"):
        train_here(run, life=1)


def test_the_final_adapter_says_what_it_belongs_to(tmp_path, models, data):
    run = make_run(tmp_path / "run", models["starcoder2"], data, adapter={**LORA, "kind": "dora"})
    assert train_here(run) == 0
    assert base_model.read_base(run.model) == base_model.read_base(run.root)
    config = json.loads((run.model / "adapter_config.json").read_text())
    assert (config["use_dora"], config["base_model_name_or_path"]) == (True, str(models["starcoder2"]))


@pytest.mark.parametrize(("kind", "parallelism"), [("qlora", "fsdp"), ("qlora", "device_map"), ("dora", "zero3")])
def test_what_the_planner_refuses_is_not_trained_either(tmp_path, models, data, kind, parallelism):
    run = make_run(tmp_path / "run", models["llama"], data, adapter={**LORA, "kind": kind}, parallelism=parallelism)
    with pytest.raises(UsageError, match=f"parallelism: {kind} with {parallelism}: "):
        train_here(run)


@pytest.mark.parametrize(
    ("kind", "parallelism", "whole"),
    [pytest.param("qlora", "ddp", None, marks=NEEDS_BITSANDBYTES), ("dora", "fsdp", ["lm_head", "norm"])],
    ids=["qlora ddp", "dora fsdp"],
)
def test_two_ranks_train_what_one_does(tmp_path, data, kind, parallelism, whole):
    model = make_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    adapter = {**LORA, "kind": kind, "dropout": 0.0, "modules_to_save": whole}
    one = make_run(tmp_path / "1", model, data, adapter=adapter)
    two = make_run(tmp_path / "2", model, data, adapter=adapter, parallelism=parallelism, ranks=2)
    assert train_here(one) == 0
    assert train_processes(two) == [0, 0], two.rank_log(0, 0).read_text()
    for alone, together in zip(history(one), history(two), strict=True):
        assert alone[2] == pytest.approx(together[2], abs=1e-5) and alone[7] == together[7]
    single, joined = (load_file(run.model / "adapter_model.safetensors") for run in (one, two))
    assert single.keys() == joined.keys()
    parts = adapter_of_checkpoint(two.checkpoint(8))
    assert parts.keys() == joined.keys() and all(torch.equal(parts[name], joined[name]) for name in parts), "what an export reads"
    for name in single:
        torch.testing.assert_close(single[name], joined[name], rtol=0, atol=1e-5)
    assert [event["trained"] for event in one.events("parameters")] == [event["trained"] for event in two.events("parameters")]
