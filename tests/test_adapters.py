"""What is known of adapters before anything is loaded: what they cannot do, and how much they train, counted on real models."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.hardware.adapters import check_adapter
from launcher.hardware.disk import num_trained
from launcher.hardware.memory import predict_memory
from launcher.plan import Container
from launcher.planner import make_plan
from launcher.preset.model import ModelFacts, facts_of_config, num_adapter_parameters
from launcher.preset.reading import read_hardware, read_model_facts, read_stack
from launcher.preset.schema import Lora
from tests.plans import preset, site, stack

FAMILIES: dict[str, dict[str, Any]] = {
    "starcoder2": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 48, "max_position_embeddings": 40, "tie_word_embeddings": False,
    },
    "gpt_bigcode": {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "multi_query": True, "vocab_size": 48, "n_positions": 40},
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 48, "max_position_embeddings": 40, "tie_word_embeddings": False,
    },
}  # fmt: skip
PACKAGES = {"torch": "2.10.0", "transformers": "5.23.0", "accelerate": "1.15.0"}
WHOLE = {
    "starcoder2": ["embed_tokens", "lm_head", "norm", "input_layernorm"],
    "gpt_bigcode": ["wpe", "ln_1", "ln_2", "ln_f"],
    "llama": ["embed_tokens", "lm_head", "post_attention_layernorm"],
}


def facts_of(family: str) -> ModelFacts:
    found = facts_of_config({"model_type": family, **FAMILIES[family]})
    assert found is not None
    return found


def said(adapter: dict[str, Any], facts: ModelFacts | None = None, packages: dict[str, str] | None = None, **changes: Any) -> list[str]:
    wish = preset(adapter=adapter, **changes)
    found = check_adapter(wish, facts, None if packages is None else stack(packages={**PACKAGES, **packages}))
    return [f"{finding.level} {finding}" for finding in found]


@pytest.mark.train
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "with whole modules"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_is_what_is_trained(family: str, kind: str, whole: bool) -> None:
    pytest.importorskip("torch", reason="counts parameters of real models")
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.train.adapter import share_of, with_adapter

    adapter = Lora.model_validate({"kind": kind, "rank": 4, **({"modules_to_save": WHOLE[family]} if whole else {})})
    config = AutoConfig.for_model(family, bos_token_id=0, eos_token_id=0, **FAMILIES[family])
    share = share_of(with_adapter(AutoModelForCausalLM.from_config(config), adapter.model_dump(), 1))
    facts = facts_of(family)
    assert share.trained == num_adapter_parameters(facts, adapter) == num_trained(preset(adapter=adapter.model_dump()), facts)
    assert share.all == facts.parameters + share.trained


def test_fastcodes_share() -> None:
    facts = read_model_facts("gpt_bigcode-santacoder").value
    trained = num_adapter_parameters(facts, Lora(kind="lora", rank=8, targets=["c_attn", "c_proj"]))
    assert f"{100 * trained / (facts.parameters + trained):.3f}" == "0.318", "FastCode's table says 31"


@pytest.mark.parametrize(
    ("adapter", "changes", "expected"),
    [
        ({"kind": "qlora"}, {"parallelism": "fsdp"}, "qlora with fsdp: weights in 4 bits are bytes, which are neither cut over ranks nor"),
        ({"kind": "qlora"}, {"parallelism": "zero2"}, "(parallelism: ddp or single (in 4 bits a model is small), or adapter kind lora)"),
        ({"kind": "qlora"}, {"parallelism": "device_map"}, "layers are split over the GPUs by their size in fp32"),
        ({"kind": "dora"}, {"parallelism": "zero3"}, "dora with zero3: its norms read whole weights"),
    ],
)
def test_kinds_that_cannot_be_sharded(adapter: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    (finding,) = said(adapter, **changes)
    assert finding.startswith("error parallelism: ") and expected in finding


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "qlora"])
def test_every_kind_runs_with_ddp(kind: str) -> None:
    assert said({"kind": kind}, facts_of("llama"), {"peft": "0.11.1"}, parallelism="ddp") == []


@pytest.mark.parametrize(
    ("kind", "packages", "expected"),
    [
        (
            "dora",
            {"peft": "0.8.2"},
            ["error adapter.kind: dora needs peft 0.9.0 or newer, stack s has 0.8.2 (kind: lora or rslora or qlora, "],
        ),
        ("lora", {}, ["error adapter.kind: lora needs peft 0.3.0 or newer, stack s has none (a stack with it, or adapter: none)"]),
        ("rslora", {"peft": "0.11.1"}, []),
    ],
)
def test_kinds_that_a_stacks_peft_lacks(kind: str, packages: dict[str, str], expected: list[str]) -> None:
    found = said({"kind": kind}, None, packages)
    assert len(found) == len(expected) and all(one.startswith(start) for one, start in zip(found, expected))


@pytest.mark.parametrize("name", ["cpu", "torch2.10-cu128", "torch2.3-cu121"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_every_shipped_stack_has_the_kinds_that_need_peft_alone(name: str, kind: str) -> None:
    assert list(check_adapter(preset(adapter={"kind": kind}), None, read_stack(name).value)) == []


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["norms"], "error adapter.modules_to_save: the model has no module norms (did you mean norm?)"),
        (
            ["embed_tokens"],
            "error adapter.modules_to_save: embed_tokens: this model's head is its embedding, and a copy of one would no longer",
        ),
    ],
)
def test_modules_to_save(modules: list[str], expected: str) -> None:
    tied = facts_of("starcoder2").model_copy(update={"tied": True})
    (finding,) = said({"kind": "lora", "modules_to_save": modules}, tied)
    assert finding.startswith(expected)
    assert said({"kind": "lora", "modules_to_save": ["norm"]}, tied) == []


def gib(adapter: dict[str, Any], part: str, **training: Any) -> float:
    """Of a 7B on one A100."""
    wish = preset(adapter=adapter, parallelism="single", gpus=1, training={"sequence_length": 1024, "dtype": "bf16", **training})
    facts, node = read_model_facts("codellama-7b-hf").value, read_hardware("a100-80gb").value
    plan, _ = make_plan(wish, node, site(), None, container=Container("none"))
    return predict_memory(wish, facts, node, plan.layout, plan.batch, "sdpa").parts[part]


SHORT = {"sequence_length": 64, "micro_batch": 1, "activation_checkpointing": "full"}
"""Little but the weights."""


def test_memory_of_whole_modules() -> None:
    """CodeLlama's head is 32016 × 4096, 0.489 GiB in fp32: a copy, its gradient, two moments and the update's temporary."""
    lora: dict[str, Any] = {"kind": "lora"}
    head = {"kind": "lora", "modules_to_save": ["lm_head"]}
    grown = {part: gib(head, part, **SHORT) - gib(lora, part, **SHORT) for part in ("weights", "gradients", "optimizer")}
    assert sum(grown.values()) == pytest.approx(0.489 * 5, rel=0.1)


def test_qlora_keeps_no_16_bit_copies_of_its_weights() -> None:
    """6.5 × 10⁹ weights in decoder layers: 24 GiB, and 12 GiB of copies which LoRA's graph keeps under autocast; in 4 bits 3.1."""
    full, packed = gib({"kind": "lora"}, "weights"), gib({"kind": "qlora"}, "weights")
    assert full - packed > 30 and packed < 6


def test_doras_norms_take_memory_while_they_are_computed() -> None:
    norms = gib({"kind": "dora"}, "activations", **SHORT) - gib({"kind": "lora"}, "activations", **SHORT)
    assert norms == pytest.approx(4 * (11008**2 + 3 * 4096 * 11008) / 2**30, rel=0.1)
