"""Staging as the launcher calls it: real processes, real libraries, a hub on this machine, real SIGKILL."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ActionError, MissingError, UsageError
from launcher.plan import Container, Staged
from launcher.preset.schema import Preset
from launcher.preset.stack import Stack
from launcher.stage import find_staged, local_fingerprints, stage
from launcher.stage.child import Where
from tests.stage.hub import COMMIT, Repositories, hub

pytestmark = pytest.mark.train

STACK = {
    "name": "cpu",
    "base": {"kind": "debootstrap", "suite": "bookworm"},
    "python": "3.11",
    "packages": {"torch": "2", "transformers": "5"},
}
TINY = {
    "model_type": "starcoder2",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Shop = Callable[..., Staged]


def preset_of(changes: dict[str, dict[str, Any]]) -> Preset:
    value: dict[str, Any] = {
        "name": "tiny",
        "model": {"config": TINY, "tokenizer": "train"},
        "data": {"path": "stdlib", "num_samples": 40, "eval_share": 0.1},
        "training": {"sequence_length": 64, "effective_batch": 4, "learning_rate": 1e-3},
        "evaluation": {"every": "epoch"},
        "hardware": "cpu",
        "gpus": 0,
        "stack": "cpu",
    }
    for room, values in changes.items():
        value[room] = values if "path" in values or "name" in values or "config" in values else {**value[room], **values}
    return Preset.model_validate(value)


def run(data: Path, told: list[str], /, *, environ: dict[str, str] | None = None, python: str = sys.executable, **changes: Any) -> Staged:
    return stage(
        preset_of(changes),
        Stack.model_validate(STACK),
        Container("none"),
        data,
        python=python,
        environ={**os.environ, **(environ or {})},
        progress=told.append,
    )


def find(data: Path, /, **changes: Any) -> Staged | None:
    container = Container("none")
    return find_staged(preset_of(changes), Stack.model_validate(STACK), container, data, python=sys.executable, environ=dict(os.environ))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="session")
def tiny(shelf: Path) -> Staged:
    """The tiny model on the standard library, made once for all tests of this file."""
    return run(shelf, [])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def jsonl(path: Path, contents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in contents))
    return path


def test_tiny_on_the_standard_library(tiny: Staged, shelf: Path) -> None:
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train, evaluation = load_from_disk(f"{tiny.data}/train"), load_from_disk(f"{tiny.data}/eval")
    assert (len(train), len(evaluation)) == (tiny.train_samples, tiny.eval_samples) == (36, 4)
    assert sum(train["num_targets"]) == tiny.train_targets
    assert len(tiny.data_sha) == 64
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model), AutoTokenizer.from_pretrained(tiny.model)
    assert len(tokenizer) == model.config.vocab_size == 512
    assert max(max(sample) for sample in train["input_ids"]) < 512
    facts = json.loads(Path(tiny.data, "facts.json").read_text())
    assert {"cut_share", "length_histogram", "dropped", "versions", "tokenizer_sha", "key"} <= facts.keys()
    assert (tiny.length_bin_tokens, tiny.length_counts) == tuple(facts["length_histogram"].values())
    assert sum(tiny.length_counts) == tiny.train_samples
    assert tiny.cut_share == facts["cut_share"] > 0
    assert [name for room in ("models", "datasets") for name in names(shelf / room) if name.startswith(".")] == []


def test_the_second_time_nothing_is_done(tiny: Staged, shelf: Path) -> None:
    def states() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in shelf.rglob("*")}

    told: list[str] = []
    before = states()
    assert run(shelf, told) == tiny
    assert told == []
    assert states() == before


def test_the_key_holds_what_determines_the_samples(tiny: Staged, shelf: Path) -> None:
    shorter = run(shelf, [], training={"sequence_length": 32})
    assert (shorter.model, shorter.data_sha) == (tiny.model, tiny.data_sha)
    assert shorter.data != tiny.data
    told: list[str] = []
    assert run(shelf, told, data={"packing": "flatten"}) == tiny, "flatten trains on the same samples"
    assert run(shelf, told, training={"effective_batch": 7, "learning_rate": 1.0}) == tiny
    assert told == []


def test_a_mixture_is_packed_staged_and_found_again(tiny: Staged, tmp_path: Path) -> None:
    from datasets import load_from_disk

    code = jsonl(tmp_path / "code.jsonl", [f"value = {number}\n" * (number % 5 + 1) for number in range(60)])
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"{number}: ", "completion": "x"}) + "\n" for number in range(60)))
    for file in (code, tasks, *Path(tiny.model).iterdir()):
        os.utime(file, (1, 1))  # what changed a moment ago is hashed again
    sources = [{"path": str(code), "weight": 3}, {"path": str(tasks), "format": "prompt_completion"}]
    data = {"path": None, "sources": sources, "packing": "documents", "num_samples": 60, "eval_share": 0.1}
    changes: dict[str, Any] = {"model": {"path": tiny.model}, "data": data}
    told: list[str] = []
    staged = run(tmp_path / "shelf", told, **changes)
    facts = json.loads(Path(staged.data, "facts.json").read_text())
    assert [(source["label"], source["train"], source["held_out"]) for source in facts["sources"]] == [
        ("code.jsonl", 41, 5),
        ("tasks.jsonl", 13, 1),
    ]
    assert "code.jsonl: 41 of 54 training documents (75.9%), from 60" in told
    train = load_from_disk(f"{staged.data}/train")
    assert sum(map(len, train["lengths"])) == 54 == sum(staged.length_counts)
    assert [sum(lengths) for lengths in train["lengths"]] == [len(ids) for ids in train["input_ids"]]
    assert facts["fill_share"] == sum(map(len, train["input_ids"])) / (64 * len(train)) > 0.8
    assert find(tmp_path / "shelf", **changes) == staged
    sources[1]["weight"] = 2
    assert find(tmp_path / "shelf", **changes) is None, "another weight is other data"
    fingerprints = local_fingerprints(preset_of(changes))
    tasks.write_text(tasks.read_text().replace('"x"', '"y"'))
    assert local_fingerprints(preset_of(changes)) != fingerprints


def test_a_changed_file_is_another_data_set(tiny: Staged, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [f"value = {number}\n" for number in range(12)])
    changes = {"model": {"path": tiny.model}, "data": {"path": str(path)}, "evaluation": {"every": "never"}}
    first = run(tmp_path / "shelf", [], **changes)
    assert (first.model, first.train_samples, first.eval_samples) == (tiny.model, 12, 0)
    assert len(first.model_sha) == 64 and tiny.model_sha == "", "a local model is known by its content"
    jsonl(path, [f"value = {number}\n" for number in range(11, -1, -1)])
    second = run(tmp_path / "shelf", [], **changes)
    assert second.data != first.data
    assert second.data_sha != first.data_sha
    assert len(names(tmp_path / "shelf/datasets")) == 2


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        pytest.param({"training": {"effective_batch": 37}}, "training.effective_batch", "37 is more than the 36 training", id="batch"),
        pytest.param({"data": {"path": "nowhere.jsonl"}}, "data.path", "does not exist", id="no file"),
        pytest.param({"model": {"path": "nowhere"}}, "model.path", "it is not a folder", id="no model"),
    ],
)
def test_what_cannot_be_trained_on_is_said_by_key(tiny: Staged, shelf: Path, changes: Any, key: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(shelf, [], **changes)
    assert caught.value.findings[0].key == key


def test_an_evaluation_without_data_is_refused_also_when_staged(tiny: Staged, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", ["x = 1\n"] * 8)
    changes = {"model": {"path": tiny.model}, "data": {"path": str(path)}}
    run(tmp_path / "shelf", [], **changes, evaluation={"every": "never"})
    with pytest.raises(UsageError, match="nothing is held out"):
        run(tmp_path / "shelf", [], **changes)


def test_an_error_in_the_process_arrives_whole_and_leaves_nothing(tiny: Staged, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"content": "a"}\n{"text": "b"}\n')
    with pytest.raises(UsageError, match="no column 'content'; there are: text") as caught:
        run(tmp_path / "shelf", [], model={"path": tiny.model}, data={"path": str(path)})
    finding = caught.value.findings[0]
    assert (finding.file, finding.line, finding.key, finding.code) == (str(path), 2, "data.text_column", "no-column")
    assert names(tmp_path / "shelf/datasets") == []


HOST = """
import sys
sys.path[:0] = [sys.argv[1]]
from tests.test_stage import run
from pathlib import Path
run(Path(sys.argv[2]), type("Lines", (), {"append": lambda self, line: print(line, flush=True)})())
"""


def test_killed_in_the_middle_then_staged_again(tmp_path: Path) -> None:
    repository = str(Path(__file__).parent.parent)
    with subprocess.Popen([sys.executable, "-c", HOST, repository, str(tmp_path)], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        line = next(line for line in host.stdout if line.startswith("training a tokenizer"))
        children = [int(pid) for pid in Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()]
        watched = [os.pidfd_open(pid) for pid in children]
        host.kill()
    assert line and len(watched) == 1
    for descriptor in watched:
        assert select.select([descriptor], [], [], 60)[0], "the child outlived its parent"
        os.close(descriptor)
    left = names(tmp_path / "models")
    assert [name for name in left if name.startswith(".lock-")]
    assert [name for name in left if name.startswith(".tmp-")]
    assert not [name for name in left if not name.startswith(".")]
    staged = run(tmp_path, [])
    assert names(tmp_path / "models") == [Path(staged.model).name]
    assert names(tmp_path / "datasets") == [Path(staged.data).name]


def test_a_staging_process_that_dies_without_a_word(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    where = Where(Container("none"), str(python), {}, tmp_path, lambda line: None)
    with pytest.raises(ActionError, match=r"x\.log: staging was killed by signal 9 .*memory") as caught:
        where.run("stage.prepare", {}, scratch=tmp_path / "scratch", log=tmp_path / "x.log")
    assert caught.value.exit_code == 5


def test_an_unexpected_error_has_its_traceback_in_the_log_only(tmp_path: Path) -> None:
    where = Where(Container("none"), sys.executable, dict(os.environ), tmp_path, lambda line: None)
    with pytest.raises(ActionError, match=r"x\.log: staging failed: KeyError: 'task' \(this log says more\)") as caught:
        where.run("stage.prepare", {}, scratch=tmp_path / "scratch", log=tmp_path / "x.log")
    assert len(str(caught.value).splitlines()) == 1
    assert "Traceback" in (tmp_path / "x.log").read_text()


def test_an_interpreter_without_the_packages_or_none_at_all(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(MissingError, match=r"has no torch, transformers.*pip install") as caught:
        run(tmp_path / "shelf", [], python=str(tmp_path / "bare/bin/python"))
    assert caught.value.exit_code == 4
    with pytest.raises(MissingError, match="does not run"):
        run(tmp_path / "shelf", [], python=str(tmp_path / "nowhere"))


def test_the_callers_python_environment_stays_out(tiny: Staged, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("raise SystemExit('the wrong datasets')")
    changes = {"training": {"sequence_length": 33}}
    assert run(shelf, [], environ={"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere"}, **changes).train_samples == 36


def test_the_command_in_a_container(tmp_path: Path) -> None:
    container = Container("apptainer", image="/images/x.sif", command="/usr/bin/apptainer")
    environ = {"HUGGING_FACE_HUB_TOKEN": "hf_canary", "LD_LIBRARY_PATH": "/host", "PYTHONPATH": "/host"}
    where = Where(container, "python", environ, Path("/data"), lambda line: None)
    argv, inherited = where._command("stage.fetch", Path("/data/r.json"), Path("/data/s"), [Path("/my data")])
    assert argv[:2] == ["/usr/bin/apptainer", "exec"]
    assert argv[-4:] == ["python3", "-m", "launcher.stage.fetch", "/data/r.json"]
    assert {"type=bind,source=/data,destination=/data", "type=bind,source=/my data,destination=/my data,ro"} <= set(argv)
    assert "PYTHONPATH=/opt/ftlaunch" in argv
    assert not [argument for argument in argv if "canary" in argument]
    assert inherited == {"HF_TOKEN": "hf_canary"}
    argv, inherited = where._command("stage.prepare", Path("/data/r.json"), Path("/data/s"), [])
    assert "HF_HUB_OFFLINE=1" in argv
    assert inherited == {}


@pytest.fixture
def repositories(tiny: Staged) -> Repositories:
    model = {file.name: file.read_bytes() for file in Path(tiny.model).iterdir() if file.name != "facts.json"}
    records = {
        f"{split}.jsonl": "".join(json.dumps({"content": f"{split} = {number}\n"}) + "\n" for number in range(count)).encode()
        for split, count in (("train", 30), ("valid", 5))
    }
    card = "---\nconfigs:\n- config_name: 20k\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "valid")
    )
    tasks = "".join(json.dumps({"q": f"{number}: ", "a": "x"}) + "\n" for number in range(12)).encode()
    return {
        "datasets/some/tasks": {"train.jsonl": tasks},
        "models/some/model": {**model, "pytorch_model.bin": b"a pickle", "onnx/model.safetensors": b"another format"},
        "datasets/some/data": {**records, "README.md": f"{card}---\n".encode()},
    }


@pytest.fixture
def served(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    requests: list[str] = []
    with hub(repositories, requests) as address:
        yield address, requests


HUB_CHANGES: dict[str, Any] = {"model": {"name": "some/model"}, "data": {"name": "some/data", "subset": "20k"}}


def test_hub_names_are_staged_at_their_commits(served: tuple[str, list[str]], tiny: Staged, tmp_path: Path) -> None:
    address, requests = served
    environ = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_canary"}
    staged = run(tmp_path, [], environ=environ, **HUB_CHANGES)
    assert (staged.model_revision, staged.data_revision, staged.data_sha) == (COMMIT, COMMIT, COMMIT)
    assert (staged.train_samples, staged.eval_samples) == (30, 5)
    assert Path(staged.model, "model.safetensors").read_bytes() == Path(tiny.model, "model.safetensors").read_bytes()
    assert not {"pytorch_model.bin", "onnx", ".cache"} & set(names(Path(staged.model)))
    assert all("hf_canary" in line for line in requests if "/api/" in line)
    assert "GET api/models/some/model/revision/main hf_canary" in requests
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_canary" in path.read_bytes()]
    requests.clear()
    assert run(tmp_path, [], environ=environ, **HUB_CHANGES) == staged
    assert requests == [], "the second time the hub is not asked"


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        pytest.param({"model": {"name": "some/other"}}, "model.name", "the hub has no model some/other", id="no such model"),
        pytest.param({"data": {"name": "some/other"}}, "data.name", "the hub has no dataset some/other", id="no such data"),
        pytest.param({"model": {"name": "some/model", "revision": "v9"}}, "model.revision", "has no revision v9", id="no such revision"),
        pytest.param({"data": {"name": "some/data", "subset": "9k"}}, "data.subset", r"'9k' not found.*20k", id="no such subset"),
        pytest.param(
            {"data": {"name": "some/data", "text_column": "code"}}, "data.text_column", "no column 'code'; there are: content", id="column"
        ),
    ],
)
def test_what_the_hub_does_not_have(served: tuple[str, list[str]], tmp_path: Path, changes: Any, key: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(tmp_path, [], environ={"HF_ENDPOINT": served[0]}, **{**HUB_CHANGES, **changes})
    assert caught.value.findings[0].key == key
    assert not [name for room in ("models", "raw", "datasets") for name in names(tmp_path / room) if name.startswith(".tmp-")]


def test_a_mixture_with_a_source_on_the_hub(served: tuple[str, list[str]], tiny: Staged, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [f"value = {number}\n" for number in range(20)])
    columns = {"format": "prompt_completion", "prompt_column": "q", "completion_column": "a"}
    sources: list[dict[str, Any]] = [{"path": str(path), "weight": 2}, {"name": "some/tasks", **columns}]
    changes: dict[str, Any] = {"model": {"path": tiny.model}, "data": {"path": None, "sources": sources}, "evaluation": {"every": "never"}}
    staged = run(tmp_path / "shelf", [], environ={"HF_ENDPOINT": served[0]}, **changes)
    assert (staged.train_samples, staged.data_revision) == (30, COMMIT)
    assert staged.data_sha not in ("", COMMIT)
    sources[1]["completion_column"] = "b"
    with pytest.raises(UsageError, match=r"some/tasks: data\.completion_column: no column 'b'; there are: a, q"):
        run(tmp_path / "shelf", [], environ={"HF_ENDPOINT": served[0]}, **changes)


def test_without_a_network_it_is_said_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ActionError, match=r"could not be fetched from the hub.*stage where there is Internet, or give data\.path"
    ) as caught:
        run(tmp_path, [], environ={"HF_ENDPOINT": "http://127.0.0.1:9"}, **HUB_CHANGES)
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) == 1
