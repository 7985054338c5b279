"""Several ranks on gloo, started as the supervisor starts them: sums, stops, exit codes, exit records."""

import os
import signal
import time

import pytest
from training_runs import (
    SEQUENCE,
    finish,
    history,
    make_data,
    make_model,
    make_run,
    rewrite_plan,
    start,
    state_of,
    train_here,
    train_processes,
)

from launcher import checkpoint, metrics
from launcher.errors import EXIT_DO_NOT_RETRY, EXIT_STOPPED, GateError, UsageError
from launcher.run import read_exit_records
from launcher.train.place import Place, find_place, nvidia_driver, prepare_environment
from launcher.train.ranks import gpu_problem
from launcher.train.supported import require_supported

pytestmark = pytest.mark.train


def test_25_samples_on_4_ranks_are_those_of_1_rank(tmp_path):
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 409, 10)
    sections = {"training": {"epochs": 3, "effective_batch": 25, "micro_batch": 5}, "evaluation": {"every": "50%"}}
    one, four = (make_run(tmp_path / f"{ranks}-ranks", model, data, ranks=ranks, **sections) for ranks in (1, 4))
    assert four.plan().batch.samples_per_rank == (7, 6, 6, 6)
    assert train_here(one) == 0
    assert train_processes(four) == [0] * 4
    rows = list(zip(metrics.read(one.metrics_file, "train"), metrics.read(four.metrics_file, "train"), strict=True))
    assert len(rows) == 50
    for alone, shared in rows:
        assert [alone[key] for key in ("samples_sha", "learning_rate", "useful_tokens", "tokens")] == [
            shared[key] for key in ("samples_sha", "learning_rate", "useful_tokens", "tokens")
        ]
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
    assert rows[-1][0]["tokens"] == 2 * SEQUENCE, "the last step has 2 samples: two of the four ranks run dummies only"
    losses = [[record["loss"] for record in metrics.read(run.metrics_file, "eval")] for run in (one, four)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 2
    assert [record.exit_code for record in read_exit_records(four, 0)] == [0] * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_is_the_uninterrupted_one(tmp_path, ranks):
    model, data = make_model(tmp_path / "model", dropout=True), make_data(tmp_path / "data", 61)
    sections = {
        "training": {"epochs": 2, "effective_batch": 10, "micro_batch": 2, "optimizer": "adafactor"},
        "checkpoint": {"every": "never"},
    }
    whole, cut = (make_run(tmp_path / name, model, data, ranks=ranks, **sections) for name in ("whole", "cut"))
    assert train_processes(whole) == [0] * ranks
    assert train_processes(cut, stop_at=(5, ranks - 1)) == [EXIT_STOPPED] * ranks
    assert [(manifest.step, manifest.reason, manifest.epoch) for manifest in checkpoint.committed(cut)] == [(5, "stop", None)]
    assert {(record.exit_code, record.step, record.reason) for record in read_exit_records(cut, 0)} == {(EXIT_STOPPED, 5, "stopped")}
    assert train_processes(cut, life=1) == [0] * ranks
    assert history(cut) == history(whole) and len(history(whole)) == 13
    assert state_of(cut, 13) == state_of(whole, 13)


def test_two_nodes_meet_before_torch_and_train_as_one(tmp_path):
    """Two processes that take themselves for nodes."""
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 20)
    one, two = (make_run(tmp_path / name, model, data, ranks=2) for name in ("one", "two"))
    rewrite_plan(two, 0, layout={"nodes": 2, "ranks_per_node": 1})
    (two.root / "plan.json").write_text((two.life(0) / "plan.json").read_text())
    two.append_event("started", life=0, nodes=["node1", "node2"])
    assert train_processes(one) == [0, 0]
    assert train_processes(two) == [0, 0]
    assert history(two) == history(one)


