"""What makes training faster must not change what it trains: losses, optimizers, layers, loader and checkpoints against the plain way."""

import copy
import os
import subprocess
import sys

import pytest
from training_runs import (
    CONFIGS,
    LORA,
    SOURCE,
    history,
    make_model,
    make_run,
    state_of,
    torch,
    train_here,
)
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import EXIT_STOPPED, UsageError
from launcher.train import cross_entropy, layers
from launcher.train.batches import NO_TARGET
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.precision import require_matmul_precision, set_matmul_precision
from launcher.train.ranks import Ranks
from launcher.train.rounding import StochasticRounding, rounded

pytestmark = pytest.mark.train

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4)
NEEDS_NEWER = pytest.mark.skipif(OLD, reason=f"torch {torch.__version__} has none of it, and the planner refuses it there")

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


# --- cross-entropy


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_chunked_is_plain_in_loss_and_gradients(monkeypatch, model_type, tied):
    monkeypatch.setattr(cross_entropy, "PIECE_TOKENS", 7)
    given = _random_model(model_type, tie_word_embeddings=tied)
    tokens_BS, targets_BS = _batch()
    plain, chunked = (_loss_and_gradients(given, kind, tokens_BS, targets_BS) for kind in ("plain", "chunked"))
    assert chunked[0] == pytest.approx(plain[0], rel=1e-6)
    for name, gradient in plain[1].items():
        assert torch.allclose(chunked[1][name], gradient, rtol=1e-4, atol=1e-6), name


def test_chunked_under_autocast_sums_the_gradient_of_the_head_in_fp32(monkeypatch):
    """With one token a piece its sum in bf16 would be off by far more than one product over all tokens in bf16."""
    monkeypatch.setattr(cross_entropy, "PIECE_TOKENS", 1)
    given = _random_model("starcoder2", tie_word_embeddings=False)
    tokens_BS, targets_BS = _batch(16, 24)
    exact = _loss_and_gradients(given, "plain", tokens_BS, targets_BS)[1]["lm_head.weight"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = _loss_and_gradients(given, "chunked", tokens_BS, targets_BS)[1]["lm_head.weight"]
    assert chunked.dtype == torch.float32
    assert (chunked - exact).norm() < 0.02 * exact.norm()


def test_without_gradients_and_for_other_callers_the_head_is_as_before():
    given = _random_model("gpt_bigcode")
    tokens_BS, targets_BS = _batch()
    loss = CrossEntropy(given, "chunked")
    with torch.no_grad():
        inside = loss.sum(lambda: given(input_ids=tokens_BS, use_cache=False).logits, targets_BS)
        logits_BSV = given(input_ids=tokens_BS, use_cache=False).logits
    assert inside.dim() == 0 and not inside.requires_grad and logits_BSV.shape == (3, 8, 64)
    nothing = loss.sum(lambda: given(input_ids=tokens_BS, use_cache=False).logits, torch.full_like(targets_BS, NO_TARGET))
    nothing.backward()
    assert nothing.item() == 0 and all(not parameter.grad.any() for parameter in given.parameters())


def test_the_loss_forgets_its_targets_when_the_model_fails():
    given = _random_model("llama")
    loss = CrossEntropy(given, "chunked")
    with pytest.raises(ZeroDivisionError):
        loss.sum(lambda: 1 / 0, torch.zeros(1, 8, dtype=torch.int64))
    assert given(input_ids=torch.ones(1, 8, dtype=torch.int64)).logits.shape == (1, 8, 64)


def test_an_adapted_head_is_refused():
    given = _random_model("llama")
    given.lm_head = torch.nn.Linear(32, 64, bias=True)
    with pytest.raises(UsageError, match="the loss is computed from the head's weight"):
        CrossEntropy(given, "chunked")


def test_the_planner_counts_with_the_size_of_a_piece():
    pytest.importorskip("pydantic", reason="the source's stack has no planner")
    from launcher.hardware.activations import LOSS_CHUNK_TOKENS

    assert cross_entropy.PIECE_TOKENS == LOSS_CHUNK_TOKENS


@pytest.mark.parametrize("parallelism", ["ddp", pytest.param("fsdp", marks=NEEDS_NEWER)])
def test_chunked_on_two_ranks_is_plain_on_one(tmp_path, data, server, parallelism):
    model = make_model(tmp_path / "model")
    training = {"effective_batch": 20, "micro_batch": 5}
    one = make_run(tmp_path / "one", model, data, training=training)
    two = make_run(tmp_path / "two", model, data, ranks=2, parallelism=parallelism, training={**training, "cross_entropy": "chunked"})
    assert train_here(one) == 0
    assert server.train(two) == [0, 0]
    for alone, shared in zip(history(one), history(two), strict=True):
        assert shared[2] == pytest.approx(alone[2], abs=1e-5) and shared[-1] == alone[-1]


def test_fused_is_plain_in_tritons_interpreter():
    """liger's kernels without a GPU: the same call that a GPU gets, on tensors small enough for the interpreter."""
    for library in ("liger_kernel", "triton"):
        pytest.importorskip(library, reason=f"{library} is not installed: fused cross-entropy was not tried")
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(SOURCE), *sys.path])}
    found = subprocess.run([sys.executable, "-c", _FUSED], env=environ, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


_FUSED = """
import torch
from launcher.train.batches import NO_TARGET
from launcher.train.cross_entropy import _fused_sum
torch.manual_seed(0)
hidden, weight, targets = torch.randn(10, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True), torch.randint(0, 64, (10,))
targets[3] = NO_TARGET
gradients = []
for loss in (_fused_sum()(hidden, weight, targets), torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")):
    gradients.append((loss.detach(), *torch.autograd.grad(0.3 * loss, (hidden, weight))))
for fused, plain in zip(*gradients):
    assert torch.allclose(fused, plain, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: fused cross-entropy was not compared there")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_fused_is_plain_on_a_gpu(model_type, tied):
    given = _random_model(model_type, tie_word_embeddings=tied).cuda()
    tokens_BS, targets_BS = (tensor.cuda() for tensor in _batch())
    plain, fused = (_loss_and_gradients(given, kind, tokens_BS, targets_BS) for kind in ("plain", "fused"))
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    for name, gradient in plain[1].items():
        assert torch.allclose(fused[1][name], gradient, rtol=1e-3, atol=1e-5), name


def _random_model(model_type, **config):
    torch.manual_seed(3)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    values = {"vocab_size": 64, "max_position_embeddings": 64, **ids, **CONFIGS[model_type], **config}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval()


def _batch(rows=3, length=8):
    torch.manual_seed(4)
    tokens_BS, targets_BS = torch.randint(0, 64, (2, rows, length))
    targets_BS[0, 3:] = NO_TARGET
    return tokens_BS, targets_BS


def _loss_and_gradients(given, kind, tokens_BS, targets_BS):
    model = copy.deepcopy(given)
    loss = CrossEntropy(model, kind).sum(lambda: model(input_ids=tokens_BS, use_cache=False).logits, targets_BS)
    (loss / 21).backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


# --- what a run is made of, each way resumed


WAYS = {
    "chunked": {"training": {"cross_entropy": "chunked"}},
    "chunked, lora, bf16": {"training": {"cross_entropy": "chunked", "dtype": "bf16"}, "adapter": LORA},
    "fused adamw": {"training": {"optimizer": "adamw_fused"}},
    "8-bit adamw": {"training": {"optimizer": "adamw_8bit"}},
    "pure bf16, adamw": {"training": {"dtype": "bf16_pure"}},
    "pure bf16, 8-bit adamw": {"training": {"dtype": "bf16_pure", "optimizer": "adamw_8bit"}},
    "pure bf16, adafactor, chunked": {"training": {"dtype": "bf16_pure", "optimizer": "adafactor", "cross_entropy": "chunked"}},
    "selective": {"training": {"activation_checkpointing": "selective", "dtype": "bf16"}},
    "asynchronous": {"checkpoint": {"asynchronous": True, "every": "2"}},
}
CLOSE = {"chunked": 1e-5, "fused adamw": 1e-5, "8-bit adamw": 2e-3, "pure bf16, adamw": 2e-3, "asynchronous": 0.0}
"""Largest difference of a loss to the plain run's, where the way is to train the same."""


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory, model, data):
    run = make_run(tmp_path_factory.mktemp("plain") / "run", model, data)
    assert train_here(run) == 0
    return [record[2] for record in history(run)]


