"""The text of a site file: values come back as they were, and learned facts leave the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.preset.reading import read_site
from launcher.site.site_file import add_facts, flow, scalar
from tests.discovered import discovered


@pytest.mark.parametrize(
    "value", ["on", "null", "24h", "1e5", "0x1", "a: b", "#x", "*", "it's", "", "~", "12", "é", "- a", "a #b", True, 7]
)
def test_scalars_are_read_back(value: object, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    assert YAML(typ="safe").load(f"x: {scalar(value)}")["x"] == value
    assert YAML(typ="safe").load(flow({"a": [value, {str(value): value}]})) == {"a": [value, {str(value): value}]}


def test_learned_facts_keep_the_comments(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(discovered("besteffort"))
    add_facts(file, "strict", {("partitions", "gpu", "driver"): "580.1", ("local_disk",): ["/tmp"]}, "probe")
    site = read_site(str(file)).value
    assert (site.partitions["gpu"].driver, site.partitions["gpu"].qos, site.local_disk) == ("580.1", "regular", ["/tmp"])
    assert site.sources["partitions.gpu.driver"] == "probe" and "local_disk" not in site.unknown
    assert "# without --time a job gets 2h" in file.read_text()


def test_learned_facts_in_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    add_facts(file, "slurm", {("partitions", "a.b", "internet"): False}, "probe")
    site = read_site(str(file)).value
    assert (site.name, site.partitions["a.b"].internet, site.container.use) == ("mine", False, "apptainer")