def test_another_number_of_ranks_goes_on_with_the_same_samples(tmp_path):
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data", 60)
    one, moved = (make_run(tmp_path / name, model, data, ranks=ranks) for name, ranks in (("one", 1), ("moved", 2)))
    assert train_here(one) == 0
    assert train_processes(moved, stop_at=(3, 0)) == [EXIT_STOPPED] * 2
    alone = one.plan()
    rewrite_plan(moved, 1, layout={"ranks_per_node": 1}, batch={"samples_per_rank": [8], "micro_batch": 4, "micro_steps": 2})
    assert moved.plan(1).layout.world_size == alone.layout.world_size == 1
    assert train_here(moved, life=1) == 0
    for expected, found in zip(history(one), history(moved), strict=True):
        assert found[-1] == expected[-1] and found[2] == pytest.approx(expected[2], abs=1e-5)


def test_many_signals_make_one_save(tmp_path):
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), make_data(tmp_path / "data", 60), training={"epochs": 400})
    processes = start(run)
    deadline = time.monotonic() + 120
    while len(metrics.read(run.metrics_file, "train")) < 2 and time.monotonic() < deadline and processes[0].poll() is None:
        time.sleep(0.01)
    for number in [signal.SIGTERM, signal.SIGUSR2] * 25:
        processes[0].send_signal(number)
    assert finish(processes) == [EXIT_STOPPED]
    stopped = metrics.read(run.metrics_file, "train")[-1]["step"]
    assert [manifest.step for manifest in checkpoint.committed(run) if manifest.reason == "stop"] == [stopped]
    assert len(run.events("stop_seen")) == 1 and stopped < 3000


def test_a_stop_while_python_still_imports_saves_nothing(tmp_path):
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), make_data(tmp_path / "data", 60), ranks=2)
    assert train_processes(run, stop_at=(0, 1)) == [EXIT_STOPPED] * 2
    assert {(record.exit_code, record.step, record.reason) for record in read_exit_records(run, 0)} == {(EXIT_STOPPED, 0, "stopped")}
    assert not run.metrics_file.exists() and not run.checkpoints.exists()


def test_a_save_that_fails_on_rank_0_ends_every_rank(tmp_path):
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), make_data(tmp_path / "data", 60), ranks=2, checkpoint={"every": "2"})
    run.checkpoints.mkdir()
    checkpoint.stage_folder(run, 4, 0).write_text("a file where the folder should be")
    assert train_processes(run) == [1, 1]
    first, second = read_exit_records(run, 0)
    assert first.reason.startswith("FileExistsError") and second.reason == "RuntimeError: another rank could not save step 4: see its log"
    assert (first.step, second.step) == (4, 4)
    assert [manifest.step for manifest in checkpoint.committed(run)] == [2], "the earlier checkpoint is intact"


def test_no_good_checkpoint_is_not_retried(tmp_path):
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), make_data(tmp_path / "data", 20), checkpoint={"every": "1"})
    assert train_here(run, stop_at=1) == EXIT_STOPPED
    (run.checkpoint(1) / "optimizer.safetensors").write_bytes(b"")
    assert train_processes(run, life=1) == [EXIT_DO_NOT_RETRY]
    (record,) = read_exit_records(run, 1)
    assert record.exit_code == EXIT_DO_NOT_RETRY and "is whole: " in record.reason and "optimizer.safetensors: 0 bytes" in record.reason


