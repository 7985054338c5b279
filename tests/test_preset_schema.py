"""The JSON schema that editors use: it is what is committed, accepts what ships, refuses what is broken, and explains every key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from launcher.preset.json_schema import COMMENT, FILE, SCHEMAS, json_schema
from launcher.preset.tree import parse, plain
from tests.conftest import REPOSITORY

PRESETS = REPOSITORY / "presets"
BROKEN = REPOSITORY / "tests" / "broken"
GOOD = "name: x\nmodel: {name: a/b}\ndata: {name: a/c}\ntraining: {sequence_length: 8, effective_batch: 2, learning_rate: 1e-5}\n"
GOOD += "hardware: cpu\ngpus: 0\nstack: cpu\n"

SHIPPED = {
    "preset": PRESETS.glob("*.yaml"),
    "hardware": PRESETS.glob("hardware/*.yaml"),
    "site": PRESETS.glob("sites/*.yaml"),
    "model": PRESETS.glob("models/*.yaml"),
    "stack": (REPOSITORY / "containers").glob("*.yaml"),
}


def value_of(text: str) -> Any:
    findings: list[Any] = []
    tree = parse(text, "x.yaml", findings)
    assert tree is not None and findings == []
    return plain(tree)


def wrong(text: str, schema: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft7Validator(schema).iter_errors(value_of(text))
    return sorted(f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors)


@pytest.mark.parametrize(
    ("noun", "file"),
    [(noun, file) for noun, files in SHIPPED.items() for file in sorted(files)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_what_ships_fits_its_schema(noun: str, file: Path) -> None:
    assert wrong(file.read_text(), json_schema(noun)) == []


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_editors_find_the_schema_of_a_shipped_preset(file: Path) -> None:
    """As an editor does: the first line's path, from the folder of the file."""
    named = re.fullmatch(f"{re.escape(COMMENT)}(.+)", file.read_text().splitlines()[0])
    assert named is not None
    assert wrong(file.read_text(), json.loads((file.parent / named[1]).read_text())) == []


def test_the_committed_schema_is_what_the_command_prints() -> None:
    printed = subprocess.run([sys.executable, "-m", "launcher.cli", "schema"], capture_output=True, text=True, check=True).stdout
    assert (PRESETS / FILE).read_text() == printed, f"ftlaunch schema > presets/{FILE}"


def test_the_schema_is_in_the_wheel(wheel: Path) -> None:
    assert f"launcher/presets/{FILE}" in zipfile.ZipFile(wheel).namelist()


def test_a_shown_preset_names_the_schema_from_everywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", "presets", "show", "tiny"]
    copy = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "HOME": "/"}
    )
    assert copy.stdout.splitlines()[0] == f"{COMMENT}{PRESETS / FILE}"


@pytest.mark.parametrize("noun", SCHEMAS)
def test_every_schema_is_one(noun: str) -> None:
    jsonschema.Draft7Validator.check_schema(json_schema(noun))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, []),
        ("extends: tiny\n", []),
        ("extends: tiny\ntraining: {epochs: 2}\nadapter: {rank: 4}\nmodel: {revision: null}\nslurm: null\n", []),
        ("extends: tiny\nslurm: {time: 24:00:00}\ncheckpoint: {every: 50}\nmemory_per_node_gib: 80GB\n", []),
        ("extends: tiny\nmodel: {tokenizer: train, config: {model_type: llama, anything: [1]}}\n", []),
        (GOOD.replace("gpus: 0\n", ""), [": 'gpus' is a required property"]),
        (GOOD.replace("sequence_length: 8, ", ""), ["training: 'sequence_length' is a required property"]),
        (GOOD + "adapter: {rank: 4}\n", ["adapter: 'kind' is a required property"]),
        ("extends: tiny\nslrum: {}\n", [": Additional properties are not allowed ('slrum' was unexpected)"]),
        ("extends: tiny\ntraining: {dtype: bf32}\n", ["training.dtype: 'bf32' is not one of ['fp32', 'bf16', 'bf16_pure', 'fp16', None]"]),
        ("extends: tiny\ngpus: two\n", ["gpus: 'two' is not of type 'integer', 'null'"]),
        ("extends: tiny\nnodes: 0\n", ["nodes: 0 is less than or equal to the minimum of 0"]),
        ("extends: tiny\nslurm: {time: 90}\n", ["slurm.time: 90 is not of type 'string', 'null'"]),
        ("extends: 5\n", ["extends: 5 is not of type 'string'"]),
    ],
    ids=[
        "whole",
        "extends",
        "partial",
        "units",
        "free",
        "missing",
        "missing-inside",
        "kind",
        "key",
        "choice",
        "type",
        "range",
        "unit",
        "base",
    ],
)
def test_what_the_schema_says(text: str, expected: list[str]) -> None:
    assert wrong(text, json_schema("preset")) == expected


@pytest.mark.parametrize("name", ["unknown-key", "wrong-types", "wrong-values", "missing-keys", "hostile-name", "units", "list", "escapes"])
def test_the_schema_refuses_a_broken_preset(name: str) -> None:
    assert wrong((BROKEN / f"{name}.yaml").read_text(), json_schema("preset"))


def test_every_key_of_a_preset_has_a_meaning_and_every_number_a_unit() -> None:
    schema = json_schema("preset")
    entries = dict(schema["properties"])
    for name, definition in schema["definitions"].items():
        entries |= {f"{name}.{key}": entry for key, entry in definition["properties"].items()}
    assert [key for key, entry in entries.items() if not entry.get("description")] == []
    numbers = [key for key, entry in entries.items() if re.search('"(integer|number)"', json.dumps(entry))]
    assert [key for key in numbers if "Unit: " not in entries[key]["description"]] == ["Checkpoint.every", "Evaluation.every"]


def test_an_unknown_schema() -> None:
    done = subprocess.run([sys.executable, "-m", "launcher.cli", "schema", "prest"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error there is no schema of the name 'prest' (did you mean preset?)\n")
