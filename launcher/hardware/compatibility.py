"""Which driver a CUDA version needs, and which GPU a dtype, an attention kernel or a build of torch needs."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.preset.stack import Stack

MINIMUM_DRIVER: Mapping[int, str] = {11: "450.80.02", 12: "525.60.13", 13: "580"}
"""Major CUDA version → the oldest Linux driver that runs programs built with any of its minor versions. NVIDIA, CUDA
Compatibility, "Minor Version Compatibility", table 1 (450, 525, 580), read 2026-11; patch levels from the toolkits' release notes."""

DTYPE_CAPABILITY: Mapping[str, str] = {"fp32": "0.0", "bf16": "8.0", "bf16_pure": "8.0", "fp16": "7.0", "fp8": "8.9"}
"""Tensor cores have fp16 since Volta, bf16 since Ampere, fp8 since Ada (NVIDIA, CUDA C++ Programming Guide, compute capabilities).
No preset can ask for fp8 yet."""

TF32_CAPABILITY = "8.0"

ATTENTION_CAPABILITY: Mapping[str, str] = {
    "eager": "0.0",
    "sdpa": "0.0",
    "flash2": "8.0",
    "flash3": "9.0",
    "xformers": "7.0",
    "flex": "7.0",
}
"""flash-attention 2: Ampere or newer; 3: Hopper (both its README). xformers: its CUTLASS kernels, as FastCode ran them on V100.
flex: what Triton compiles for."""

ATTENTION_LAST_CAPABILITY: Mapping[str, str] = {"flash3": "9.0"}
"""flash-attention 3 is written in Hopper's own instructions, which newer GPUs lack."""

ATTENTION_HEAD: Mapping[str, tuple[int, int | None, int]] = {
    "flash2": (8, 256, 8), "flash3": (8, 256, 8), "xformers": (8, None, 8), "flex": (16, None, 1),
}  # fmt: skip
"""Dimensions of a head: least, most, multiples of. flash: README ("up to 256") and its alignment; xformers: 128 bits in 16-bit types; flex:
torch refuses heads below 16."""

NO_DROPOUT_ATTENTION = ("flash3", "flex")
"""transformers says so of flash3 and refuses it with flex."""

GPU_ONLY_ATTENTION = ("flash2", "flash3", "xformers", "flex")
"""No backward pass on CPU."""

HALF_ONLY_ATTENTION = ("flash2", "flash3")
"""Kernels that take fp16 and bf16 only (flash-attention's README)."""

TRITON_CAPABILITY = "7.0"
"""What Triton, in which liger's kernels are written, compiles for."""

BITSANDBYTES_CAPABILITY = "6.0"
"""Its 8-bit optimizers and 4-bit weights; its 8-bit inference, which nothing here uses, needs 7.5 (bitsandbytes, installation guide)."""

ADAPTER_PEFT: Mapping[str, str] = {"lora": "0.3.0", "rslora": "0.7.0", "dora": "0.9.0", "qlora": "0.4.0"}
"""Kind of adapter → the first peft that has it (its release notes). The training was run with 0.11.1 and 0.21.2."""

FSDP2_TORCH = "2.6"
"""``torch.distributed.fsdp.fully_shard`` is public from there on (torch 2.6.0, release notes)."""

XFORMERS_TORCH: Mapping[str, str] = {"0.0.26.post1": "2.3.0", "0.0.35": "2.10.0"}
"""xformers → the one torch that its extension was built for. Other pairs are not known here and are not judged."""

VOLTA = "7.0"
VOLTA_DROPPED_IN_TORCH = (2, 11)
"""torch's cu128 wheels have Volta until 2.10 (support matrix in pytorch RELEASE.md); CUDA 13 has dropped it."""


def version(text: str) -> tuple[int, ...]:
    """``555.42.02`` → (555, 42, 2); a local part (``+cu121``) and what is no number are left out."""
    return tuple(int(part) for part in text.partition("+")[0].split(".") if part.isdigit())


def at_least(found: str, needed: str) -> bool:
    """Whether version ``found`` is ``needed`` or newer; missing parts count as 0."""
    a, b = version(found), version(needed)
    width = max(len(a), len(b))
    return a + (0,) * (width - len(a)) >= b + (0,) * (width - len(b))


def minimum_driver(stack: Stack) -> str | None:
    """The oldest driver for this stack; None for a CPU stack or a CUDA version that is not known here."""
    if stack.minimum_driver is not None or stack.cuda is None:
        return stack.minimum_driver
    return MINIMUM_DRIVER.get(version(stack.cuda)[0])


def minimum_capability(stack: Stack) -> str:
    """The oldest GPU that this stack's torch has kernels for."""
    if stack.cuda is None:
        return "0.0"
    dropped = version(stack.cuda)[0] >= 13 or (
        at_least(stack.cuda, "12.8") and version(stack.packages["torch"])[:2] >= VOLTA_DROPPED_IN_TORCH
    )
    return "7.5" if dropped else VOLTA if version(stack.cuda)[0] >= 12 else "3.5"
