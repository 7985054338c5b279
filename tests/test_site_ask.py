"""Asking Slurm: the programs, their failures, and trial requests that it takes or refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli.site import known_gpus
from launcher.errors import ActionError, MissingError
from launcher.site.ask import ask_cluster
from launcher.site.conclude import conclude
from launcher.site.site_file import site_text
from launcher.site.trial import try_requests
from tests.discovered import MACHINE, TODAY, site_of
from tests.fake_cluster import NAMES, cluster_of, make_fake_cluster


@pytest.mark.parametrize("name", NAMES)
def test_the_programs_are_asked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the programs print is what the golden files were made of."""
    fake = make_fake_cluster(name, tmp_path / "bin", monkeypatch)
    asked, known = ask_cluster("student"), cluster_of(name)
    assert (asked.config, asked.partitions, asked.nodes) == (known.config, known.partitions, known.nodes)
    assert (asked.associations, asked.qualities, asked.default_account) == (known.associations, known.qualities, known.default_account)
    assert asked.failed == {} and bool(fake.calls("sacctmgr")) == known.has_accounting


def test_programs_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "node": {"err": "slurm_load_node error: Unable to contact\n"},
        "qos": {"err": "sacctmgr: error: slurm_persist_conn_open: Connection refused\n"},
    }
    make_fake_cluster("besteffort", tmp_path / "bin", monkeypatch, broken=broken)
    cluster = ask_cluster("student")
    assert cluster.nodes == () and cluster.qualities == ()
    assert set(cluster.failed) == {"scontrol -o show node", "sacctmgr -n -P show qos"}
    text = site_text(conclude(cluster, MACHINE, known_gpus(), name=None, today=TODAY))
    site = site_of(text, tmp_path)
    assert site.partitions["gpu"].gpus_per_node == 4  # by the partition's TRES
    assert "scontrol -o show node failed: slurm_load_node error: Unable to contact" in text


@pytest.mark.parametrize(
    ("name", "refused", "request_", "memory", "asked"),
    [
        ("besteffort", [], "gres", "mem", 1),
        ("besteffort", ["--gres=gpu:volta:1"], "gpus_per_node", "mem", 2),
        ("besteffort", ["--gres=gpu:volta:1", "--gpus-per-node=volta:1", "--mem=1G"], "gpus_per_task", "none", 7),
        ("whole", [], "none", "none", 1),
        ("bare", ["--partition=all"], "gres", "none", 4),
    ],
)
def test_slurm_is_asked_whether_it_would_take_a_job(
    name: str, refused: list[str], request_: str, memory: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: dict[str, dict[str, object]] = {word: {"err": f"sbatch: error: no {word[2:5]} here\n"} for word in refused}
    fake = make_fake_cluster(name, tmp_path / "bin", monkeypatch, broken=broken)
    draft = conclude(cluster_of(name), MACHINE, known_gpus(), name=None, today=TODAY)
    try_requests(draft, str(tmp_path / "bin" / "sbatch"), today=TODAY)
    assert (draft.values["gpu_request"], draft.values["memory"]) == (request_, memory)
    assert len(fake.calls("sbatch")) == asked and all(call[0] == "--test-only" for call in fake.calls("sbatch"))
    assert ("gpu_request" in draft.unknown) == (name == "bare")
    assert draft.notes[""][-1].startswith("Slurm refuses" if name == "bare" else "Slurm takes a job asked for by")
    site_of(site_text(draft), tmp_path)


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="scontrol"):
        ask_cluster("student")


def test_no_answer_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"scontrol": {"err": "Unable to contact slurm controller (connect failure)\n"}}
    make_fake_cluster("besteffort", tmp_path / "bin", monkeypatch, broken=broken)
    with pytest.raises(ActionError, match="Unable to contact"):
        ask_cluster("student")
