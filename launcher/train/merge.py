"""An adapter merged into the weights below it, a tensor at a time. The arithmetic is in fp32; only the result is cast.

LoRA    W + s·B·A, where s = alpha / rank                  (rsLoRA: alpha / √rank)
DoRA    m · (W + s·B·A) / ‖W + s·B·A‖, row by row          (arXiv 2402.09353, equation 5)
QLoRA   as LoRA, on what is left of W after nf4: the adapter was trained and evaluated on those weights, and makes up for their
        rounding too, which on the original ones would be an error of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import RunFailed
from launcher.supported import NOT_QUANTISED
from launcher.train.assemble import PREFIX, cast, open_model


@dataclass(frozen=True)
class Merge:
    kind: str
    scale: float
    matrices: Mapping[str, Mapping[str, torch.Tensor]]
    """Linear layer → ``A`` (rank × columns), ``B`` (rows × rank) and, for DoRA, ``m`` (rows)."""
    replaced: Mapping[str, torch.Tensor]
    """Parameters of ``modules_to_save``, by the name that they have in the model."""
    quantised: frozenset[str]
    """Linear layers whose weights were trained on in 4 bits."""

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of a parameter of the base model."""
        if name in self.replaced:
            return self.replaced[name]
        layer = name.removesuffix(".weight")
        if layer in self.quantised and layer != name:
            weight = through_nf4(weight.float())
        if layer not in self.matrices or layer == name:
            return weight
        given = self.matrices[layer]
        merged = weight.float() + self.scale * (given["B"].float() @ given["A"].float())
        if self.kind == "dora":
            merged = merged * (given["m"].float() / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        return merged


def prepare_merge(adapter: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: Path) -> Merge:
    """``tensors``: the adapter's, by peft's names. Errors: RunFailed when they do not fit the base model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False))
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    replaced = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(PREFIX)
        layer, part = next(
            ((name[: -len(ending)], part) for ending, part in _PARTS.items() if name.endswith(ending)),
            ("", ""),
        )
        if part:
            matrices.setdefault(layer, {})[part] = tensor
        else:
            replaced[name] = tensor
    stray = sorted((matrices.keys() - linear) | {name for name in replaced if name not in dict(model.named_parameters())})
    if stray:
        raise RunFailed(f"the model in {base} has no linear layer or parameter {stray[0]}", code="foreign-adapter")
    scale = adapter["alpha"] / (math.sqrt(adapter["rank"]) if adapter["kind"] == "rslora" else adapter["rank"])
    quantised = {name for name in linear if name.rpartition(".")[2] not in NOT_QUANTISED} if adapter["kind"] == "qlora" else set()
    return Merge(adapter["kind"], scale, matrices, replaced, frozenset(quantised))


def merged(merge: Merge, base: Path, dtype: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of the merged model. ``dtype``: None casts each to what it has in the base.

    Errors: RunFailed when the base's files have other names for what is to be changed.
    """
    with open_model(base) as files:
        wanted = {f"{layer}.weight" for layer in {*merge.matrices, *merge.quantised}} | merge.replaced.keys()
        missing = sorted(wanted - files.shapes.keys())
        if missing:
            raise RunFailed(f"the files in {base} hold no {missing[0]}", code="foreign-adapter")
        for name in files.shapes:
            before = files.whole(name)
            after = merge.weight(name, before)
            yield name, after.to(before.dtype) if dtype is None else cast(after, dtype)


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantised as ``adapter.quantisation`` asks for, and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    return torch.as_tensor(dequantize_4bit(packed, state))


NF4_BLOCK = 64
"""Weights that share a scale, in bitsandbytes' layers."""

_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "m"}
