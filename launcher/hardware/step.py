"""Seconds of one optimizer step, term by term, from shapes, data-sheet figures and few fitted constants. Pure; no torch, no clock.

matmul         FLOP of the linear layers and the head ÷ (dense peak × efficiency of the GPU kind); forward 2·N, backward 4·N a token,
               2·N with frozen weights (LoRA), and the layers' forward pass once more under full activation checkpointing
attention      kernels that keep no scores: FLOP, backward 2.5 × forward (it computes the scores again), half where the kernel skips what
               a causal mask hides. eager: FLOP of all S×S, and the bytes of its scores ÷ bandwidth
elementwise    bytes of everything between the matrix products ÷ bandwidth, backward twice the forward
weights        once a micro step: autocast's half copies, gradients cast and added up; QLoRA's dequantisation in each pass
launch         once a micro step and layer: the host cannot keep ahead of short kernels
communication  what does not hide behind the backward pass; optimizer; offload over PCIe
device_map     one GPU works at a time: as one GPU, whatever their number
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from launcher.hardware.compatibility import at_least
from launcher.hardware.disk import num_trained
from launcher.hardware.flops import (
    Precision,
    adapter_bytes,
    elementwise_bytes,
    layer_parameters,
    logits_bytes,
    matmul_parameters,
    score_bytes,
)
from launcher.hardware.lengths import Lengths, Shape, shape_of
from launcher.plan import Batch, Layout
from launcher.preset.hardware import Gpu, Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Lora, Preset
from launcher.preset.stack import Stack
from launcher.supported import LORA_TARGETS


@dataclass(frozen=True)
class Fitted:
    """The constants that ``python -m benchmarks.fit_efficiency`` fits beside those in ``presets/hardware``; the rows are named there."""

    tensor: float = 0.711
    """Efficiency on tensor cores of GPUs whose file has none: that of the A100."""
    fp32: float = 0.77
    """Efficiency on CUDA cores, of every kind."""
    xformers_attention: float = 0.294
    """xformers' and torch's memory-efficient attention, over the efficiency of matrix products on the same GPU."""
    launch_s_per_layer: float = 0.000586
    """Forward and backward of one layer in one micro step: host time that is not hidden behind the GPU's work."""


FITTED = Fitted()

