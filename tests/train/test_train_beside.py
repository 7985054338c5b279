"""What happens beside training, collating and writing checkpoints, must not be seen in what is trained and saved."""

import threading
from dataclasses import replace

import pytest
from training_runs import history, make_run, metrics, state_of, torch, train_here

from launcher import checkpoint
from launcher.errors import EXIT_STOPPED, RunFailed, UsageError
from launcher.run import read_exit_records, take_lease
from launcher.train import evaluate, loop, writer
from launcher.train.batches import Samples, collate
from launcher.train.loader import Loader, on_device
from launcher.train.order import Order, micro_slices
from launcher.train.ranks import Ranks
from launcher.train.stop import Stop

pytestmark = pytest.mark.train

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


# --- loader


def test_the_loader_gives_what_collating_gives(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, ranks=2, training={"epochs": 1.5, "effective_batch": 7, "micro_batch": 2})
    plan, samples = run.plan(), Samples(data / "train")
    order = Order(42, len(samples), 1.5, 7)
    for rank in (0, 1):
        loader = Loader(samples, order, plan, Ranks(rank, 2, CPU))
        for step in [*range(1, order.total_steps + 1), 3]:  # a step may be asked for anew
            shares = micro_slices(order.samples(step), rank, 2, plan.batch.micro_steps)
            for loaded, share in zip(loader.load(step), shares, strict=True):
                expected = collate(samples, share.tolist(), "none", 24)
                for name, value in vars(expected).items():
                    found = getattr(on_device(loaded, CPU), name)
                    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def test_one_step_is_collated_while_another_is_computed(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data)
    samples = Samples(data / "train")
    asked, begun = [], threading.Event()
    order = _Recorded(42, len(samples), 1, 8)
    object.__setattr__(order, "asked", asked)
    object.__setattr__(order, "begun", begun)
    loader = Loader(samples, order, run.plan(), ALONE)
    loader.load(1)
    assert begun.wait(30), "step 2 is begun although nobody asked for it"
    assert asked == [1, 2]


class _Recorded(Order):
    def span(self, step):
        self.asked.append(step)
        if step == 2:
            self.begun.set()
        return super().span(step)


def test_what_collating_raises_is_raised_where_the_step_is_taken(tmp_path, model, data):
    run = make_run(tmp_path / "run", model, data, training={"sequence_length": 4})
    samples = Samples(data / "train")
    with pytest.raises(UsageError, match="the preset's sequence_length is 4"):
        Loader(samples, Order(42, len(samples), 1, 8), run.plan(), ALONE).load(1)


def test_another_micro_batch_than_the_plans_is_our_mistake(tmp_path, model, data):
    plan = make_run(tmp_path / "run", model, data, training={"micro_batch": 3}).plan()
    samples, order = Samples(data / "train"), Order(42, 60, 1, 8)
    for wrong, message in (({"micro_batch": 2}, "hold the step's samples"), ({"samples_per_rank": (7,)}, r"\(3, 3, 2\), the plan has")):
        with pytest.raises(AssertionError, match=message):
            Loader(samples, order, replace(plan, batch=replace(plan.batch, **wrong)), ALONE).load(1)


# --- asynchronous checkpoints


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, model, data, monkeypatch):
    """The write of step 2 is held up until step 5 is computed; what comes out is the state of step 2."""
    run, plain = (
        make_run(tmp_path / name, model, data, checkpoint={"every": every, "keep": 9, "asynchronous": asynchronous})
        for name, every, asynchronous in (("run", "4", True), ("plain", "4", False))
    )
    reached, rate, write = threading.Event(), loop.learning_rate, writer.write

    def rate_and_note(step, total_steps, training):
        if step == 6:
            assert not run.checkpoint(4).exists()
            reached.set()
        return rate(step, total_steps, training)

    def write_late(folder, contents):
        assert reached.wait(60)
        write(folder, contents)

    assert train_here(plain) == 0
    monkeypatch.setattr(loop, "learning_rate", rate_and_note)
    monkeypatch.setattr(writer, "write", write_late)
    assert train_here(run) == 0
    assert history(run) == history(plain)
    assert [(manifest.step, manifest.reason) for manifest in checkpoint.committed(run)] == [(4, "steps"), (8, "end")]
    assert state_of(run, 4) == state_of(plain, 4) and checkpoint.verify(run.checkpoint(4)) is None
    late, end = metrics.read(run.metrics_file, "checkpoint")
    assert (late["step"], end["step"]) == (4, 8)
    assert late["blocked_s"] < late["total_s"] and end["blocked_s"] == end["total_s"]
    assert [event["step"] for event in run.events("checkpoint")] == [4, 8]


def test_at_most_one_is_under_way_and_a_stop_waits_for_it(tmp_path, model, data, monkeypatch):
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "1", "keep": 9, "asynchronous": True})
    now, most, write = [], [], writer.write

    def write_and_count(folder, contents):
        now.append(folder)
        most.append(len(now))
        write(folder, contents)
        now.remove(folder)

    monkeypatch.setattr(writer, "write", write_and_count)
    assert train_here(run, stop_at=4) == EXIT_STOPPED
    assert [(manifest.step, manifest.reason) for manifest in checkpoint.committed(run)] == [
        (1, "steps"), (2, "steps"), (3, "steps"), (4, "stop"),
    ]  # fmt: skip
    assert most == [1, 1, 1], "the one of the stop is written by the rank itself"
    assert not list(run.checkpoints.glob(".stage-*"))


def test_what_is_being_written_is_not_committed_for_a_newer_life(tmp_path, model, data, monkeypatch):
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "2", "asynchronous": True})
    write = writer.write

    def write_and_lose(folder, contents):
        write(folder, contents)
        take_lease(run, 1, None)

    monkeypatch.setattr(writer, "write", write_and_lose)
    with pytest.raises((RunFailed, RuntimeError), match="a newer life"):
        train_here(run)
    assert checkpoint.committed(run) == []


def test_a_write_that_fails_ends_every_rank_at_the_next_step(tmp_path, model, data, server):
    """The second checkpoint finds a file where its folder should be renamed to."""
    run = make_run(tmp_path / "run", model, data, ranks=2, training={"epochs": 8}, checkpoint={"every": "2", "asynchronous": True})
    run.checkpoints.mkdir()
    blocked = run.checkpoint(4)
    blocked.write_text("a file where the checkpoint should be")
    assert server.train(run) == [1, 1]
    first, second = read_exit_records(run, 0)
    assert first.reason.startswith("NotADirectoryError")
    assert second.reason == "RuntimeError: another rank could not save step 4: see its log"
    assert first.step == second.step and first.step in (5, 6)
    assert [manifest.step for manifest in checkpoint.committed(run)] == [2], "the earlier checkpoint is intact"


def test_a_stop_during_evaluation_waits_for_the_checkpoint_of_that_step(tmp_path, model, data, monkeypatch):
    run = make_run(tmp_path / "run", model, data, checkpoint={"every": "3", "asynchronous": True}, evaluation={"every": "3"})
    stop = Stop()

    def collate_and_stop(*arguments):
        stop.request()
        return collate(*arguments)

    monkeypatch.setattr(evaluate, "collate", collate_and_stop)
    assert train_here(run, stop=stop) == EXIT_STOPPED
    assert [(manifest.step, manifest.reason) for manifest in checkpoint.committed(run)] == [(3, "steps")]
    assert [event["step"] for event in run.events("checkpoint")] == [3]
