"""Which kind of attention ``auto`` is and why, what forbids a kind, and the old flags' names for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli import options
from launcher.hardware.attention import attention_problems, choose_attention
from launcher.hardware.memory import predict_memory
from launcher.plan import Batch, Layout
from tests.plans import FACTS, GPU, hardware, plan_of, preset, stack

KINDS = ["eager", "sdpa", "flash2", "flash3", "xformers", "flex"]
FULL = {"attention": KINDS, "packages": {"torch": "2.10.0", "transformers": "5.23.0", "xformers": "0.0.35"}}
SOURCE = {
    "attention": ["eager", "sdpa", "flash2", "xformers"],
    "packages": {"torch": "2.3.0", "transformers": "4.41.1", "xformers": "0.0.26.post1"},
}
WINDOW = FACTS.model_copy(update={"sliding_window": 512})
DROPOUT = FACTS.model_copy(update={"dropout": True})
BIGCODE = FACTS.model_copy(update={"architecture": "gpt_bigcode", "kv_heads": 1})


def gpu(capability: str) -> Any:
    return hardware(gpu={**GPU, "compute_capability": capability})


@pytest.mark.parametrize(
    ("wish", "capability", "software", "facts", "expected"),
    [
        ({"gpus": 0}, "9.0", FULL, FACTS, "sdpa: on CPU no other kind is faster and has a backward pass"),
        ({}, "9.0", FULL, FACTS, "flash3: the fastest kernel in the stack that a100 (compute capability 9.0) runs in bf16"),
        ({}, "9.0", FULL, DROPOUT, "flash2: the fastest kernel in the stack that a100 (compute capability 9.0) runs in bf16"),
        ({}, "8.0", FULL, FACTS, "flash2: the fastest kernel in the stack that a100 (compute capability 8.0) runs in bf16"),
        ({}, "10.0", FULL, FACTS, "flash2: the fastest kernel in the stack that a100 (compute capability 10.0) runs in bf16"),
        (
            {"training": {"dtype": "fp32"}},
            "9.0",
            FULL,
            FACTS,
            "sdpa: torch's own kernels for a100 (compute capability 9.0) in fp32; the stack has no faster one",
        ),
        (
            {"training": {"dtype": "fp16"}, "data": {"name": "a/c", "packing": "flatten"}},
            "7.0",
            FULL,
            FACTS,
            "sdpa: torch's own kernels for a100 (compute capability 7.0) in fp16, each document of a row by itself",
        ),
        (
            {},
            "8.0",
            {**FULL, "attention": ["eager", "sdpa", "flex"]},
            WINDOW,
            "flex: rows are longer than the model's window: flex skips what they hide, where sdpa reads a mask of whole rows",
        ),
        (
            {"data": {"name": "a/c", "packing": "documents"}},
            "8.0",
            {**SOURCE, "attention": ["eager", "sdpa"]},
            DROPOUT,
            "sdpa: documents share rows, and the stack has no kernel for a100 (compute capability 8.0) that skips what they hide",
        ),
        (
            {},
            "8.0",
            {**FULL, "attention": ["eager", "sdpa", "xformers"]},
            WINDOW,
            "xformers: rows are longer than the model's window: xformers skips what they hide, where sdpa reads a mask of whole rows",
        ),
        ({"training": {"compile": "layers"}}, "9.0", FULL, FACTS, "sdpa: layers are compiled, which was not tried with other kernels"),
        ({}, "9.0", {**FULL, "attention": ["eager"]}, FACTS, "eager: the stack is without sdpa"),
        (
            {"data": {"name": "a/c", "packing": "flatten"}},
            "8.0",
            SOURCE,
            FACTS,
            "xformers: documents share rows: xformers skips what they hide, where sdpa reads a mask of whole rows",
        ),
        ({"attention": "eager"}, "9.0", FULL, FACTS, "eager: the preset says so"),
    ],
)
def test_auto(wish: dict[str, Any], capability: str, software: dict[str, Any], facts: Any, expected: str) -> None:
    choice = choose_attention(preset(**wish), gpu(capability), stack(**software), facts)
    assert f"{choice.kind}: {choice.why}" == expected
    plan, findings = plan_of(preset(**wish), hardware=gpu(capability), stack=stack(**software), model_facts=facts)
    assert plan.attention == choice.kind
    said = [finding.message for finding in findings if finding.code == "attention-chosen"]
    assert said == ([] if "attention" in wish else [f"auto is {choice.kind}: {choice.why}"])


@pytest.mark.parametrize(
    ("kind", "wish", "capability", "software", "facts", "expected"),
    [
        ("flash3", {}, "8.0", FULL, FACTS, "attention-not-on-gpu: flash3 needs compute capability 9.0, a100 has 8.0 (xformers or sdpa)"),
        (
            "flash3",
            {},
            "10.0",
            FULL,
            FACTS,
            "attention-not-on-gpu: flash3 is for compute capability 9.0 to 9.0, a100 has 10.0 (flash2 or sdpa)",
        ),
        (
            "flash2",
            {},
            "8.0",
            FULL,
            FACTS.model_copy(update={"hidden": 1024, "heads": 2}),
            "attention-head: flash2 takes heads of 8 to 256, multiples of 8, this model's have 512 (sdpa)",
        ),
        (
            "flex",
            {},
            "8.0",
            FULL,
            FACTS.model_copy(update={"heads": 4}),
            "attention-head: flex takes heads of 16 or more, this model's have 8 (sdpa)",
        ),
        ("flex", {}, "8.0", FULL, BIGCODE, "attention-not-in-model: gpt_bigcode has no flex attention in transformers (xformers or sdpa)"),
        (
            "flex",
            {},
            "8.0",
            FULL,
            DROPOUT,
            "attention-not-in-model: flex has no dropout, which this model is trained with (xformers or sdpa)",
        ),
        (
            "flex",
            {"parallelism": "device_map"},
            "8.0",
            FULL,
            FACTS,
            "attention-not-split: flex attention's mask lies on one GPU, device_map has layers on several (xformers or sdpa)",
        ),
        (
            "flex",
            {},
            "8.0",
            SOURCE,
            FACTS,
            "attention-not-in-stack: transformers 4.41.1 has no flex (xformers or sdpa, or a stack with transformers 5)",
        ),
        (
            "flash2",
            {"data": {"name": "a/c", "packing": "flatten"}},
            "8.0",
            SOURCE,
            FACTS,
            "attention-without-borders: flash2 of transformers 4.41.1 knows no borders between the documents of a row "
            "(xformers or sdpa, packing: none, or transformers 5)",
        ),
        (
            "flash2",
            {},
            "8.0",
            SOURCE,
            WINDOW,
            "attention-without-borders: flash2 of transformers 4.41.1 counts a sliding window otherwise than the other kinds "
            "(xformers or sdpa, or transformers 5)",
        ),
        ("flex", {"gpus": 0}, "8.0", FULL, FACTS, "attention-not-on-gpu: flex has no backward pass on CPU (sdpa)"),
    ],
)
def test_refused(kind: str, wish: dict[str, Any], capability: str, software: dict[str, Any], facts: Any, expected: str) -> None:
    found = list(attention_problems(kind, preset(**wish), gpu(capability), stack(**software), facts))
    said = [f"{one.code}: {one.message} ({(one.hint or '').removeprefix('attention: ')})" for one in found]
    assert said == [expected] and {(one.level, one.key) for one in found} == {("error", "attention")}


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flash2", "xformers"])
def test_nothing_forbids_the_sources_kinds_on_their_pins(kind: str) -> None:
    half = preset(training={"dtype": "fp16"}, data={"name": "a/c", "packing": "concatenate"})
    assert list(attention_problems(kind, half, gpu("8.0"), stack(**SOURCE), BIGCODE)) == []


def test_copied_keys_and_values_take_memory_where_a_kernel_wants_them() -> None:
    grouped = FACTS.model_copy(update={"hidden": 2048, "heads": 32, "kv_heads": 4, "intermediate": 8192, "layers": 20})
    layout, batch = Layout(1, 1, 1, 8, 64, 8), Batch(8, (8,), 8, 1)

    def activations(kind: str, facts: Any) -> float:
        return predict_memory(preset(gpus=1), facts, hardware(), layout, batch, kind, stack(**FULL)).parts["activations"]

    assert activations("xformers", grouped) > activations("flash2", grouped)
    assert activations("flex", grouped) == activations("flash2", grouped), "32 heads are a power of 2"
    single = grouped.model_copy(update={"kv_heads": 1})
    assert activations("xformers", single) == activations("flash2", single), "one key for all heads is not copied"


def test_the_page_about_attention_names_every_kind() -> None:
    page = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
    assert all(f"| `{kind}` |" in page for kind in KINDS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "[]"),
        (["--use_flash_attn"], "['attention=flash2']"),
        (["--use_xformer_attn"], "['attention=xformers']"),
        (["--set", "training.epochs=1", "--use-xformer-attn"], "['training.epochs=1', 'attention=xformers']"),
    ],
)
def test_flags_of_fastcode(flags: list[str], expected: str) -> None:
    result = CliRunner().invoke(_program(), flags)
    assert (result.exit_code, result.stdout.strip()) == (0, expected)


def test_both_flags_at_once_are_refused() -> None:
    from launcher.errors import UsageError

    with pytest.raises(UsageError, match="--use_flash_attn and --use_xformer_attn"):
        options.with_attention([], use_flash_attn=True, use_xformer_attn=True)


def _program() -> typer.Typer:
    program = typer.Typer()

    @program.command()
    def command(settings: options.Settings = None, flash: options.UseFlashAttn = False, xformer: options.UseXformerAttn = False) -> None:
        typer.echo(str(options.with_attention(settings, use_flash_attn=flash, use_xformer_attn=xformer)))

    return program
