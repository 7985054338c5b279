"""What ships: every preset reads and plans, its numbers are those of the sources, and the facts of models count up."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Finding
from launcher.plan import Container, Plan
from launcher.planner import make_plan
from launcher.preset.model import ModelFacts, layer_matrices, num_lora_parameters, num_parameters
from launcher.preset.reading import (
    Loaded,
    model_facts,
    read_hardware,
    read_model_facts,
    read_preset,
    read_site,
    read_stack,
    shipped_presets,
)
from launcher.preset.schema import Preset
from launcher.supported import LORA_TARGETS
from tests.conftest import REPOSITORY

PRESETS = REPOSITORY / "presets"
NOWHERE = Path("/nonexistent")
MEMTUNE = ("starcoder2-3b", "starcoder2-7b", "starcoder2-15b")


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (PRESETS / folder).glob("*.yaml"))


def at(name: str) -> Loaded[Preset]:
    return read_preset(str(PRESETS / f"{name}.yaml"))


@cache
def planned(name: str, site: str = "slurm") -> tuple[Plan, tuple[Finding, ...]]:
    preset = at(name).value
    assert isinstance(preset.stack, str)
    plan, findings = make_plan(
        preset,
        read_hardware(preset.hardware, home=NOWHERE).value,
        read_site(site, home=NOWHERE).value,
        read_stack(preset.stack, home=NOWHERE).value,
        container=Container("apptainer"),
        model_facts=model_facts(preset, home=NOWHERE),
    )
    return plan, tuple(findings)


@pytest.mark.parametrize("name", names(""))
def test_preset_reads_and_plans_without_an_error(name: str) -> None:
    plan, findings = planned(name)
    assert [str(finding) for finding in findings if finding.level == "error"] == []
    assert plan.name == name == at(name).value.name
    assert plan.preset["site"] is None, "shipped presets name no site"
    assert plan.disk is not None


@pytest.mark.parametrize("name", names(""))
def test_preset_says_where_its_numbers_come_from(name: str) -> None:
    loaded = at(name)
    assert loaded.text.splitlines()[1].startswith("# ") and loaded.value.description


@pytest.mark.parametrize("name", names("hardware"))
def test_hardware(name: str) -> None:
    hardware = read_hardware(name, home=NOWHERE).value
    assert hardware.name == name and hardware.source
    assert (hardware.gpu is None) == (hardware.gpus == 0)


@pytest.mark.parametrize("name", names("sites"))
def test_site(name: str) -> None:
    site = read_site(name, home=NOWHERE).value
    assert site.name == name and site.source
    assert site.partitions or site.runs is None, "where files lie is a matter of the cluster"


@pytest.mark.parametrize("name", names("models"))
def test_model_facts_count_up(name: str) -> None:
    facts = read_model_facts(name, home=NOWHERE).value
    assert facts.parameters == num_parameters(facts)
    assert facts.linear_layers == list(dict.fromkeys(matrix.name for matrix in layer_matrices(facts)))
    assert facts.name is not None and facts.name.rpartition("/")[2].lower() == name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("starcoder2-3b", 3.030),
        ("starcoder2-7b", 7.174),
        ("starcoder2-15b", 15.958),
        ("gpt_bigcode-santacoder", 1.125),
        ("codellama-7b-hf", 6.739),
    ],
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert round(read_model_facts(name, home=NOWHERE).value.parameters / 1e9, 3) == billions


def test_default_targets_of_lora_are_all_linear_layers() -> None:
    for name in names("models"):
        facts = read_model_facts(name, home=NOWHERE).value
        assert sorted(LORA_TARGETS[facts.architecture]) == sorted(facts.linear_layers)


def test_share_of_lora_is_what_was_measured() -> None:
    facts = read_model_facts("gpt_bigcode-santacoder", home=NOWHERE).value
    shares = [100 * count / (facts.parameters + count) for count in _lora(facts)]
    assert [round(share, 3) for share in shares] == [0.318, 0.491]


def _lora(facts: ModelFacts) -> list[int]:
    return [num_lora_parameters(facts, 8, ["c_attn", "c_proj"]), num_lora_parameters(facts, 8, None)]


@pytest.mark.train
@pytest.mark.parametrize("name", [*names("models"), "tiny", "tiny-gpt_bigcode", "tiny-llama"])
def test_parameters_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test installs it")
    transformers = pytest.importorskip("transformers")
    if name.startswith("tiny"):
        config = dict(at(name).value.model.config or {})
        facts = model_facts(at(name).value, home=NOWHERE)
        assert facts is not None
    else:
        facts = read_model_facts(name, home=NOWHERE).value
        config = _config(facts)
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert sum(weight.numel() for weight in model.parameters()) == facts.parameters


def _config(facts: ModelFacts) -> dict[str, Any]:
    shared = {"model_type": facts.architecture, "vocab_size": facts.vocab, "tie_word_embeddings": facts.tied}
    if facts.architecture == "gpt_bigcode":
        own = {"n_embd": facts.hidden, "n_inner": facts.intermediate, "n_layer": facts.layers, "n_head": facts.heads}
        return {**shared, **own, "n_positions": facts.context}
    own = {"hidden_size": facts.hidden, "intermediate_size": facts.intermediate, "num_hidden_layers": facts.layers}
    heads = {"num_attention_heads": facts.heads, "num_key_value_heads": facts.kv_heads}
    return {**shared, **own, **heads, "max_position_embeddings": facts.context}


@pytest.mark.parametrize(
    ("name", "gpus", "batch", "minutes"),
    [
        ("starcoder2-3b", 2, (24, 8, 3), 25 * 60),
        ("starcoder2-7b", 4, (24, 8, 3), 55 * 60),
        ("starcoder2-15b", 6, (25, 5, 5), 110 * 60),
    ],
)
def test_memtune_as_published(name: str, gpus: int, batch: tuple[int, int, int], minutes: int) -> None:
    plan, findings = planned(name)
    preset = at(name).value
    assert [finding.code for finding in findings if finding.level == "warning"] == ["not-executed-here"], "submit takes it as it is"
    assert (plan.layout.gpus_per_node, plan.world_size, plan.layout.cpus_per_node, plan.layout.memory_per_node_gib) == (gpus, 1, 32, 80)
    assert (plan.batch.effective_batch, plan.batch.micro_batch, plan.batch.micro_steps) == batch
    assert plan.time_limit_min == minutes
    training = preset.training
    assert (training.sequence_length, training.epochs, training.learning_rate, training.warmup) == (1024, 3, 3e-5, 50)
    assert (training.optimizer, training.schedule, training.weight_decay, training.dtype) == ("adafactor", "linear", 0.1, "fp32")
    assert (training.seed, training.max_grad_norm, training.tf32, training.activation_checkpointing) == (42, 1.0, False, "none")
    data = preset.data
    assert (data.name, data.subset, data.text_column) == ("AISE-TUDelft/memtune-tuning_data", "20k", "content")
    assert (data.num_samples, data.packing, data.append_eos) == (20000, "none", False)
    assert (preset.evaluation.every, preset.evaluation.split, preset.evaluation.micro_batch) == ("8%", "valid", batch[1])
    assert (preset.checkpoint.every, preset.checkpoint.keep_epochs, preset.parallelism) == ("epoch", None, "device_map")
    assert (plan.hardware["driver"], plan.hardware["cuda"], plan.stack["packages"]["torch"]) == ("555.42.02", "12.5", "2.3.0")


@pytest.mark.parametrize("name", MEMTUNE)
def test_fast_variant_is_the_same_training(name: str) -> None:
    """It differs in how, not in what: samples, batch, optimizer, schedule."""
    published, fast = at(name).value.model_dump(), at(f"{name}-fast").value.model_dump()
    changed = {key for key in published if published[key] != fast[key]}
    assert changed <= {"name", "description", "data", "training", "attention", "parallelism", "evaluation", "stack", "slurm"}
    assert {key for key in published["training"] if published["training"][key] != fast["training"][key]} <= {
        "dtype",
        "tf32",
        "micro_batch",
        "activation_checkpointing",
    }
    assert {key for key in published["data"] if published["data"][key] != fast["data"][key]} == {"packing"}
    assert (fast["data"]["packing"], fast["training"]["dtype"]) == ("flatten", "bf16")


@pytest.mark.parametrize(
    ("name", "hardware", "attention", "length", "dtype", "checkpointing", "micro", "steps"),
    [
        ("santacoder-v100", "v100-32gb", "xformers", 2048, "fp32", "full", 1, 32),
        ("santacoder-a100-40gb", "a100-40gb", "xformers", 2048, "bf16", "none", 2, 16),
        ("santacoder-a100-40gb-flash", "a100-40gb", "flash2", 2048, "bf16", "none", 2, 16),
        ("santacoder-a100-40gb-default", "a100-40gb", "eager", 2048, "bf16", "full", 2, 16),
        ("santacoder-a100-40gb-1024", "a100-40gb", "xformers", 1024, "bf16", "none", 4, 8),
        ("santacoder-a100-40gb-1024-flash", "a100-40gb", "flash2", 1024, "bf16", "none", 4, 8),
        ("santacoder-a100-40gb-1024-default", "a100-40gb", "eager", 1024, "bf16", "none", 2, 16),
        ("santacoder-a6000", "a6000", "xformers", 2048, "bf16", "none", 4, 8),
        ("santacoder-a100-lora", "a100-40gb", "xformers", 2048, "bf16", "none", 2, 16),
        ("codellama-7b-xformers", "a100-80gb", "xformers", 2048, "bf16", "none", 2, 16),
        ("codellama-7b-flash", "a100-80gb", "flash2", 2048, "bf16", "none", 2, 16),
    ],
)
def test_fastcode_as_published(
    name: str, hardware: str, attention: str, length: int, dtype: str, checkpointing: str, micro: int, steps: int
) -> None:
    plan, training = planned(name)[0], at(name).value.training
    assert (plan.hardware["name"], plan.attention, plan.preset["parallelism"], plan.world_size) == (hardware, attention, "ddp", 8)
    assert (training.sequence_length, training.dtype, training.activation_checkpointing) == (length, dtype, checkpointing)
    assert (plan.batch.effective_batch, plan.batch.micro_batch, plan.batch.micro_steps) == (256, micro, steps)
    assert (training.optimizer, training.learning_rate, training.schedule, training.warmup) == ("adamw", 5e-5, "cosine", 0.03)
    assert (training.weight_decay, training.epochs, training.tf32) == (0, 16, dtype == "bf16")
    evaluation, checkpoint = at(name).value.evaluation, at(name).value.checkpoint
    assert (evaluation.every, evaluation.micro_batch, checkpoint.every, checkpoint.keep) == ("50", 4, "100", 10)
    assert at(name).value.data.packing == "concatenate"


def test_what_the_training_cannot_run_yet_is_said() -> None:
    said = {name for name in shipped_presets() if any(finding.code == "not-executed-yet" for finding in planned(name)[1])}
    assert said == {"codellama-7b-flash", "santacoder-a100-40gb-flash", "santacoder-a100-40gb-1024-flash"}, "no stack has flash-attn"
    assert said == {name for name in shipped_presets() if at(name).value.description.endswith("; not executed yet")}


def test_tiny_is_a_demo() -> None:
    plan, findings = planned("tiny", "local")
    preset = at("tiny").value
    samples = round((preset.data.num_samples or 0) * (1 - preset.data.eval_share))
    assert [finding for finding in findings if finding.level != "advice"] == []
    assert preset.training.epochs >= 2
    assert samples * preset.training.epochs / preset.training.effective_batch >= 100
    assert (plan.world_size, plan.layout.threads_per_rank, plan.time_limit_min) == (1, 2, None)
    assert "num_key_value_heads" in (at("tiny-llama").value.model.config or {})
    assert "hidden_size" not in (at("tiny-gpt_bigcode").value.model.config or {}), "another model_type replaces the whole config"