FLASH_ATTENTION = {"flash2": 0.7, "flash3": 1.2}
"""As ``Fitted.xformers_attention``. From the kernels' papers, not fitted: causal, heads of 128, forward and backward about 150 of 312
TFLOP/s at 2 k tokens (FlashAttention-2, A100), 550 of 989 at longer ones (FlashAttention-3, H100)."""
FP32_ATTENTION = 0.5
"""The memory-efficient kernel in fp32; assumed."""
BANDWIDTH = 0.8
"""Share of the data sheet's memory bandwidth that elementwise kernels reach; assumed."""
LINK = {"nvlink": 0.75, "pcie": 0.3}
"""Share of the link that NCCL reaches as bus bandwidth: 230 of 300 GB/s on 8 A100; PCIe through the host about 10 of 31.5; assumed."""
EXPOSED = 0.1
"""Least share of communication that nothing hides: the last bucket."""
OPTIMIZER_BYTES = {"adamw": 80.0, "adamw_fused": 28.0, "adamw_8bit": 30.0, "adafactor": 100.0}
"""Per trained parameter: torch's and transformers' steps, kernel by kernel."""
PURE_BYTES = 90.0
"""Per trained parameter, beside them: bf16_pure's copies to fp32, noise and rounding."""
CLIP_BYTES = 12.0
"""Gradient norm, scaling, clearing."""
HOST_GB_S = 100.0
"""RAM bandwidth of a node, for an optimizer that lies there; assumed."""
LAUNCH_LORA = 1.4
"""More kernels a layer."""
LAUNCH_CPU_S_PER_LAYER = 0.0025
"""As ``Fitted.launch_s_per_layer``, without a GPU: measured on the tiny presets, 8 × 1 against 1 × 8."""
SHARDED = ("fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class StepParts:
    """Seconds of one optimizer step on the rank with most samples."""

    matmul: float
    attention: float
    elementwise: float
    weights: float
    launch: float
    communication: float
    optimizer: float
    offload: float

    @property
    def total_s(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def missing_fact(preset: Preset, hardware: Hardware) -> str | None:
    """What the time model lacks of the hardware, as a key of its file; None when it can predict."""
    if preset.gpus == 0:
        return None if hardware.cpu_gflops_per_core is not None else "cpu_gflops_per_core"
    if hardware.gpu is None:
        return "gpu"
    if hardware.gpu.bandwidth_gb_s is None:
        return "gpu.bandwidth_gb_s"
    dtype = peak_dtype(preset, hardware.gpu)
    return None if dtype in hardware.gpu.peak_tflops else f"gpu.peak_tflops.{dtype}"


def peak_dtype(preset: Preset, gpu: Gpu) -> str:
    """The row of ``peak_tflops`` that matrix products run on. A GPU without TF32 leaves what asks for it in fp32."""
    dtype = preset.training.dtype
    if dtype == "fp32":
        return "tf32" if preset.training.tf32 and "tf32" in gpu.peak_tflops else "fp32"
    return "fp16" if dtype == "fp16" else "bf16"


def step_parts(
    preset: Preset,
    facts: ModelFacts,
    hardware: Hardware,
    layout: Layout,
    batch: Batch,
    attention: str,
    lengths: Lengths | None = None,
    fitted: Fitted = FITTED,
    *,
    stack: Stack | None = None,
) -> StepParts:
    """``attention``: resolved. ``lengths``: of the staged samples; without them every sample counts as full.

    ``stack``: None stands for a current one.

    Errors: ValueError where ``missing_fact`` says so.
    """
    shape = shape_of(preset, attention, batch.micro_batch, lengths, stack)
    tokens = max(batch.samples_per_rank) * shape.tokens
    gpu = _Rank(preset, facts, hardware, layout, attention, shape, fitted)
    forward, backward = gpu.forward(), gpu.backward()
    computing = tokens * (sum(forward) + sum(backward))
    return StepParts(
        matmul=tokens * (forward[0] + backward[0]),
        attention=tokens * (forward[1] + backward[1]),
        elementwise=tokens * (forward[2] + backward[2]),
        weights=batch.micro_steps * gpu.weights(),
        launch=batch.micro_steps * gpu.launch(),
        communication=gpu.communication(batch.micro_steps, computing, tokens * sum(backward) / batch.micro_steps, tokens),
        optimizer=gpu.optimizer(),
        offload=gpu.offload(batch.micro_steps),
    )


def predict_step(
    preset: Preset,
    facts: ModelFacts,
    hardware: Hardware,
    layout: Layout,
    batch: Batch,
    attention: str,
    lengths: Lengths | None = None,
    *,
    stack: Stack | None = None,
) -> float:
    """Seconds of one optimizer step; as ``step_parts``."""
    return step_parts(preset, facts, hardware, layout, batch, attention, lengths, stack=stack).total_s


def predict_evaluation(
    preset: Preset,
    facts: ModelFacts,
    hardware: Hardware,
    layout: Layout,
    attention: str,
    eval_samples: int,
    lengths: Lengths | None = None,
    *,
    stack: Stack | None = None,
) -> float:
    """Seconds of one evaluation: forward passes only, samples shared out over the ranks."""
    share = -(-eval_samples // layout.world_size)
    micro_batch = min(preset.evaluation.micro_batch, max(share, 1))
    shape = shape_of(preset, attention, micro_batch, lengths, stack)
    gpu = _Rank(preset, facts, hardware, layout, attention, shape, FITTED)
    return share * shape.tokens * sum(gpu.forward()) + -(-share // micro_batch) * (gpu.launch() + gpu.weights()) / 3


class _Rank:
    """One rank's rates and work per token. Times are triples: matmul, attention, elementwise."""

    def __init__(
        self, preset: Preset, facts: ModelFacts, hardware: Hardware, layout: Layout, attention: str, shape: Shape, fitted: Fitted
    ) -> None:
        missing = missing_fact(preset, hardware)
        if missing is not None:
            raise ValueError(f"hardware {hardware.name} has no {missing}")
        self.preset, self.facts, self.hardware, self.layout = preset, facts, hardware, layout
        self.kernel, self.shape, self.fitted = attention, shape, fitted
        self.world = layout.world_size
        self.dtype = preset.training.dtype
        self.half = self.dtype != "fp32"
        self.sharded = preset.parallelism in SHARDED
        self.autocast = self.half and not self.sharded and self.dtype != "bf16_pure"
        self.precision = Precision(2 if self.half else 4, 2 if self.half and not self.autocast else 4)
        self.checkpointing = preset.training.activation_checkpointing != "none"
        self.selective = preset.training.activation_checkpointing == "selective"
        self.lora = preset.adapter if isinstance(preset.adapter, Lora) else None
        self.gpu: Gpu | None = hardware.gpu if layout.gpus_per_node else None
        self.rate = self._rate()
        self.trained = num_trained(preset, facts)

    def _rate(self) -> float:
        """FLOP/s of large matrix products."""
        if self.gpu is None:
            assert self.hardware.cpu_gflops_per_core is not None
            cores = min(self.layout.threads_per_rank, self.hardware.cpus / self.layout.ranks_per_node)
            return self.hardware.cpu_gflops_per_core * cores * 1e9
        name, own = peak_dtype(self.preset, self.gpu), self.gpu.efficiency
        efficiency = (own.fp32 or self.fitted.fp32) if name == "fp32" else (own.tensor or self.fitted.tensor)
        return self.gpu.peak_tflops[name] * 1e12 * efficiency

    def _moved(self, num_bytes: float) -> float:
        """Seconds for bytes through GPU memory. On CPU they are part of the measured rate."""
        if self.gpu is None:
            return 0.0
        assert self.gpu.bandwidth_gb_s is not None
        return num_bytes / (self.gpu.bandwidth_gb_s * 1e9 * BANDWIDTH)

    def forward(self) -> tuple[float, float, float]:
        flops = 2.0 * matmul_parameters(self.facts) + self._adapter_flops()
        moved = elementwise_bytes(self.facts, self.precision) + self._adapter_bytes() + self._logits_bytes() / 3
        return flops / self.rate, self._attention(1.0, 0), self._moved(moved)

    def backward(self) -> tuple[float, float, float]:
        """With the forward pass that checkpointing repeats."""
        matmul = 2.0 * matmul_parameters(self.facts) + 2 * self._adapter_flops()
        if self.lora is None:
            matmul += 2.0 * matmul_parameters(self.facts)
        attention = self._attention(2.0 if self.kernel == "eager" else 2.5, 1)
        between = elementwise_bytes(self.facts, self.precision) + self._adapter_bytes()
        moved = 2 * between + self._logits_bytes() * 2 / 3
        if self.checkpointing:
            moved += between
            kept = self.selective and self.kernel != "eager"
            attention += 0.0 if kept else self._attention(1.0, 0)
            matmul += 0.0 if self.selective else 2.0 * layer_parameters(self.facts) + self._adapter_flops()
        return matmul / self.rate, attention, self._moved(moved)

    def _attention(self, passes: float, backward: int) -> float:
        """Seconds per token. ``passes``: of 4·L·d·span FLOP each."""
        flops = passes * 4.0 * self.facts.layers * self.facts.hidden * self.shape.span
        if self.gpu is None:
            return flops / self.rate
        if self.kernel == "eager":
            scores = self.facts.layers * self.facts.heads * self.shape.span
            return flops / self.rate + self._moved(scores * score_bytes(self.facts, self.precision)[backward])
        if not self.shape.dense_mask:
            flops /= 2
        return flops / (self.rate * self._kernel_efficiency())

    def _kernel_efficiency(self) -> float:
        assert self.gpu is not None
        if not self.half:
            return FP32_ATTENTION
        if self.kernel in FLASH_ATTENTION:
            return FLASH_ATTENTION[self.kernel]
        ampere = at_least(self.gpu.compute_capability, "8.0")
        if self.kernel == "flex" or (self.kernel == "sdpa" and ampere and not self.shape.dense_mask):
            return FLASH_ATTENTION["flash2"]
        return self.fitted.xformers_attention

    def _logits_bytes(self) -> float:
        return logits_bytes(self.facts, self.precision, self.preset.training.cross_entropy)

    def _adapter_bytes(self) -> float:
        if self.lora is None:
            return 0.0
        return adapter_bytes(self.facts, self.lora.targets or list(LORA_TARGETS[self.facts.architecture]), self.precision)

    def _adapter_flops(self) -> float:
        return 0.0 if self.lora is None else 2.0 * self.trained

    def weights(self) -> float:
        """Per micro step: what passes through memory whatever the number of tokens."""
        every = self.facts.parameters
        if not self.half:
            moved = 16.0 * self.trained
        elif self.autocast:
            moved = 6.0 * every * (2 if self.checkpointing else 1) + 20.0 * self.trained
        else:
            moved = 8.0 * self.trained + (6.0 * every if self._gathers() else 0.0)
        if self.lora is not None and self.lora.kind == "qlora":
            moved = 2.5 * every * (3 if self.checkpointing else 2) + 20.0 * self.trained
        return self._moved(moved)

    def launch(self) -> float:
        """Per micro step."""
        again = 4 / 3 if self.checkpointing else 1.0
        a_layer = self.fitted.launch_s_per_layer if self.gpu is not None else LAUNCH_CPU_S_PER_LAYER
        return a_layer * self.facts.layers * again * (LAUNCH_LORA if self.lora is not None else 1.0)

    def _gathers(self) -> bool:
        return self.preset.parallelism in ("fsdp", "zero3")

    def _bus_gb_s(self) -> float:
        """Bus bandwidth of collectives over all ranks."""
        assert self.gpu is not None
        link = (self.gpu.link_gb_s or self.gpu.pcie_gb_s) * LINK[self.gpu.link]
        if self.layout.nodes == 1:
            return link
        return min(link, self.hardware.network_gb_s * 0.8)

    def communication(self, micro_steps: int, computing_s: float, backward_s: float, tokens: float) -> float:
        """Exposed seconds of a step. ``backward_s``: of the last micro step. Ring collectives: (W − 1)/W of the bytes, all-reduce twice."""
        if self.gpu is None:
            return 0.0
        kind = self.preset.parallelism
        if kind == "device_map":  # activations, and their gradients back, at each border between two GPUs
            moved = 2 * tokens * self.facts.hidden * self.precision.stream * (self.layout.gpus_per_node - 1)
            return moved / ((self.gpu.link_gb_s or self.gpu.pcie_gb_s) * 1e9)
        if self.world == 1:
            return 0.0
        ring, bus = (self.world - 1) / self.world, self._bus_gb_s() * 1e9
        gradients = (2.0 if self.dtype == "bf16_pure" else 4.0) * self.trained * ring / bus
        half = 2.0 * self.facts.parameters * ring / bus
        if self._gathers():  # weights for forward and for backward, gradients scattered
            busy = micro_steps * (2 * half + gradients)
            return max(busy - computing_s, EXPOSED * busy)
        if kind in ("zero1", "zero2"):
            busy = gradients * (micro_steps if kind == "zero2" else 2)
            hidden_s = computing_s if kind == "zero2" else backward_s
            return max(busy - hidden_s, EXPOSED * busy) + half * self.trained / self.facts.parameters
        busy = 2 * gradients
        return max(busy - backward_s, EXPOSED * busy)

    def optimizer(self) -> float:
        share = self.trained / (self.world if self.sharded else 1)
        moved = share * (OPTIMIZER_BYTES[self.preset.training.optimizer] + CLIP_BYTES)
        if self.dtype == "bf16_pure":
            moved += share * PURE_BYTES
        if self.preset.offload == "none":
            return self._moved(moved)
        return moved * self.layout.ranks_per_node / (HOST_GB_S * 1e9)

    def offload(self, micro_steps: int) -> float:
        """Over PCIe: gradients down and weights up once a step; with ``all`` the weights up for each pass of each micro step."""
        if self.preset.offload == "none" or self.gpu is None:
            return 0.0
        share = self.trained / (self.world if self.sharded else 1)
        moved = 6.0 * share
        if self.preset.offload == "all":
            moved += 2.0 * self.facts.parameters / self.world * micro_steps * 2
        return moved / (self.gpu.pcie_gb_s * 1e9 * BANDWIDTH)
