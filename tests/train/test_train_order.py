"""The order, the schedule and what is due when: pure functions."""

import math

import pytest
from training_runs import torch

from launcher.metrics import samples_sha
from launcher.train.optimizer import build_optimizer, learning_rate, warmup_steps
from launcher.train.order import Order, micro_slices, permutation

pytestmark = pytest.mark.train


def test_the_permutation_is_the_same_on_every_stack():
    assert permutation(42, 1, 10).tolist() == [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]
    assert permutation(42, 2, 10).tolist() != permutation(42, 1, 10).tolist()


@pytest.mark.parametrize(("samples", "epochs", "batch"), [(10, 2, 4), (10, 1.5, 4), (3, 5, 8), (7, 3, 7)], ids=str)
def test_steps_cut_the_stream_of_permutations(samples, epochs, batch):
    order = Order(42, samples, epochs, batch)
    whole = [int(index) for epoch in range(1, math.ceil(epochs) + 1) for index in permutation(42, epoch, samples)]
    stream = whole[: round(samples * epochs)]
    steps = [order.samples(step).tolist() for step in range(1, order.total_steps + 1)]
    assert [index for step in steps for index in step] == stream
    assert all(len(step) == batch for step in steps[:-1])


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 25])
def test_an_epoch_ends_with_the_first_step_that_completes_it(batch):
    order = Order(42, 10, 4, batch)
    completed = {step: order.completed_epoch(step) for step in range(1, order.total_steps + 1) if order.completed_epoch(step)}
    expected: dict[int, int] = {}
    for epoch in range(1, 5):
        expected[math.ceil(epoch * 10 / batch)] = epoch
    assert completed == expected
    assert order.epoch_fraction(order.total_steps) == 4


@pytest.mark.parametrize(
    ("every", "steps"),
    [("never", []), ("epoch", [13, 25]), ("10", [10, 20]), ("8%", [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]), ("100%", [25])],
)
def test_due_steps(every, steps):
    order = Order(42, 50, 2, 4)
    assert [step for step in range(1, order.total_steps + 1) if order.is_due(every, step)] == steps


def test_25_samples_on_4_ranks_are_7_6_6_6_in_stream_order():
    indices = Order(42, 100, 1, 25).samples(1)
    shares = [[part.tolist() for part in micro_slices(indices, rank, 4, 2)] for rank in range(4)]
    assert [[len(part) for part in share] for share in shares] == [[4, 3], [3, 3], [3, 3], [3, 3]]
    assert [index for share in shares for part in share for index in part] == indices.tolist()
    assert samples_sha(indices.tolist()) == samples_sha([index for share in shares for part in share for index in part])


def test_a_short_step_leaves_dummies_at_the_end():
    indices = Order(42, 100, 1, 25).samples(1)[:2]
    assert [[len(part) for part in micro_slices(indices, rank, 4, 2)] for rank in range(4)] == [[1, 0], [1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5, 0.03])
def test_the_rate_of_every_step_is_that_of_transformers(schedule, warmup):
    from transformers import get_scheduler

    training = {"learning_rate": 3e-5, "schedule": schedule, "warmup": warmup}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps(warmup, 50), num_training_steps=50)
    for step in range(1, 51):
        assert learning_rate(step, 50, training) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("model_type", ["starcoder2", "gpt_bigcode", "llama"])
def test_everything_but_biases_and_norms_decays(model_type, tmp_path):
    from training_runs import PRESET, make_model
    from transformers import AutoModelForCausalLM
    from transformers.trainer import Trainer
    from transformers.training_args import TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", model_type))
    decayed, plain = build_optimizer(model, PRESET["training"]).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[]))
    assert {names[parameter] for parameter in decayed["params"]} == set(trainer.get_decay_parameter_names(model)) & set(names.values())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
