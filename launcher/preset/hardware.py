"""Hardware: a node as data. ``presets/hardware/<name>.yaml``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.preset.fields import Frozen, Name, Text, Word

Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class Efficiency(Frozen):
    """Share of the dense peak that large matrix products reach in training; everything else that takes time is modelled apart."""

    tensor: Share | None = None
    """Of the fp16, bf16 and tf32 peaks (tensor cores); none: ``launcher.hardware.time`` takes that of an A100."""
    fp32: Share | None = None
    """Of the fp32 peak (CUDA cores); none: as ``tensor``."""
    source: Text = ""
    """What they were fitted on, by ``python -m benchmarks.fit_efficiency``, or who says so."""


class Gpu(Frozen):
    kind: Name
    """Our name of the GPU: ``a100-80gb``."""
    gres_type: Word | None = None
    """What Slurm usually calls it: ``a100``. A site's own ``gpu_type`` wins."""
    memory_gib: Annotated[float, Field(gt=0)]
    """What the driver reports as total memory, GiB."""
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")]
    """As the vendor writes it: ``8.0``."""
    peak_tflops: dict[str, float] = {}
    """Dense peak per dtype (fp32, tf32, fp16, bf16), TFLOP/s, without sparsity."""
    bandwidth_gb_s: Annotated[float, Field(gt=0)] | None = None
    """Memory bandwidth, GB/s."""
    link: Literal["nvlink", "pcie"] = "pcie"
    """What joins the GPUs of a node: nvlink only where it joins all of them, not pairs by a bridge."""
    link_gb_s: Rate | None = None
    """Of ``link``, one GPU, one direction, GB/s; none: ``pcie_gb_s``. Vendors print the sum of both directions."""
    pcie_gb_s: Rate = 31.5
    """Between GPU and host, one direction, GB/s: 15.75 for PCIe 3.0 ×16, 31.5 for 4.0, 63 for 5.0."""
    efficiency: Efficiency = Efficiency()


class Hardware(Frozen):
    name: Name
    description: Text = ""
    source: Text
    """Where the figures come from."""
    cpus: Annotated[int, Field(gt=0)]
    """CPU cores of a node."""
    memory_gib: Annotated[int, Field(gt=0)]
    """RAM of a node, GiB."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of a node."""
    gpu: Gpu | None = None
    driver: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")] | None = None
    """Version of the NVIDIA driver; none when unknown."""
    cuda: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    """CUDA version that the driver announces; none when unknown. Says whether a stack runs where ``driver`` is not known."""
    network_gb_s: Rate = 25.0
    """Between nodes, one node, one direction, GB/s. Default: one port of 200 Gbit/s, a guess for a GPU node."""
    cpu_gflops_per_core: Rate | None = None
    """GFLOP/s that training in fp32 reaches on one core, for runs without a GPU; none: their time is not predicted."""
    notes: list[Text] = []
