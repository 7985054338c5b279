"""The bench without torch: what is measured and what is skipped, processes that crash, turns, tables, the job."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from launcher.bench import grid, tables
from launcher.bench.cell import Cell, Row, append_row, read_rows
from launcher.bench.job import bench_script
from launcher.bench.lengths import code_lengths, cut_counts, documents_for, mean_length, sample_lengths
from launcher.bench.sweep import Contest, Effort, contend, contend_all, material_folder, measure_all, measure_one
from launcher.bench.work import Workshop, wait
from launcher.cli import app
from launcher.cli.bench import submit_line
from launcher.cli.line import Line, Wish, read
from launcher.cli.replan import replanner
from launcher.errors import ActionError, UsageError
from launcher.hardware.fits import UNOBSERVED
from launcher.plan import Container, Plan
from launcher.preset.reading import read_preset
from launcher.slurm.command import Command
from tests.conftest import REPOSITORY
from tests.fake_slurm import make_fake_slurm
from tests.plans import plan_of, preset, site

H200 = "presets/bench/santacoder.yaml"
CELL = Cell(1024, "sdpa", "none", "none", 8)


def line_of(name: str, *settings: str) -> Line:
    return read(Wish(str(REPOSITORY / name), "local", settings))


def found(line: Line, axes: grid.Axes) -> dict[str, grid.Candidate]:
    candidates = grid.candidates(axes, line.preset.value, lambda cell: replanner(line, Container("none"), None, UNOBSERVED))
    return {candidate.cell.name: candidate for candidate in candidates}


# lengths


def test_the_histogram_is_the_one_of_the_goals() -> None:
    lengths = code_lengths()
    assert sum(lengths.counts) > 500
    shares = {length: round(mean_length(lengths, length) / length, 2) for length in (1024, 2048, 4096)}
    assert shares == {1024: 0.78, 2048: 0.67, 4096: 0.52}


@pytest.mark.parametrize(("length", "steps", "samples"), [(1024, 5, 8), (4096, 4, 24), (512, 3, 2)])
def test_samples_follow_the_histogram_in_every_step(length: int, steps: int, samples: int) -> None:
    dealt = sample_lengths(code_lengths(), length, steps, samples)
    assert [len(step) for step in dealt] == [samples] * steps
    flat = [tokens for step in dealt for tokens in step]
    assert min(flat) >= 2 and max(flat) <= length
    assert sum(flat) / len(flat) == pytest.approx(mean_length(code_lengths(), length), rel=0.05)
    if samples > 2:  # no step is one of short samples only
        assert all(sum(step) / samples == pytest.approx(sum(flat) / len(flat), rel=0.1) for step in dealt)


def test_what_is_longer_counts_as_the_sequence_length() -> None:
    counts = cut_counts(code_lengths(), 1024)
    assert (len(counts), sum(counts)) == (64, sum(code_lengths().counts))
    assert documents_for(1024, 10) * mean_length(code_lengths(), 1024) > 10 * 1024


# what is measured


def test_the_largest_that_fits_its_half_and_the_first_that_does_not() -> None:
    axes = grid.Axes((2048,), ("sdpa", "eager"), ("none",), ("none",))
    cells = found(line_of(H200), axes)
    for attention in axes.attention:
        sizes = [(candidate.cell.micro_batch, candidate.refusal) for candidate in cells.values() if candidate.cell.attention == attention]
        numbers = [number for number, _ in sizes]
        assert len(sizes) == 3 and numbers == [numbers[0], numbers[0] * 2, numbers[0] * 4]
        assert [refusal == "" for _, refusal in sizes] == [True, True, False]
        assert sizes[2][1].startswith("does not fit: ") and sizes[2][1].endswith("GiB predicted")


@pytest.mark.parametrize(
    ("cell", "refusal"),
    [
        (Cell(2048, "flash2", "none", "none", 1), "without flash-attn"),
        (Cell(8192, "sdpa", "none", "none", 1), "8192 tokens, but the model's context is 4096"),
        (Cell(2048, "sdpa", "none", "none", 24), "no whole number of micro batches of 24"),
        (Cell(2048, "sdpa", "sometimes", "none", 1), "makes no sense"),
        (Cell(2048, "sdpa:flash", "none", "lora", 2), ""),
    ],
    ids=["library", "context", "micro batch", "schema", "backend"],
)
def test_what_the_planner_refuses_is_not_measured(cell: Cell, refusal: str) -> None:
    axes = grid.Axes((cell.sequence_length,), (cell.attention,), (cell.checkpointing,), (cell.adapter,), (cell.micro_batch,))
    (candidate,) = found(line_of(H200), axes).values()
    assert refusal in candidate.refusal and bool(candidate.refusal) == bool(refusal)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "presets/bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_bench_presets_have_something_to_measure(file: Path) -> None:
    line = line_of(str(file))
    assert line.facts is not None
    axes = grid.default_axes(line.preset.value, line.facts.context, None if line.stack is None else line.stack.value.attention)
    assert any(not candidate.refusal for candidate in found(line, axes).values())
    assert set(grid.LENGTHS) <= set(axes.sequence_length) or not line.preset.value.gpus


@pytest.mark.parametrize(
    "cell",
    [Cell(1024, "eager", "full", "lora", 4), Cell(2048, "sdpa:flash", "none", "none", 8)],
    ids=["much", "little"],
)
def test_the_line_that_submits_a_cell_is_one(cell: Cell) -> None:
    line = read(Wish(str(REPOSITORY / H200), "local", ("training.seed=7",), {"gpus": 1}))
    name, *settings = shlex.split(submit_line(line, cell))[2:]
    where = ["--site", "local", "--gpus", "1"]
    assert set(where) <= set(settings)
    settings = [word for word in settings if word not in where]
    chosen = read_preset(name, settings=[word for word in settings if word != "--set"]).value
    assert chosen.training.seed == 7
    for key, value in grid.change_for(cell, line.preset.value).items():
        seen: Any = chosen.model_dump()
        for part in key.split("."):
            seen = seen[part]
        assert seen["kind"] == value["kind"] if isinstance(value, dict) else seen == value


# processes


@pytest.fixture
def shop(tmp_path: Path) -> Callable[[str], Workshop]:
    """Processes that run a line of shell in the place of Python; $3 is the request."""

    def make(script: str) -> Workshop:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        folder = tmp_path / "bench"
        folder.mkdir(exist_ok=True)
        return Workshop(folder, Container("none"), str(python), {"PATH": os.environ["PATH"]})

    return make


WRITES = (
    'echo "{\\"outcome\\": \\"measured\\", \\"reason\\": \\"\\", \\"rank\\": $RANK, \\"of\\": $WORLD_SIZE}" >"$(dirname "$3")/result.json"'
)


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        ("kill -9 $$", "out of memory", "killed by signal 9, as the kernel does when RAM runs out"),
        ("kill -11 $$", "failed", "signal 11: no word in its log"),
        ("echo one >&2; echo 'the last word' >&2; exit 3", "failed", "exit code 3: the last word"),
        ("exit 0", "failed", "no result within 30 minutes"),
    ],
    ids=["killed", "crashed", "ended", "silent"],
)
def test_a_process_that_dies_is_a_row(script: str, outcome: str, reason: str, shop: Callable[[str], Workshop]) -> None:
    result = shop(script).run("measure", "cell", {})
    assert (result["outcome"], result["reason"]) == (outcome, reason)


def test_a_process_that_hangs_is_ended(shop: Callable[[str], Workshop]) -> None:
    worker = shop("exec sleep 1000").start("measure", "cell", {})
    times = iter([0.0, 2.0])
    assert wait([worker], limit_s=1, clock=lambda: next(times)) == {"outcome": "failed", "reason": "no result within 0 minutes"}
    assert worker.process.returncode == -9


def test_ranks_that_are_left_over_are_ended(shop: Callable[[str], Workshop]) -> None:
    there = shop('[ "$RANK" = 1 ] && { echo "no GPU of its own" >&2; exit 93; }; exec sleep 1000')
    assert there.run("measure", "cell", {}, ranks=2) == {"outcome": "failed", "reason": "exit code 93: no GPU of its own"}


def test_every_rank_is_told_its_place(shop: Callable[[str], Workshop]) -> None:
    result = shop(f'[ "$RANK" = 0 ] && {WRITES}; exit 0').run("measure", "cell", {}, ranks=2)
    assert (result["rank"], result["of"]) == (0, 2)


def plan() -> Plan:
    wish = preset(gpus=0, parallelism="single", training={"effective_batch": 8, "dtype": "fp32"})
    made, _ = plan_of(wish, site=site(scheduler="none"))
    return made


def test_rows_are_kept_and_not_measured_again(shop: Callable[[str], Workshop]) -> None:
    there = shop("echo ran >>ran; kill -9 $$")
    candidates = [grid.Candidate(CELL, plan(), ""), grid.Candidate(replace(CELL, micro_batch=4), None, "does not fit")]
    said: list[str] = []
    rows = measure_all(candidates, there, None, Effort(1, 2), "bf16", said.append)
    assert [(row.outcome, row.gradient_accumulation) for row in rows] == [("out of memory", 1), ("skipped", 0)]
    assert measure_all(candidates, there, None, Effort(1, 2), "bf16", said.append) == rows
    assert (there.folder / "ran").read_text() == "ran\n"
    assert said[1] == "1024-sdpa-none-none-4: skipped, does not fit"
    assert read_rows(there.folder / "rows.jsonl") == rows


def test_rows_of_other_settings_and_failed_ones_are_measured_again(shop: Callable[[str], Workshop]) -> None:
    there = shop("echo ran >>ran; exit 1")
    for setting in ("bf16", "fp32", "fp32"):
        (row,) = measure_all([grid.Candidate(CELL, plan(), "")], there, None, Effort(1, 2), setting, print)
        assert (row.outcome, row.setting) == ("failed", setting)
    assert (there.folder / "ran").read_text() == "ran\n" * 3


def test_samples_of_another_wish_lie_elsewhere(tmp_path: Path) -> None:
    wish = {"packing": "flatten", "sequence_length": 64, "steps": 3, "samples_per_step": 8, "seed": 1, "vocabulary": 100}
    folders = {material_folder(tmp_path, one) for one in (wish, {**wish, "steps": 4}, {**wish, "seed": 2}, {**wish, "vocabulary": 9})}
    assert len(folders) == 4 and all(folder.name.startswith("flatten-64-") for folder in folders)


def test_a_contest_that_is_refused_does_not_end_the_others(shop: Callable[[str], Workshop]) -> None:
    there = shop(TAKES_TURNS)
    refused = grid.Candidate(replace(CELL, sequence_length=4096), None, "does not fit")
    found = contend_all([refused, grid.Candidate(CELL, plan(), "")], there, Effort(1, 2), lambda text: None)
    assert [(one.rival, one.outcome) for one in found] == [
        ("trainer", "skipped"), ("memtune", "skipped"), ("trainer", "measured"), ("memtune", "failed"),
    ]  # fmt: skip
    assert found[0].reason == "does not fit"


TAKES_TURNS = r"""
where=$(dirname "$3"); name=${where##*-}; case $2 in *measure) name=ours;; esac
for step in 1 2 3; do
    echo @ready; read go || exit 1
    echo "$name $step" >>order
done
[ "$name" = memtune ] && exit 5
[ "$name" = ours ] && cpu_s=1 || cpu_s=3
echo "{\"outcome\": \"measured\", \"reason\": \"\", \"step_s\": [2, 4], \"cpu_s\": [1, $cpu_s], \"useful_tokens\": 60, \"samples\": 4,
    \"tokens\": 128, \"micro_batch\": 2, \"device\": \"d\", \"versions\": {}}" >"$where/result.json"
"""


def test_contenders_take_turns(shop: Callable[[str], Workshop]) -> None:
    there = shop(TAKES_TURNS)
    trainer, memtune = contend(CELL, plan(), ("trainer", "memtune"), there, Effort(1, 2), lambda text: None)
    order = (there.folder / "order").read_text().split("\n")[:-1]
    assert order == [f"{name} {step}" for step in (1, 2, 3) for name in ("ours", "trainer", "memtune")]
    assert (trainer.ratio, trainer.cpu_ratio, trainer.bound) == (1.0, 2.0, 2.0)
    assert (memtune.outcome, memtune.reason) == ("failed", "memtune: exit code 5: no word in its log")


# tables


MEASURED = Row(
    CELL, "measured", "", 3, 1, 5, 1.5, 1.4, 1.7, 16.0, 10922.6, 8500.0, 0.778, 0.41, 30.5, 29.1, 30.1, 1.45, 3_400_000, 1_124_886_528,
    "GPU", {"torch": "2.10.0"},
)  # fmt: skip
ROWS = [
    MEASURED,
    Row(replace(CELL, micro_batch=16), "skipped", "does not fit: 150.2 of 139.8 GiB predicted", 2),
    Row(replace(CELL, attention="eager"), "out of memory", "OutOfMemoryError: CUDA out of memory", 3),
    Row(replace(CELL, attention="flash2"), "skipped", "stack x is without flash-attn", 3),
    Row(replace(CELL, adapter="lora"), "failed", "RuntimeError: a|b", 3),
]


def setting(**changes: Any) -> tables.Setting:
    line = line_of(H200)
    made, _ = plan_of()
    return tables.Setting("title", "ftlaunch bench x", made, line.facts, Effort(2, 5), code_lengths(), "2 CPU cores", "2026-11-22")


def test_the_page_has_the_sources_tables() -> None:
    page = tables.markdown(setting(), ROWS)
    assert "| Gradient Checkpointing | Gradient Accumulation Steps | Per Device Train Batch Size | Time per Iteration |" in page
    assert "| False | 3 | 8 | 1.5s | 8 500 | 41.0 % | 30.5 | 30.1 |" in page
    assert "| False | 2 | 16 | does not fit: 150.2 of 139.8 GiB predicted | – | – | – | – |" in page
    assert "| Default (eager) | False | 3 | 8 | out of memory |" in page
    assert "| Flash Attention 2 | False | 3 | 8 | not measured: stack x is without flash-attn |" in page
    assert "failed: RuntimeError: a/b" in page
    assert "1.5s (1.4 to 1.7) | 1.45s | 16 | 10 923 | 8 500 | 77.8 % | 41.0 % | 30.5 | 29.1 | 30.1 | 0.302 % |" in page
    assert "- Software: torch 2.10.0." in page and "Made by `ftlaunch bench x` on 2026-11-22" in page


def test_rows_go_to_csv_and_json_and_back(tmp_path: Path) -> None:
    read_back = list(csv.DictReader(io.StringIO(tables.as_csv(ROWS))))
    assert [row["outcome"] for row in read_back] == [row.outcome for row in ROWS]
    assert (read_back[0]["attention"], read_back[0]["step_s"], read_back[0]["version_torch"]) == ("sdpa", "1.5", "2.10.0")
    document = json.loads(json.dumps(tables.as_json(setting(), ROWS)))
    assert document["rows"][0]["trainable_share"] == pytest.approx(0.003, rel=0.01)
    for row in [*ROWS, replace(MEASURED, step_s=9.0)]:
        append_row(tmp_path / "rows.jsonl", row)
    assert read_rows(tmp_path / "rows.jsonl") == [replace(MEASURED, step_s=9.0), *ROWS[1:]]


@pytest.mark.parametrize(
    ("ratio", "bound", "goals"),
    [
        (1.2, 1.3, "≥ 0.9 of the bound: reached"),
        (1.1, 1.3, "≥ 0.9 of the bound: missed"),
        (1.6, 1.9, "≥ 0.9 of the bound: missed, ≥ 1.5×: reached"),
    ],
)
def test_a_ratio_stands_beside_its_bound_and_goal(ratio: float, bound: float, goals: str) -> None:
    contest = Contest("trainer", CELL, "measured", "", 1.0, ratio, ratio, ratio, ratio, ratio, bound, 3, 2, True, "CPU", {})
    page = tables.markdown(setting(), [], [contest, Contest("memtune", CELL, "failed", "memtune: exit code 1")])
    assert f"| 1024 | trainer | **{ratio:.2f}×** |" in page and f"| {goals} |" in page
    assert "| 1024 | memtune | failed: memtune: exit code 1 |" in page


# the job and the command


def test_one_job_measures_every_cell(tmp_path: Path) -> None:
    made, _ = plan_of(preset(gpus=2), site=site(gpu_request="gres"), slurm={"partition": "gpu", "account": "me"})
    command = Command("ftlaunch-bench", ("bench", "/p/it's.yaml", "--on", "here"), tmp_path)
    text = bench_script(command, made, python="/usr/bin/python3", kept={"FTLAUNCH_DATA": "/data"})
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --ntasks-per-node=1" in lines and f"#SBATCH --cpus-per-task={made.layout.cpus_per_node}" in lines
    assert "#SBATCH --gres=gpu:2" in lines and "#SBATCH --partition=gpu" in lines and "#SBATCH --account=me" in lines
    assert len(lines) == len({line.partition("=")[0] for line in lines})
    assert not [line for line in lines if "signal" in line]
    assert """-m launcher.cli bench '/p/it'"'"'s.yaml' --on here""" in text and "export FTLAUNCH_DATA=/data" in text


def run_bench(folder: Path, *arguments: str) -> Result:
    command = ["bench", str(REPOSITORY / "presets/bench/tiny.yaml"), "--site", "local", "--out", str(folder)]
    return CliRunner().invoke(app, [*command, *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention", "sdpa:fast"], "'sdpa:fast' is not one of eager, sdpa, flash2"),
        (["--checkpointing", "none,some"], "'some' is not one of none, selective, full"),
        (["--adapter", "lora,loar"], "'loar' is not one of none, lora, rslora, dora, qlora"),
        (["--micro-batch", "1,x"], "whole numbers above zero"),
        (["--sequence-length", "0"], "whole numbers above zero"),
        (["--against", "axolotl"], "--against takes trainer"),
        (["--on", "moon"], "'moon' is no place"),
        (["--on", "slurm"], "has no scheduler"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run_bench(tmp_path / "out", *arguments)
    assert isinstance(result.exception, UsageError) and words in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--adapter", "lora"], "the rivals train all weights"),
        (["--checkpointing", "selective"], "the rivals have no selective checkpointing"),
        (["--set", "training.dtype=bf16_pure"], "the rivals do not train in bf16_pure"),
        (["--set", "ranks_per_node=2"], "the rivals are one process, the plan has 2"),
    ],
)
def test_what_the_rivals_cannot_do_is_no_contest(arguments: list[str], reason: str, tmp_path: Path) -> None:
    result = run_bench(tmp_path / "out", "--against", "trainer", *arguments)
    assert isinstance(result.exception, ActionError) and reason in str(result.exception)
    assert reason in (tmp_path / "out" / "against.md").read_text()


def test_a_cell_without_a_plan_is_skipped(shop: Callable[[str], Workshop]) -> None:
    row = measure_one(grid.Candidate(CELL, None, "the preset makes no sense with it"), shop("exit 1"), None, Effort(0, 1))
    assert (row.outcome, row.reason, row.step_s) == ("skipped", "the preset makes no sense with it", None)


def test_on_slurm_one_job_runs_the_same_command_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = make_fake_slurm(tmp_path / "slurm", monkeypatch)
    slurm.answer("sbatch", {"out": "4242\n"})
    monkeypatch.setenv("FTLAUNCH_DATA", str(tmp_path / "data"))
    (tmp_path / "far.yaml").write_text("extends: slurm\nname: far\nsource: a test\ncontainer: {use: none}\n")
    words = ["bench", str(REPOSITORY / H200), "--site", str(tmp_path / "far.yaml"), "--account", "project", "--set", "training.seed=7"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--attention", "sdpa,sdpa:math", "--steps", "3", "--json"])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert json.loads(result.stdout)["job_id"] == "4242" and len(slurm.calls("sbatch")) == 1
    script = (tmp_path / "out" / "ftlaunch-bench.sbatch").read_text()
    assert "--time=0-02:00:00" in script and "--account=project" in script and f"FTLAUNCH_DATA={tmp_path}/data" in script
    typed = shlex.split(script.splitlines()[-1].removesuffix(" </dev/null"))
    assert typed[2:6] == ["-m", "launcher.cli", "bench", str(REPOSITORY / H200)]
    said = dict(pairwise(typed))
    assert said["--attention"] == "sdpa,sdpa:math" and said["--sequence-length"] == "1024,2048,4096" and said["--steps"] == "3"
    assert said["--on"] == "here" and said["--out"] == str(tmp_path / "out") and said["--set"] == "training.seed=7"


def test_fastcodes_flag_measures_that_kind_alone(tmp_path: Path) -> None:
    words = ["bench", str(REPOSITORY / H200), "--site", "local", "--use_flash_attn", "--micro-batch", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ActionError) and "nothing could be measured" in str(result.exception)
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {(row.cell.attention, row.outcome) for row in rows} == {("flash2", "skipped")} and len(rows) == 12
