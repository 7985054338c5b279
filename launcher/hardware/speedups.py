"""What compilation, fused kernels, pure bf16 and selective checkpointing need of node, software and each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import Finding
from launcher.hardware import compatibility as known
from launcher.plan import Plan
from launcher.preset.hardware import Hardware
from launcher.preset.schema import Lora, Preset
from launcher.preset.stack import Stack
from launcher.supported import SHARDED

SELECTIVE_TORCH = "2.4"
"""``create_selective_checkpoint_contexts``."""
FUSED_ADAMW_CPU_TORCH = "2.4"
"""torch's AdamW has a fused kernel for CUDA since 2.0, for CPU since 2.4."""
COMPILE_TORCH = "2.7"
"""Since then torch can be told to fail where it would give up compiling; before 2.5 it compiled each layer anew."""
COMPILED_PARALLELISM = ("single", "ddp")
COMPILED_ATTENTION = ("eager", "sdpa")
"""What was tried. Other kernels bring operators of their own, at which a graph may end."""


def check_speedups(plan: Plan, preset: Preset, hardware: Hardware, stack: Stack | None) -> Iterator[Finding]:
    yield from _cross_entropy(preset, hardware, stack)
    yield from _optimizer(preset, stack)
    yield from _pure(plan, preset)
    yield from _checkpointing(preset, stack)
    yield from _compile(plan, preset, stack)


def _error(code: str, message: str, key: str, hint: str) -> Finding:
    return Finding("error", code, message, key=key, hint=hint)


def _older(stack: Stack | None, needed: str) -> str | None:
    """The stack's torch where it is older; None where it is not, or nobody knows."""
    return None if stack is None or known.at_least(stack.packages["torch"], needed) else stack.packages["torch"]


def _cross_entropy(preset: Preset, hardware: Hardware, stack: Stack | None) -> Iterator[Finding]:
    key, hint = "training.cross_entropy", "cross_entropy: chunked"
    if preset.training.cross_entropy != "fused":
        return
    if not preset.gpus or hardware.gpu is None:
        yield _error("cross-entropy-not-on-gpu", "fused is a kernel for GPUs", key, hint)
        return
    if not known.at_least(hardware.gpu.compute_capability, known.TRITON_CAPABILITY):
        needed = f"compute capability {known.TRITON_CAPABILITY}, {hardware.gpu.kind} has {hardware.gpu.compute_capability}"
        yield _error("cross-entropy-not-on-gpu", f"fused needs {needed}", key, hint)
    if stack is not None and "liger-kernel" not in stack.packages:
        yield _error("library-missing", f"fused needs liger-kernel, which stack {stack.name} is without", key, hint)


def _optimizer(preset: Preset, stack: Stack | None) -> Iterator[Finding]:
    key, optimizer = "training.optimizer", preset.training.optimizer
    torch = _older(stack, FUSED_ADAMW_CPU_TORCH)
    if optimizer == "adamw_fused" and (not preset.gpus or preset.offload != "none") and torch is not None:
        message = f"AdamW has a fused kernel for CPU since torch {FUSED_ADAMW_CPU_TORCH}, the stack has {torch}"
        yield _error("optimizer-not-in-stack", message, key, "optimizer: adamw")


def _pure(plan: Plan, preset: Preset) -> Iterator[Finding]:
    if preset.training.dtype != "bf16_pure" or preset.parallelism in SHARDED:
        return
    message = (
        f"weights keep 8 bits: updates are rounded stochastically, right on average but noisy, and gradients of {plan.batch.micro_steps} "
        "micro steps are added up in bf16"
    )
    yield Finding("warning", "bf16-pure", message, key="training.dtype", hint="dtype: bf16 where it fits")


def _checkpointing(preset: Preset, stack: Stack | None) -> Iterator[Finding]:
    torch = _older(stack, SELECTIVE_TORCH)
    if preset.training.activation_checkpointing == "selective" and torch is not None:
        message = f"selective needs torch {SELECTIVE_TORCH}, the stack has {torch}"
        yield _error("checkpointing-not-in-stack", message, "training.activation_checkpointing", "activation_checkpointing: full")


def _compile(plan: Plan, preset: Preset, stack: Stack | None) -> Iterator[Finding]:
    key, hint = "training.compile", "compile: none"
    if preset.training.compile == "none":
        return
    torch = _older(stack, COMPILE_TORCH)
    if torch is not None:
        yield _error("compile-not-in-stack", f"compile needs torch {COMPILE_TORCH}, the stack has {torch}", key, hint)
    compiler = "gcc" if preset.gpus else "g++"
    in_image = stack is not None and plan.container.use != "none" and stack.base.kind == "debootstrap"
    if stack is not None and in_image and compiler not in stack.debian_packages:
        message = f"torch.compile calls {compiler}, which stack {stack.name} is without"
        yield _error("compile-not-in-stack", message, key, f"debian_packages with {compiler}, or compile: none")
    not_tried = [
        f"parallelism {preset.parallelism}" if preset.parallelism not in COMPILED_PARALLELISM else "",
        f"attention {plan.attention}" if plan.attention not in COMPILED_ATTENTION else "",
        "qlora" if isinstance(preset.adapter, Lora) and preset.adapter.kind == "qlora" else "",
        "selective checkpointing" if preset.training.activation_checkpointing == "selective" else "",
    ]
    for other in filter(None, not_tried):
        yield _error("compile-not-with", f"layers are not compiled with {other}", key, hint)
