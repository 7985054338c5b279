"""What Slurm prints → facts: records, times, GRES, and the kind of GPU that a name or a feature means."""

from __future__ import annotations

import pytest

from launcher.cli.site import known_gpus
from launcher.site import slurm_facts
from launcher.site.kinds import kind_of
from launcher.site.slurm_facts import Gres


@pytest.mark.parametrize(
    ("gres_type", "features", "kind"),
    [
        ("a100", (), None),
        ("a100", ("rome", "mem_80"), None),
        ("a100", ("a100_80",), "a100-80gb"),
        ("nvidia_a100-sxm4-40gb", (), "a100-40gb"),
        ("nvidia_a100-pcie-40gb", (), "a100-pcie-40gb"),
        ("volta", ("volta16",), "v100-16gb"),
        ("h100", (), "h100"),
        ("gh200", (), "gh200"),
        (None, ("GPU_SKU:A100_SXM4", "GPU_MEM:80GB"), "a100-80gb"),
    ],
)
def test_kind(gres_type: str | None, features: tuple[str, ...], kind: str | None) -> None:
    found = kind_of(gres_type, features, known_gpus())
    assert found is not None and found.name == kind


@pytest.mark.parametrize(("gres_type", "features"), [("a100_1g.10gb", ()), (None, ("skylake", "ib"))])
def test_no_kind(gres_type: str | None, features: tuple[str, ...]) -> None:
    assert kind_of(gres_type, features, known_gpus()) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu:a100:4(S:0-1),nvme:1", (Gres("gpu", "a100", 4), Gres("nvme", None, 1))),
        ("gpu:4", (Gres("gpu", None, 4),)),
        ("gpu:1g.10gb:7(S:0,1)", (Gres("gpu", "1g.10gb", 7),)),
        ("localtmp:2G", (Gres("localtmp", None, 2**31),)),
        ("gpu:4090:8", (Gres("gpu", "4090", 8),)),
        ("(null)", ()),
    ],
)
def test_gres(text: str, found: tuple[Gres, ...]) -> None:
    assert slurm_facts.gres(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("1-00:00:00", 1440), ("02:00:00", 120), ("00:00:30", 1), ("30", 30), ("10:30", 11), ("2-12", 3600), ("UNLIMITED", None), ("", None)],
)
def test_minutes(text: str, found: int | None) -> None:
    assert slurm_facts.minutes(text) == found


def test_values_with_spaces_and_equals_signs() -> None:
    (record,) = slurm_facts.records(
        "NodeName=n1 OS=Linux 5.14 #1 SMP RealMemory=10 Reason=a=b c d [root@2026] Partitions=x,y\n   State=DOWN*"
    )
    assert (record["OS"], record["RealMemory"], record["Partitions"], record["State"]) == ("Linux 5.14 #1 SMP", "10", "x,y", "DOWN*")
