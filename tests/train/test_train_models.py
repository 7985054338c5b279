"""Models as they are trained: separate documents in one row, the split over GPUs, adapters."""

import contextlib
from types import SimpleNamespace

import pytest
from training_runs import LORA, SEQUENCE, VOCABULARY, make_data, make_model, make_run, torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import GateError, UsageError
from launcher.supported import TOKENIZER_FILES
from launcher.train import borders as borders_module
from launcher.train import final
from launcher.train.batches import Samples, collate
from launcher.train.borders import borders, form_for, require_borders
from launcher.train.model import load_model
from launcher.train.ranks import Ranks
from launcher.train.split import device_split, weight_budget

pytestmark = pytest.mark.train

CPU = torch.device("cpu")


def check_flattened_logits(folder, model_type, attention):
    """The logits of documents in one row are those of each document alone. Also called on the source's stack."""
    samples = Samples(make_data(folder / "data", 12) / "train")
    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "model", model_type), attn_implementation=attention).eval()
    form = form_for(model_type, attention)
    require_borders(model, form, CPU)
    batch = collate(samples, [1, 4, 2, 7], "flatten", SEQUENCE)
    with torch.no_grad():
        with borders(model, form, batch.documents_BS, None, tuple(batch.input_ids_BS.shape)) as arguments:
            together = model(batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False, **arguments).logits[0]
        alone = [model(torch.from_numpy(samples.tokens_and_targets(index)[0])[None], use_cache=False).logits[0] for index in (1, 4, 2, 7)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_bigcode", "llama"])
def test_flattened_documents_do_not_see_each_other(tmp_path, model_type, attention):
    check_flattened_logits(tmp_path, model_type, attention)


def test_a_model_that_lets_documents_mix_is_refused(tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    monkeypatch.setattr(borders_module, "borders", lambda *_: contextlib.nullcontext({"attention_mask": torch.ones(1, 12)}))
    with pytest.raises(GateError, match="does not keep the documents of a row apart"):
        require_borders(model, "additive", CPU)


def starcoder2_15b():
    return AutoConfig.for_model(
        "starcoder2",
        hidden_size=6144,
        num_hidden_layers=40,
        num_attention_heads=48,
        num_key_value_heads=4,
        intermediate_size=24576,
        vocab_size=49152,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )


def test_15b_over_six_80_gb_gpus():
    budget = weight_budget(80e9, "adafactor", adapter=False)
    split = device_split(starcoder2_15b(), dict.fromkeys(range(6), budget))
    layers = [split[f"model.layers.{layer}"] for layer in range(40)]
    assert layers == sorted(layers), "the layers of a GPU are neighbours"
    assert set(split.values()) == {0, 1, 2, 3, 4, 5}, "nothing on CPU or disk, no GPU idle"
    assert split["model.embed_tokens"] == 0 and split["lm_head"] == 5
    layer_bytes = 4 * (6144 * (48 + 2 * 4) * 128 + 48 * 128 * 6144 + 2 * 6144 * 24576)
    assert max(layers.count(gpu) for gpu in range(6)) * layer_bytes < budget


def test_15b_with_adamw_does_not_fit_four_40_gb_gpus():
    with pytest.raises(GateError, match="modules find no room on 4 GPUs"):
        device_split(starcoder2_15b(), dict.fromkeys(range(4), weight_budget(40e9, "adamw", adapter=False)))


@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_bigcode", "llama"])
def test_default_lora_targets_train_adapters_only(tmp_path, model_type):
    model_folder = make_model(tmp_path / "model", model_type)
    run = make_run(tmp_path / "run", model_folder, make_data(tmp_path / "data", 4), adapter=LORA)
    model = load_model(run.plan(), str(model_folder), Ranks(0, 1, CPU))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    linear = [name for name, module in model.named_modules() if "Linear" in type(module).__name__ or type(module).__name__ == "Conv1D"]
    targets = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    layers = {name.split(".")[-1] for name in linear if ".layers." in name or ".h." in name} - {"base_layer", "default"}
    assert trained and all("lora_" in name for name in trained)
    assert targets == layers, "every linear layer of a block has an adapter"


def test_lora_targets_that_the_model_lacks(tmp_path):
    model_folder = make_model(tmp_path / "model")
    run = make_run(tmp_path / "run", model_folder, make_data(tmp_path / "data", 4), adapter={**LORA, "targets": ["c_attn"]})
    with pytest.raises(UsageError, match=r"adapter\.targets"):
        load_model(run.plan(), str(model_folder), Ranks(0, 1, CPU))


def test_every_tokenizer_file_that_staging_takes_is_beside_the_final_model(tmp_path):
    class Saved:
        def save_pretrained(self, folder):
            folder.mkdir()

    (tmp_path / "staged").mkdir()
    for name in TOKENIZER_FILES:
        (tmp_path / "staged" / name).write_text(name)
    run = make_run(tmp_path / "run", tmp_path / "staged", make_data(tmp_path / "data", 4))
    final._write(run, 0, SimpleNamespace(model=Saved(), sharded=False), tmp_path / "staged", adapter=False)
    assert sorted(path.name for path in run.model.iterdir()) == sorted(TOKENIZER_FILES) and "spiece.model" in TOKENIZER_FILES


def test_longer_than_the_models_positions(tmp_path):
    model_folder = make_model(tmp_path / "model", max_position_embeddings=16)
    run = make_run(tmp_path / "run", model_folder, make_data(tmp_path / "data", 4))
    with pytest.raises(UsageError, match="24 is longer than the model's 16 positions"):
        load_model(run.plan(), str(model_folder), Ranks(0, 1, CPU))


def test_the_model_is_trained_in_fp32_whatever_it_was_saved_in(tmp_path):
    model_folder = make_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model_folder).to(torch.bfloat16).save_pretrained(model_folder)
    run = make_run(tmp_path / "run", model_folder, make_data(tmp_path / "data", 4), training={"dtype": "bf16"})
    model = load_model(run.plan(), str(model_folder), Ranks(0, 1, CPU))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == VOCABULARY
