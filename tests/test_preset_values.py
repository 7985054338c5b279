"""Values of a preset: YAML 1.2, durations, sizes, and texts that no shell, script or terminal may get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.preset.complaints import shown
from launcher.preset.reading import (
    read_preset,
)
from tests.preset_files import GOOD, write


@pytest.mark.parametrize("wrap", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["bom", "crlf"])
def test_other_editors(tmp_path: Path, wrap: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(wrap(f"extends: {GOOD}\nname: other\n").encode())  # type: ignore[operator]
    assert read_preset(str(path)).value.name == "other"


def test_yaml_1_2_values(tmp_path: Path) -> None:
    text = f"extends: {GOOD}\ntraining: {{learning_rate: 1e-5}}\ndescription: no\nslurm: {{time: 24:00:00}}\nevaluation: {{every: 50}}\n"
    preset = read_preset(str(write(tmp_path, "x.yaml", text))).value
    assert (preset.training.learning_rate, preset.description, preset.slurm.time, preset.evaluation.every) == (1e-5, "no", "24h", "50")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), (".5", 0.5), ("+5", 5), ("0x10", 16), ("0o10", 8), ("-0", 0), ("1.", 1.0)],
)
def test_numbers_of_yaml_1_2(text: str, value: float) -> None:
    setting = f"model={{tokenizer: train, config: {{model_type: llama, x: {text}}}}}"
    config = read_preset(GOOD, settings=[setting]).value.model.config
    assert config is not None and config["x"] == value and type(config["x"]) is type(value)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("24:00:00", "24h"), ("1-00:00:00", "24h"), ("1-12:30", "2190m"), ("90m", "90m"), ("1.5h", "90m"), ("2d", "48h"), ("61s", "2m")],
)
def test_durations(text: str, kept: str) -> None:
    assert read_preset(GOOD, settings=[f"slurm.time={text}"]).value.slurm.time == kept


UNIT = "write 48h, 90m, 2d or 'days-hours:minutes:seconds'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("90", "90 has no unit: write 90m or 90h, or 'days-hours:minutes:seconds'"),
        ("0", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("-5", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("1e2", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("true", "write a duration with its unit: 48h, 90m, 2d or 'days-hours:minutes:seconds'"),
        ("-5m", f"'-5m' is not a duration: {UNIT}"),
        ("1:60:00", f"'1:60:00' is not a duration: {UNIT}"),
        ("1h30", f"'1h30' is not a duration: {UNIT}"),
        ("0h", "a duration must be above zero"),
        ("400d", "a duration must be at most 366d"),
        ("9" * 400 + "h", f"'{'9' * 60}' is not a duration: {UNIT}"),
    ],
    ids=lambda text: text[:12],
)
def test_durations_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_preset(GOOD, settings=[f"slurm.time={text}"])
    assert str(error.value) == f"--set: slurm.time: {message}"


@pytest.mark.parametrize(("text", "gib"), [("80", 80), ("80GiB", 80), ("80GB", 75), ("1.5 TiB", 1536), ("512MiB", 1)])
def test_sizes(text: str, gib: int) -> None:
    assert read_preset(GOOD, settings=[f"memory_per_node_gib={text}"]).value.memory_per_node_gib == gib


HOSTILE = {
    "directive": "x\n#SBATCH --uid=0",
    "command": "x\nrm -rf ~",
    "substitution": "$(id)",
    "backticks": "`id`",
    "quotes": "a'\"b",
    "pattern": "%j",
    "option": "-x",
    "empty": "",
    "long": "x" * 65,
    "nul": "a\0b",
    "escape": "a\x1bb",
    "line-separator": "a\u2028b",
    "direction": "a\u202eb",
    "right-to-left-mark": "a\u200fb",
}
NAME = "letters, digits, '.', '_' and '-', first a letter or digit, at most 64"
PARTITION = "a partition, or several with commas between: letters, digits, '.', '_' and '-', at most 64 each"


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    ("key", "rule"),
    [("name", NAME), ("hardware", NAME), ("slurm.account", NAME), ("slurm.qos", NAME), ("slurm.partition", PARTITION)],
    ids=lambda text: text if " " not in text else "",
)
def test_nothing_hostile_is_a_name(key: str, rule: str, value: str, tmp_path: Path) -> None:
    room, _, name = key.rpartition(".")
    written = f"{name}: {json.dumps(value)}"
    path = write(tmp_path, "x.yaml", f"extends: {GOOD}\n{f'{room}: {{{written}}}' if room else written}\n")
    with pytest.raises(UsageError) as error:
        read_preset(str(path))
    (finding,) = error.value.findings
    assert (finding.line, finding.column, finding.key, finding.hint) == (2, len(room) + 4 if room else 1, key, rule)
    assert finding.message == f"{shown(value)} is not allowed" and finding.message.isprintable()


@pytest.mark.parametrize("value", [HOSTILE[name] for name in HOSTILE if name not in ("pattern", "long")])
@pytest.mark.parametrize("key", ["constraint", "exclude", "mail"])
def test_nothing_hostile_is_an_argument(key: str, value: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        read_preset(GOOD, settings=[f"slurm.{key}={json.dumps(value)}"])
