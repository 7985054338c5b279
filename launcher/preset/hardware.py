"""Hardware: a node as data. ``presets/hardware/<name>.yaml``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from launcher.preset.fields import Frozen, Name, Text, Word


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
    notes: list[Text] = []