@pytest.mark.parametrize(
    ("sections", "ranks", "message"),
    [
        (
            {"training": {"dtype": "bf16_pure"}, "parallelism": "fsdp"},
            1,
            "training.dtype: weights in bf16 are rounded stochastically, which fsdp's shards are not "
            "(dtype: bf16, whose fp32 weights are sharded)",
        ),
        ({"training": {"cross_entropy": "fused"}}, 1, "training.cross_entropy: fused needs a GPU (cross_entropy: chunked)"),
        ({"attention": "flex"}, 1, "attention: flex needs a GPU (eager or sdpa on CPU)"),
        ({"training": {"dtype": "fp16"}}, 1, "training.dtype: fp16 needs a GPU (fp32 or bf16 on CPU)"),
        (
            {"training": {"optimizer": "adamw_8bit"}, "parallelism": "fsdp"},
            1,
            "training.optimizer: bitsandbytes' 8-bit AdamW knows whole tensors only, fsdp shards them "
            "(optimizer: adamw, whose state is sharded)",
        ),
        ({"parallelism": "single"}, 2, "parallelism: single is one process, the plan has 2"),
        ({"evaluation": {"every": "epoch"}}, 1, "data/eval is missing on this node (stage again, or bind the folder)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_it_cannot_do_is_said_before_torch_is_loaded(tmp_path, sections, ranks, message):
    data = make_data(tmp_path / "data", 20)
    (tmp_path / "model").mkdir()
    plan = make_run(tmp_path / "run", tmp_path / "model", data, ranks=ranks, **sections).plan()
    with pytest.raises(UsageError) as caught:
        require_supported(plan)
    assert str(caught.value).endswith(message)


def test_another_number_of_ranks_than_planned_is_not_retried(tmp_path):
    (tmp_path / "model").mkdir()
    run = make_run(tmp_path / "run", tmp_path / "model", make_data(tmp_path / "data", 20), ranks=2)
    assert finish(start(run, env={"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}))[0] == EXIT_DO_NOT_RETRY
    assert "1 ranks were started, the plan has 2" in read_exit_records(run, 0)[0].reason


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, Place(3, 4, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place(2, 4, 0)),
    ],
    ids=["alone", "torchrun", "srun"],
)
def test_where_a_rank_learns_its_place(environ, place):
    assert find_place(environ) == place


@pytest.mark.parametrize("environ", [{"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}], ids=["incomplete", "no number"])
def test_half_an_environment_is_refused(environ):
    with pytest.raises(UsageError, match="RANK, WORLD_SIZE, LOCAL_RANK must all be numbers"):
        find_place(environ)


def test_the_environment_cannot_change_the_plan(tmp_path):
    (tmp_path / "model").mkdir()
    plan = make_run(tmp_path / "run", tmp_path / "model", make_data(tmp_path / "data", 20), ranks=2).plan()
    environ = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
        "PMI_SIZE": "9",
        "OMP_NUM_THREADS": "64",
        "HOME": "/h",
    }
    prepare_environment(environ, plan, Place(1, 2, 1))
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HOME")} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/h",
    }
    assert {name for name in environ if name.startswith(("ACCELERATE", "PMI"))} == {"ACCELERATE_USE_CPU"}


A100 = {"kind": "a100-80gb", "memory_gib": 79.25}


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ({"count": 4, "memory_gib": 79.1, "driver": "555.42.02"}, None),
        ({"count": 8, "memory_gib": 79.1, "driver": None}, None),
        ({"count": 2, "memory_gib": 79.1, "driver": "555.42.02"}, "this rank sees 2 GPUs, the plan has 4 on each node (driver 555.42.02)"),
        ({"count": 4, "memory_gib": 39.4, "driver": "555.42.02"}, "the smallest GPU has 39 GiB, the plan was made for 79 GiB (a100-80gb)"),
        ({"count": 4, "memory_gib": 79.1, "driver": "470.82.01"}, "NVIDIA driver 470.82.01, this stack needs 525.60.13 or newer"),
    ],
    ids=["as planned", "more than planned", "too few", "too small", "old driver"],
)
def test_gpus_against_the_plan(seen, problem):
    assert gpu_problem(4, A100, "525.60.13", seen) == problem


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  555.42.02  Mon Jun 24 02:13:44 UTC 2024\nGCC version: gcc 12\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  555.42.02  Release Build  (dvs-builder@U16)\n",
    ],
    ids=["proprietary", "open"],
)
def test_the_drivers_version_is_read(text, tmp_path):
    (tmp_path / "version").write_text(text)
    assert nvidia_driver(tmp_path / "version") == "555.42.02"
    assert nvidia_driver(tmp_path / "none") is None


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_a_gpu_plan_without_gpus_is_refused(tmp_path):
    from launcher.train.ranks import connect

    (tmp_path / "model").mkdir()
    run = make_run(tmp_path / "run", tmp_path / "model", make_data(tmp_path / "data", 20))
    rewrite_plan(run, 0, layout={"gpus_per_node": 2})
    with pytest.raises(GateError, match="this rank sees 0 GPUs, the plan has 2 on each node"):
        connect(run.plan(), Place(0, 1, 0))