@pytest.mark.parametrize("way", [pytest.param(way, marks=[NEEDS_NEWER] if way in ("fused adamw", "selective") else []) for way in WAYS])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, model, data, plain_losses, way):
    if "8-bit" in way:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole, cut = (make_run(tmp_path / name, model, data, **WAYS[way]) for name in ("whole", "cut"))
    assert train_here(whole) == 0
    assert train_here(cut, stop_at=3) == EXIT_STOPPED
    assert train_here(cut, life=1) == 0
    assert history(cut) == history(whole) and len(history(whole)) == 8
    assert state_of(cut, 8) == state_of(whole, 8)
    if way in CLOSE:
        assert [record[2] for record in history(whole)] == pytest.approx(plain_losses, abs=CLOSE[way])


# --- pure bf16


def test_rounding_is_right_on_average_and_leaves_what_bf16_holds():
    noise = torch.Generator().manual_seed(1)
    held = torch.tensor([1.0, -2.5, 0.0, float("inf"), -float("inf"), 3e38])
    assert torch.equal(rounded(held, noise).float(), held.bfloat16().float())
    assert rounded(torch.tensor([float("nan")]), noise).isnan().all()
    between = torch.full((100_000,), 1 + 0.25 / 128)  # a quarter of the way from 1 to the next number of bf16
    up = rounded(between, noise).float()
    assert set(up.tolist()) == {1.0, 1 + 1 / 128}
    assert (up - 1).mean().item() * 128 == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_small_updates_arrive_that_rounding_to_nearest_loses(optimizer):
    """50 steps of rate 3e-5 with a steady gradient on weights near 1: nothing moves when rounded to nearest."""
    moved = {}
    for kind in ("fp32", "nearest", "stochastic"):
        torch.manual_seed(5)
        weight = torch.nn.Parameter((torch.randn(256, 64) + 1).to(torch.float32 if kind == "fp32" else torch.bfloat16))
        before = weight.detach().float().clone()
        steps = _optimizer_of(optimizer, weight)
        if kind == "stochastic":
            steps = StochasticRounding(steps, seed=7)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            steps.step()
        moved[kind] = (weight.detach().float() - before).mean().item()
    assert abs(moved["nearest"]) < 0.2 * abs(moved["fp32"])
    assert moved["stochastic"] == pytest.approx(moved["fp32"], rel=0.1)


