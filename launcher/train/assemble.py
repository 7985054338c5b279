"""Folders that ``from_pretrained`` loads, written tensor by tensor from files of tensors: no model is built, no rank is needed.

What comes in is a checkpoint (whole or in ranks' parts), a model's folder, or an adapter's; merging is in ``merge``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from launcher.errors import RunFailed
from launcher.files import write_json
from launcher.supported import LORA_TARGETS, lora_arguments
from launcher.train.pieces import PieceFiles

SHARD_BYTES = 5_000_000_000
"""A file of weights is closed when the next tensor would make it larger."""

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

INDEX = "model.safetensors.index.json"
BESIDE = ("config.json", "generation_config.json")

Tensors = Iterable[tuple[str, torch.Tensor]]


def open_model(folder: Path) -> PieceFiles:
    """The weights of a model's folder or of a checkpoint. Errors: RunFailed when there are none."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        raise RunFailed(f"{folder} holds no weights", code="no-weights")
    return PieceFiles(folder / name for name in names)


def each(files: PieceFiles, dtype: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, one at a time; ``dtype``: None keeps each as it is."""
    for name in files.shapes:
        yield name, cast(files.whole(name), dtype)


def cast(tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return tensor.to(DTYPES[dtype]) if dtype is not None and tensor.is_floating_point() else tensor


def write_model(folder: Path, tensors: Tensors, config: Path, dtype: str | None, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Weights in files of up to ``shard_bytes`` with their index, and the configuration of the model in ``config`` for that dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = []
    total = 0
    for held in _shards(tensors, shard_bytes):
        _save(folder / f"part-{len(parts)}", held)
        total += sum(tensor.nbytes for tensor in held.values())
        parts.append(list(held))
    names = [f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    names = names if len(parts) > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        os.rename(folder / f"part-{number}", folder / name)
    if len(parts) > 1:
        places = {tensor: name for name, part in zip(names, parts) for tensor in part}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places}, mode=0o644)
    for name in BESIDE:
        if (config / name).exists():
            shutil.copyfile(config / name, folder / name)
    if dtype is not None:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in values else "torch_dtype"  # the older name is read by every version
        write_json(folder / "config.json", {**values, key: str(DTYPES[dtype]).partition(".")[2]}, mode=0o644)


def write_adapter(folder: Path, checkpoint: Path, adapter: Mapping[str, Any], base: Path) -> None:
    """The adapter of a checkpoint in peft's format."""
    from peft import LoraConfig  # slow to import

    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter_of_checkpoint(checkpoint)
    model_type = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    saved = sorted(
        {name.partition(".modules_to_save.")[0].removeprefix(PREFIX) for name in _names(checkpoint) if ".modules_to_save." in name}
    )
    config = LoraConfig(**lora_arguments(adapter, adapter["targets"] or LORA_TARGETS[model_type], saved))
    config.base_model_name_or_path, config.inference_mode = str(base), True
    config.save_pretrained(str(folder))
    _save(folder / "adapter_model.safetensors", tensors)


PREFIX = "base_model.model."
"""What peft puts before the names of the model's own parameters."""


def adapter_of_checkpoint(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Names as peft saves them: without the adapter's own name, ``default``."""
    with open_model(checkpoint) as files:
        return {_saved_name(name): files.whole(name) for name in files.shapes}


def adapter_of_model(folder: Path) -> dict[str, torch.Tensor]:
    """Of a folder in peft's format."""
    return dict(safetensors.torch.load_file(folder / "adapter_model.safetensors"))


def _names(checkpoint: Path) -> list[str]:
    with open_model(checkpoint) as files:
        return list(files.shapes)


def _saved_name(name: str) -> str:
    if ".modules_to_save.default." in name:
        return name.replace(".modules_to_save.default.", ".")
    if ".lora_magnitude_vector." in name:  # a module in newer versions of peft, a parameter in older ones; saved alike
        return name.partition(".lora_magnitude_vector.")[0] + ".lora_magnitude_vector"
    return name.replace(".default.", ".")


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > shard_bytes:
            yield held
            held = {}
        held[name] = tensor
    yield held


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
