"""Adapters: LoRA, rsLoRA and DoRA on the model's linear layers, QLoRA on the same ones in 4 bits. peft does the work.

Not how an adapter is saved (``state``, ``final``) nor how it is merged (``launcher.export``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from launcher.base_model import BASE_MODEL, base_of, read_base, write_base
from launcher.errors import RunFailed, UsageError
from launcher.plan import Plan, Staged
from launcher.run import Run
from launcher.supported import LORA_TARGETS, NOT_QUANTISED, lora_arguments
from launcher.train.ranks import Ranks

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_pure": torch.bfloat16, "fp16": torch.float16}
"""``training.dtype`` → what 4-bit weights are multiplied in."""


@dataclass(frozen=True)
class Share:
    """How much of a model is trained. Tied parameters count once, one of 4 bits counts as one."""

    trained: int
    all: int

    def __str__(self) -> str:
        """As peft and FastCode print it."""
        return f"trainable params: {self.trained:,d} || all params: {self.all:,d} || trainable%: {100 * self.trained / self.all:.4f}"


def share_of(model: torch.nn.Module) -> Share:
    """Whole parameters, however they are sharded."""
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Share(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def quantisation(adapter: str | Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told so that qlora's base is loaded in nf4 with doubly quantised scales; nothing for other kinds."""
    if isinstance(adapter, str) or adapter["kind"] != "qlora":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE[dtype],
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )
    return {"quantization_config": config}


def with_adapter(model: Any, adapter: Mapping[str, Any], seed: int) -> Any:
    """A peft model around ``model`` in which only the adapters (in fp32) and ``modules_to_save`` are trained.

    Errors: UsageError when the model has not what is named.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and not every stack has it

    targets = adapter["targets"] or LORA_TARGETS.get(model.config.model_type)
    if targets is None:
        message = f"no default LoRA targets for {model.config.model_type}"
        raise UsageError(message, code="lora-targets", key="adapter.targets", hint="name the linear layers, e.g. [q_proj, v_proj]")
    saved = _modules_to_save(model, adapter)
    if adapter["kind"] == "qlora":
        keep_nf4(model)
    torch.manual_seed(seed)  # the same adapter on every rank, and again in a life that starts anew
    try:
        adapted = get_peft_model(model, LoraConfig(**lora_arguments(adapter, targets, saved)))
    except ValueError as error:
        raise UsageError(str(error).split("\n")[0], code="lora-targets", key="adapter.targets") from error
    _require_as_planned(adapted, adapter)
    return adapted


def keep_nf4(model: Any) -> None:
    """Forbid bitsandbytes (0.50) to pack the weights anew in the first evaluation on a CPU with AVX512-BF16: the scales would be rounded
    to bf16 for good, so that training would go on with other weights, and without gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_same_base(run: Run, plan: Plan, staged: Staged, ranks: Ranks) -> None:
    """Collective. The first life writes down which weights lie under the adapter, every later one compares.

    Errors: RunFailed on rank 0 when they are others now: an adapter on another base is worth nothing, and nothing else would notice.
    """
    failure: Exception | None = None
    if ranks.is_first:
        try:
            base, before = base_of(plan, staged), read_base(run.root)
            if before is None:
                write_base(base, run.root)
            elif before.weights != base.weights:
                message = f"the weights in {staged.model} are not those that this run's adapter is trained on ({before.folder})"
                hint = f"{run.root / BASE_MODEL} says which they were; stage that model again, or submit --new"
                raise RunFailed(message, code="other-base", hint=hint)
        except Exception as error:
            failure = error
    ranks.raise_together(failure, "compare the base model")


def _size(parameter: Any) -> int:
    if hasattr(parameter, "ds_numel"):  # DeepSpeed keeps a share
        return int(parameter.ds_numel)
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights of 4 bits into a byte
    return int(parameter.numel()) if state is None else int(state.shape.numel())


def _modules_to_save(model: Any, adapter: Mapping[str, Any]) -> list[str]:
    """Full names, since peft compares ends of names: ``norm`` would be every module whose name ends so."""
    wanted = adapter["modules_to_save"] or []
    named = {name: [full for full, _ in model.named_modules() if full.rpartition(".")[2] == name] for name in wanted}
    missing = [name for name in wanted if not named[name]]
    if missing:
        raise UsageError(f"the model has no module {missing[0]}", code="modules-to-save", key="adapter.modules_to_save")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    chosen = [full for names in named.values() for full in names]
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    if tied and any(id(module) in outer for name, module in model.named_modules() if name in chosen):
        message = "this model's head is its embedding: trained by itself, one would no longer be the other"
        raise UsageError(message, code="modules-to-save", key="adapter.modules_to_save", hint="leave it out, or adapter: none")
    return chosen


def _require_as_planned(model: Any, adapter: Mapping[str, Any]) -> None:
    """peft takes a name that it does not know, or a kind that a layer cannot have, without a word."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stray = [name for name in trained if ".lora_" not in name and ".modules_to_save." not in name]
    magnitudes = sum(".lora_magnitude_vector." in name for name in trained)
    adapters = sum(".lora_A." in name for name in trained)
    assert not stray, f"{stray[0]} would be trained beside the adapters"
    assert adapters and magnitudes == (adapters if adapter["kind"] == "dora" else 0), "every adapter is of the kind that was asked for"
    if adapter["kind"] == "qlora":
        plain = [
            name
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and type(module.get_base_layer()).__name__ != "Linear4bit"
        ]
        assert not plain, f"{plain[0]} is not in 4 bits"
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" in name}
    assert dtypes == {torch.float32}, f"adapters are trained in fp32, not {dtypes}"