def test_adamws_moments_are_bf16_and_come_from_fp32_arithmetic():
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    steps = StochasticRounding(_optimizer_of("adamw", weight), seed=7)
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        steps.step()
    second = steps.state[weight]["exp_avg_sq"]
    assert second.dtype == torch.bfloat16 and weight.dtype == torch.bfloat16
    assert second.float().mean().item() == pytest.approx(1 - 0.999**400, rel=0.05), "rounded to nearest it stays where a step is too small"


def _optimizer_of(kind, weight):
    if kind == "adamw_8bit":
        return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim.AdamW8bit([weight], lr=3e-5)
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor([weight], lr=3e-5, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW([weight], lr=3e-5, weight_decay=0.0)


# --- layers


@NEEDS_NEWER
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no dropout"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_selective_checkpointing_repeats_no_matrix_product(tmp_path, model_type, dropout):
    folder = make_model(tmp_path / "model", model_type, dropout=dropout)
    counts, gradients = {}, {}
    for kind in ("none", "selective", "full"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()
        layers.checkpoint_activations(model, kind)
        torch.manual_seed(6)
        loss = model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits.square().sum()
        with _Products() as products:
            loss.backward()
        counts[kind], gradients[kind] = products.count, [parameter.grad for parameter in model.parameters()]
    assert counts["selective"] == counts["none"] < counts["full"]
    for kind in ("selective", "full"):
        assert all(torch.equal(*pair) for pair in zip(gradients[kind], gradients["none"])), "the same to the last bit"


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*arguments, **(kwargs or {}))


TORCH_WARNS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""torch does so itself while it traces a layer whose input needs a gradient."""

COMPILED = {
    "padded": {},
    "flattened": {"data": {"packing": "flatten"}},
    "full checkpointing, lora, bf16": {"training": {"activation_checkpointing": "full", "dtype": "bf16"}, "adapter": LORA},
}


@NEEDS_NEWER
@TORCH_WARNS
@pytest.mark.parametrize("sections", COMPILED.values(), ids=COMPILED)
def test_compiled_layers_train_the_same_and_resume(tmp_path, data, monkeypatch, sections):
    """Captured whole and retraced for every shape as in a real run; run by torch's tracing backend, which takes seconds and not minutes."""
    _trace_only(monkeypatch)
    model = make_model(tmp_path / "model")
    sections = {**sections, "evaluation": {"every": "3"}}
    plain, whole, cut = (
        make_run(tmp_path / name, model, data, **{**sections, "training": {**sections.get("training", {}), "compile": kind}})
        for name, kind in (("plain", "none"), ("whole", "layers"), ("cut", "layers"))
    )
    assert (train_here(plain), train_here(whole), train_here(cut, stop_at=3), train_here(cut, life=1)) == (0, 0, EXIT_STOPPED, 0)
    assert history(cut) == history(whole) and state_of(cut, 8) == state_of(whole, 8)
    assert [record[2] for record in history(whole)] == pytest.approx([record[2] for record in history(plain)], abs=1e-3)
    (event,) = whole.events("compiled")
    assert event["step"] == 1 and event["graphs"] > 0 and event["seconds"] > 0
    assert [event["step"] for event in cut.events("compiled")] == [1, 4]


@NEEDS_NEWER
@TORCH_WARNS
def test_a_layer_that_cannot_be_compiled_whole_is_an_error(tmp_path, data, monkeypatch):
    _trace_only(monkeypatch)
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), data, training={"compile": "layers"})
    layer = type(layers.decoder_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))[0])
    forward = layer.forward

    def prints(self, *arguments, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *arguments, **kwargs)

    monkeypatch.setattr(layer, "forward", prints)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train_here(run)


@NEEDS_NEWER
def test_when_nothing_was_compiled_the_run_ends(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.raises(RuntimeError, match="torch compiled nothing"):
        layers.require_compiled()


def _trace_only(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled(module, backend="aot_eager", **options))


# --- TF32


def test_tf32_is_what_the_plan_says():
    try:
        for tf32 in (True, False):
            set_matmul_precision(tf32)
            require_matmul_precision(tf32)
            assert torch.backends.cuda.matmul.allow_tf32 is tf32 and torch.backends.cudnn.allow_tf32 is tf32
            with pytest.raises(UsageError, match="a library changed it"):
                require_matmul_precision(not tf32)
    finally:
        set_matmul_precision(False)
