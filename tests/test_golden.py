"""Every shipped preset's definition, batch script and plan, whole; and a real Slurm accepts each script."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.preset.reading import read_preset, shipped_presets
from tests.conftest import REPOSITORY, Cluster
from tests.make_golden import GOLDEN, golden_files

FEATURES = {"a100-40gb": "a100-40gb", "a100-80gb": "a100-80gb", "memtune-a100-80gb": "memtune"}
"""The test cluster tells its three kinds of A100 nodes apart by a feature."""


def test_golden_files() -> None:
    expected = {str(path.relative_to(GOLDEN)): path.read_text() for path in GOLDEN.rglob("*") if path.is_file()}
    rendered = golden_files()
    assert sorted(rendered) == sorted(expected), "make golden"
    for name, text in rendered.items():
        assert text == expected[name], f"{name} changed; if that is meant: make golden"


@pytest.mark.slurm
@pytest.mark.parametrize("name", shipped_presets())
def test_slurm_accepts_the_batch_script(cluster: Cluster, name: str) -> None:
    """On a cluster with one idle node for each shipped hardware."""
    preset = read_preset(name).value
    folder = cluster.home / "rendered" / name
    site = cluster.readable(REPOSITORY / "tests" / "hpc" / "site.yaml")
    feature = FEATURES.get(preset.hardware)
    options = ["--constraint", feature] if feature else []
    cluster.run(cluster.ftlaunch, "render", name, "--site", site, "--partition", "catalogue", "--out", folder, *options)
    script = (folder / "job.sbatch").read_text()
    gpus = f"--gres=gpu:{preset.hardware.partition('-')[0] if 'memtune' not in preset.hardware else 'a100'}:{preset.gpus}"
    assert (gpus in script) == (preset.gpus > 0)
    done = cluster.run("sbatch", "--test-only", "--account", "project", Path(folder) / "job.sbatch")
    assert "to start at" in done.stderr
