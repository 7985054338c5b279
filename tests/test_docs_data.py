"""The examples of docs/data.md are read as presets and planned; a format or packing without an example is a gap."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from launcher.plan import Container
from launcher.planner import make_plan
from launcher.preset.json_schema import json_schema
from launcher.preset.reading import read_hardware, read_preset, read_site, read_stack
from launcher.preset.schema import Format, Packing
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(data:\n.*?)```", TEXT, re.DOTALL)
FILES = {
    "code.jsonl": {"content": "x = 1\n"},
    "tasks.jsonl": {"prompt": "a", "completion": "b"},
    "talks.jsonl": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: "-".join(map(str, yaml.safe_load(example)["data"].values()))[:40])
def test_an_example_is_read_and_planned(example: str, tmp_path: Path) -> None:
    for name, row in FILES.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "mine.yaml").write_text(f"extends: tiny\n{example}")
    preset = read_preset(str(tmp_path / "mine.yaml"), home=tmp_path).value
    said = yaml.safe_load(example)["data"]
    for source in preset.data.several:
        assert source.path == "stdlib" or Path(source.path or "").parent == tmp_path, "paths count from the file that says them"
        if source.path != "stdlib":
            row = FILES[Path(source.path or "").name]
            columns = {"text": ["text"], "fim": ["text"], "chat": ["messages"], "prompt_completion": ["prompt", "completion"]}
            assert all(getattr(source, f"{name}_column") in row for name in columns[str(source.format)])
    plan, findings = make_plan(
        preset, read_hardware("cpu").value, read_site("local").value, read_stack("cpu").value, container=Container("none")
    )
    assert [finding for finding in findings if finding.level == "error"] == []
    assert {key: plan.preset["data"][key] for key in said if key not in ("path", "sources")} == {
        key: value for key, value in said.items() if key not in ("path", "sources")
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_editor_accepts_an_example(example: str) -> None:
    jsonschema.validate({"extends": "tiny", **yaml.safe_load(example)}, json_schema("preset"))


def test_every_format_and_packing_is_told_of() -> None:
    assert {yaml.safe_load(example)["data"].get("format", "text") for example in EXAMPLES} == set(get_args(Format))
    assert all(f"`{packing}`" in TEXT for packing in get_args(Packing))
