"""What each kind of attention needs of GPU, dtype, stack and model, and which of them ``auto`` takes. Pure. The masks are the training's.

``docs/attention.md`` has both tables for people; a test holds it against what is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from launcher.errors import Finding
from launcher.hardware import compatibility as known
from launcher.hardware.lengths import by_blocks
from launcher.preset.hardware import Gpu, Hardware
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Preset
from launcher.preset.stack import Stack

WITH_BORDERS = ("flatten", "documents")
"""Kinds of packing in which documents share a row and must not see each other."""


class Choice(NamedTuple):
    kind: str
    why: str


def choose_attention(preset: Preset, hardware: Hardware, stack: Stack | None, facts: ModelFacts | None) -> Choice:
    """What the preset says, else the first row of this table that nothing forbids (``attention_problems``):

    no GPU, or compiled layers                         sdpa
    in the stack, 16 bits, compute capability 9        flash3
    in the stack, 16 bits, compute capability 8 on     flash2
    documents share rows, transformers 5               sdpa, each document by itself
    in the stack, documents share rows or a window     xformers, else flex
    else                                               sdpa
    stack without sdpa                                 eager
    """
    if preset.attention != "auto":
        return Choice(preset.attention, "the preset says so")
    there = ("eager", "sdpa") if stack is None else stack.attention

    def possible(kind: str) -> bool:
        return kind in there and next(attention_problems(kind, preset, hardware, stack, facts), None) is None

    if "sdpa" not in there:
        return Choice("eager", "the stack is without sdpa")
    if preset.training.compile != "none":
        return Choice("sdpa", "layers are compiled, which was not tried with other kernels")
    if not preset.gpus or hardware.gpu is None:
        return Choice("sdpa", "on CPU no other kind is faster and has a backward pass")
    gpu = f"{hardware.gpu.kind} (compute capability {hardware.gpu.compute_capability})"
    for kind in ("flash3", "flash2"):
        if possible(kind):
            return Choice(kind, f"the fastest kernel in the stack that {gpu} runs in {preset.training.dtype}")
    if by_blocks(preset, "sdpa", stack):
        return Choice("sdpa", f"torch's own kernels for {gpu} in {preset.training.dtype}, each document of a row by itself")
    reason = ""
    if preset.data.packing in WITH_BORDERS:
        reason = "documents share rows"
    elif _beyond_window(preset, facts):
        reason = "rows are longer than the model's window"
    for kind in ("xformers", "flex"):
        if reason and possible(kind):
            return Choice(kind, f"{reason}: {kind} skips what they hide, where sdpa reads a mask of whole rows")
    if reason:
        return Choice("sdpa", f"{reason}, and the stack has no kernel for {gpu} that skips what they hide")
    return Choice("sdpa", f"torch's own kernels for {gpu} in {preset.training.dtype}; the stack has no faster one")


def attention_problems(kind: str, preset: Preset, hardware: Hardware, stack: Stack | None, facts: ModelFacts | None) -> Iterator[Finding]:
    """Why a kind cannot be: errors, each with the alternative. Whether the stack has the library is another question."""
    on_gpu, dtype = bool(preset.gpus) and hardware.gpu is not None, preset.training.dtype
    if not on_gpu:
        if kind in known.GPU_ONLY_ATTENTION:
            yield _error("attention-not-on-gpu", f"{kind} has no backward pass on CPU", "attention: sdpa")
        return
    assert hardware.gpu is not None
    yield from _of_gpu(kind, hardware.gpu)
    if kind in known.HALF_ONLY_ATTENTION and dtype == "fp32":
        yield _error("attention-needs-half", f"{kind} takes bf16 or fp16 only", "dtype: bf16, or attention: sdpa")
    yield from _of_model(kind, preset, facts)
    if kind == "flex" and preset.parallelism == "device_map" and preset.gpus > 1:
        message = "flex attention's mask lies on one GPU, device_map has layers on several"
        yield _error("attention-not-split", message, "attention: xformers or sdpa")
    if kind == "flex" and preset.offload == "all":
        yield _error("attention-not-split", "flex attention's mask would lie in RAM, where offloaded weights are", "attention: sdpa")
    if stack is not None and kind == "xformers":
        torch, xformers = stack.packages["torch"], stack.packages.get("xformers", "")
        fits = known.XFORMERS_TORCH.get(xformers, torch)
        if known.version(fits) != known.version(torch):
            message = f"xformers {xformers} was built for torch {fits}, stack {stack.name} has torch {torch}"
            yield Finding("error", "library-pair", message, key="stack", hint=f"torch: {fits}, or another xformers")
    if stack is not None and transformers_4(stack):
        yield from _of_transformers_4(kind, preset, stack, facts)


def transformers_4(stack: Stack) -> bool:
    return known.version(stack.packages["transformers"])[0] < 5


def _error(code: str, message: str, hint: str) -> Finding:
    return Finding("error", code, message, key="attention", hint=hint)


def _of_gpu(kind: str, gpu: Gpu) -> Iterator[Finding]:
    needed, last, found = known.ATTENTION_CAPABILITY[kind], known.ATTENTION_LAST_CAPABILITY.get(kind), gpu.compute_capability
    if not known.at_least(found, needed):
        message = f"{kind} needs compute capability {needed}, {gpu.kind} has {found}"
        yield _error("attention-not-on-gpu", message, "attention: xformers or sdpa")
    elif last is not None and known.version(found)[0] > known.version(last)[0]:
        message = f"{kind} is for compute capability {needed} to {last}, {gpu.kind} has {found}"
        yield _error("attention-not-on-gpu", message, "attention: flash2 or sdpa")


def _of_model(kind: str, preset: Preset, facts: ModelFacts | None) -> Iterator[Finding]:
    if facts is None:
        return
    head = facts.hidden // facts.heads
    least, most, step = known.ATTENTION_HEAD.get(kind, (1, None, 1))
    if head < least or (most is not None and head > most) or head % step:
        rule = f"heads of {least}" + (f" to {most}" if most is not None else " or more") + (f", multiples of {step}" if step > 1 else "")
        yield _error("attention-head", f"{kind} takes {rule}, this model's have {head}", "attention: sdpa")
    if kind == "flex" and facts.architecture == "gpt_bigcode":
        yield _error("attention-not-in-model", "gpt_bigcode has no flex attention in transformers", "attention: xformers or sdpa")
    elif kind in known.NO_DROPOUT_ATTENTION and facts.dropout:
        yield _error("attention-not-in-model", f"{kind} has no dropout, which this model is trained with", "attention: xformers or sdpa")


def _of_transformers_4(kind: str, preset: Preset, stack: Stack, facts: ModelFacts | None) -> Iterator[Finding]:
    release = f"transformers {stack.packages['transformers']}"
    if kind in ("flash3", "flex"):
        yield _error("attention-not-in-stack", f"{release} has no {kind}", "attention: xformers or sdpa, or a stack with transformers 5")
    elif kind == "flash2" and preset.data.packing in WITH_BORDERS:
        message = f"flash2 of {release} knows no borders between the documents of a row"
        yield _error("attention-without-borders", message, "attention: xformers or sdpa, packing: none, or transformers 5")
    elif kind == "flash2" and _beyond_window(preset, facts):
        message = f"flash2 of {release} counts a sliding window otherwise than the other kinds"
        yield _error("attention-without-borders", message, "attention: xformers or sdpa, or transformers 5")


def _beyond_window(preset: Preset, facts: ModelFacts | None) -> bool:
    return facts is not None and facts.sliding_window is not None and preset.training.sequence_length > facts.sliding_window
