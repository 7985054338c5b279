"""What of compilation, fused kernels, pure bf16 and both kinds of checkpoints is refused where, and what the planner counts of it."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.hardware.host import page_locked_share, predict_host
from launcher.hardware.memory import largest_micro_batch, predict_memory
from launcher.hardware.step import step_parts
from launcher.plan import Batch, Container, Layout, sizes
from launcher.preset.model import ModelFacts, layer_matrices, outer_matrices
from launcher.preset.reading import read_hardware, read_model_facts
from launcher.preset.schema import Preset
from tests.plans import GPU, STAGED, hardware, plan_of, preset, stack

OLD = {"torch": "2.3.0", "transformers": "4.41.1"}
CPU: dict[str, Any] = {"hardware": hardware(gpus=0, gpu=None)}
KERNELS = stack(
    packages={"torch": "2.10.0", "transformers": "5.23.0", "liger-kernel": "0.8.5", "bitsandbytes": "0.50.2"},
    debian_packages=["gcc", "g++"],
    parallelism=["single", "ddp", "fsdp", "device_map", "zero3"],
)
NEW_CODES = {
    "cross-entropy-not-on-gpu", "library-missing", "optimizer-not-in-stack", "optimizer-not-sharded", "dtype-not-sharded",
    "checkpointing-not-in-stack", "compile-not-in-stack", "compile-not-with", "bf16-pure",
}  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "changes", "expected"),
    [
        (
            {"training": {"cross_entropy": "fused"}, "gpus": 0},
            CPU,
            "cross-entropy-not-on-gpu: training.cross_entropy: fused is a kernel for GPUs (cross_entropy: chunked)",
        ),
        (
            {"training": {"cross_entropy": "fused", "dtype": "fp32"}},
            {"hardware": hardware(gpu={**GPU, "kind": "p100", "compute_capability": "6.0"})},
            "cross-entropy-not-on-gpu: training.cross_entropy: fused needs compute capability 7.0, p100 has 6.0 (cross_entropy: chunked)",
        ),
        (
            {"training": {"cross_entropy": "fused"}},
            {"stack": stack()},
            "library-missing: training.cross_entropy: fused needs liger-kernel, which stack s is without (cross_entropy: chunked)",
        ),
        (
            {"training": {"optimizer": "adamw_fused"}, "gpus": 0},
            {**CPU, "stack": stack(packages=OLD, cuda=None)},
            "optimizer-not-in-stack: training.optimizer: AdamW has a fused kernel for CPU since torch 2.4, the stack has 2.3.0 "
            "(optimizer: adamw)",
        ),
        (
            {"training": {"optimizer": "adamw_8bit"}, "parallelism": "zero3"},
            {},
            "optimizer-not-sharded: training.optimizer: bitsandbytes' 8-bit AdamW knows whole tensors only, zero3 shards them "
            "(optimizer: adamw, whose state is sharded)",
        ),
        (
            {"training": {"dtype": "bf16_pure"}, "parallelism": "fsdp"},
            {},
            "dtype-not-sharded: training.dtype: weights in bf16 are rounded stochastically, which fsdp's shards are not "
            "(dtype: bf16, whose fp32 weights are sharded)",
        ),
        (
            {"training": {"dtype": "bf16_pure"}},
            {},
            "bf16-pure: training.dtype: weights keep 8 bits: updates are rounded stochastically, right on average but noisy, and "
            "gradients of 2 micro steps are added up in bf16 (dtype: bf16 where it fits)",
        ),
        (
            {"training": {"activation_checkpointing": "selective"}},
            {"stack": stack(packages=OLD)},
            "checkpointing-not-in-stack: training.activation_checkpointing: selective needs torch 2.4, the stack has 2.3.0 "
            "(activation_checkpointing: full)",
        ),
        (
            {"training": {"compile": "layers"}},
            {"stack": stack(packages=OLD, debian_packages=["gcc"])},
            "compile-not-in-stack: training.compile: compile needs torch 2.7, the stack has 2.3.0 (compile: none)",
        ),
        (
            {"training": {"compile": "layers"}},
            {"stack": stack()},
            "compile-not-in-stack: training.compile: torch.compile calls gcc, which stack s is without "
            "(debian_packages with gcc, or compile: none)",
        ),
        (
            {"training": {"compile": "layers", "activation_checkpointing": "selective"}},
            {},
            "compile-not-with: training.compile: layers are not compiled with selective checkpointing (compile: none)",
        ),
        (
            {"training": {"compile": "layers"}, "parallelism": "fsdp"},
            {},
            "compile-not-with: training.compile: layers are not compiled with parallelism fsdp (compile: none)",
        ),
    ],
    ids=[
        "fused on CPU", "fused on an old GPU", "fused without liger", "fused adamw on CPU", "8-bit sharded", "pure sharded", "pure",
        "selective", "old compile", "no compiler", "compile with selective", "compile with fsdp",
    ],
)  # fmt: skip
def test_said(wish: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    findings = plan_of(preset(**wish), **{"stack": KERNELS, **changes})[1]
    assert [f"{finding.code}: {finding}" for finding in findings if finding.code in NEW_CODES] == [expected]


@pytest.mark.parametrize(
    ("wish", "changes"),
    [
        ({"training": {"cross_entropy": "fused", "compile": "layers", "optimizer": "adamw_fused"}}, {}),
        ({"training": {"cross_entropy": "chunked", "activation_checkpointing": "selective", "optimizer": "adamw_8bit"}}, {}),
        ({"training": {"compile": "layers"}}, {"stack": stack(), "container": Container("none")}),
        ({"training": {"cross_entropy": "chunked", "optimizer": "adamw_fused"}}, {"stack": stack(packages=OLD)}),
    ],
    ids=["all for GPUs", "small", "this machine's own compiler", "old stack"],
)
def test_nothing_to_say(wish: dict[str, Any], changes: dict[str, Any]) -> None:
    findings = plan_of(preset(**wish), **{"stack": KERNELS, **changes})[1]
    assert not [finding for finding in findings if finding.code in NEW_CODES]


# --- what is counted


def three_b(**changes: Any) -> tuple[Preset, ModelFacts]:
    training = {"sequence_length": 2048, "effective_batch": 64, "micro_batch": 4, "learning_rate": 1e-5, **changes.pop("training", {})}
    return preset(hardware="h200", gpus=1, training=training, **changes), read_model_facts("starcoder2-3b").value


def step_of(**changes: Any) -> dict[str, float]:
    wish, facts = three_b(**changes)
    node = read_hardware("h200").value
    batch = Batch(64, (64,), 4, 16)
    return vars(step_parts(wish, facts, node, Layout(1, 1, 1, node.cpus, node.memory_gib, 8), batch, "sdpa"))


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize(
    "training",
    [{}, {"dtype": "fp32"}, {"activation_checkpointing": "selective"}, {"cross_entropy": "chunked", "optimizer": "adamw_8bit"}],
    ids=["bf16", "fp32", "selective", "chunked, 8-bit"],
)
def test_auto_is_the_largest_micro_batch_that_fits(length: int, training: dict[str, Any]) -> None:
    wish, facts = three_b(training={**training, "sequence_length": length, "micro_batch": "auto"})
    node = read_hardware("h200").value
    layout = Layout(1, 1, 1, node.cpus, node.memory_gib, 8)

    def fits(micro_batch: int) -> bool:
        return predict_memory(wish, facts, node, layout, Batch(64, (64,), micro_batch, -(-64 // micro_batch)), "sdpa").fits

    largest = largest_micro_batch(wish, facts, node, layout, (64,), "sdpa")
    assert largest == max(filter(fits, range(1, 65)), default=None)
    if largest is None:
        return
    batch = plan_of(wish, hardware=node, stack=KERNELS, model_facts=facts, staged=STAGED)[0].batch
    assert fits(batch.micro_batch) and batch.micro_batch <= largest and sum(sizes(64, batch.micro_steps)) == 64
    assert batch.micro_steps == -(-64 // largest), "in as few micro steps as that allows"


def test_selective_lies_between_none_and_full_in_memory_and_time() -> None:
    memory, times = [], []
    for kind in ("full", "selective", "none"):
        wish, facts = three_b(training={"activation_checkpointing": kind})
        node = read_hardware("h200").value
        layout = Layout(1, 1, 1, node.cpus, node.memory_gib, 8)
        memory.append(predict_memory(wish, facts, node, layout, Batch(64, (64,), 4, 16), "sdpa").parts["activations"])
        times.append(sum(step_of(training={"activation_checkpointing": kind}).values()))
    assert memory[0] < memory[1] < memory[2] and times[0] > times[1] > times[2]


def test_fused_adamw_and_the_loss_in_pieces_cost_less() -> None:
    assert step_of(training={"optimizer": "adamw_fused"})["optimizer"] < step_of()["optimizer"]
    assert step_of(training={"cross_entropy": "fused"})["elementwise"] < step_of(training={"cross_entropy": "chunked"})["elementwise"]
    assert step_of(training={"cross_entropy": "chunked"})["matmul"] == step_of()["matmul"], "nothing is computed twice"


def test_an_asynchronous_checkpoint_takes_ram_and_hardly_time() -> None:
    node = read_hardware("h200").value
    plans = {}
    for asynchronous in (False, True):
        wish, facts = three_b(checkpoint={"asynchronous": asynchronous, "every": "10"}, data={"name": "a/c", "num_samples": 64_000})
        plans[asynchronous] = plan_of(wish, hardware=node, stack=KERNELS, model_facts=facts)[0]
    waiting, beside = plans[False], plans[True]
    assert waiting.time and beside.time and waiting.time.checkpoint_h and beside.time.checkpoint_h
    assert beside.time.checkpoint_h < 0.2 * waiting.time.checkpoint_h
    assert beside.time.checkpoint_stop_s == waiting.time.checkpoint_stop_s, "a stop waits for all of it"
    state_gib = 12 * facts.parameters / 2**30
    assert waiting.memory and beside.memory
    taken_gib = state_gib * page_locked_share(facts, 1)
    assert beside.memory.host_per_node_gib - waiting.memory.host_per_node_gib == pytest.approx(taken_gib, rel=0.01)
    assert waiting.identity == beside.identity, "it may be switched on for the next life"


def test_the_copy_of_shards_is_shared_out() -> None:
    wish, facts = three_b(checkpoint={"asynchronous": True})
    layout = Layout(2, 4, 4, 64, 500, 8)
    whole = predict_host(wish.model_copy(update={"gpus": 4, "nodes": 2}), facts, layout).snapshot
    sharded = predict_host(wish.model_copy(update={"gpus": 4, "nodes": 2, "parallelism": "fsdp"}), facts, layout).snapshot
    shares = page_locked_share(facts, 8) / page_locked_share(facts, 1)
    assert sharded == pytest.approx(whole / 2 * shares), "of two nodes each copies half"


def test_page_locked_copies_are_rounded_up_to_powers_of_two() -> None:
    _, facts = three_b()
    sizes = [4 * matrix.rows * matrix.columns for matrix in [*layer_matrices(facts) * facts.layers, *outer_matrices(facts)]]
    rounded = [next(2**power for power in range(64) if 2**power >= size) for size in sizes]
    assert page_locked_share(facts, 1) == pytest.approx(sum(rounded) / sum(sizes))
