"""What a preset's adapter cannot do: with this model, with this parallelism, in this stack. Pure: findings out."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import Finding
from launcher.hardware import compatibility as known
from launcher.preset.complaints import nearest
from launcher.preset.model import ModelFacts
from launcher.preset.schema import Lora, Preset
from launcher.preset.stack import Stack
from launcher.supported import ADAPTER_NOT_WITH, SAVEABLE_MODULES


def check_adapter(preset: Preset, facts: ModelFacts | None, stack: Stack | None) -> Iterator[Finding]:
    adapter = preset.adapter
    if not isinstance(adapter, Lora):
        return
    if preset.parallelism in (refused := ADAPTER_NOT_WITH.get(adapter.kind, {})):
        message = f"{adapter.kind} with {preset.parallelism}: {refused[preset.parallelism]}"
        fits_one = "parallelism: ddp or single (in 4 bits a model is small), " if adapter.kind == "qlora" else "parallelism: ddp or zero2, "
        yield Finding("error", "adapter-not-sharded", message, key="parallelism", hint=f"{fits_one}or adapter kind lora")
    if stack is not None:
        yield from _library(adapter, stack)
    if facts is not None:
        yield from _model(adapter, facts)


def _library(adapter: Lora, stack: Stack) -> Iterator[Finding]:
    found, needed = stack.packages.get("peft"), known.ADAPTER_PEFT[adapter.kind]
    if found is None or not known.at_least(found, needed):
        there = "none" if found is None else found
        message = f"{adapter.kind} needs peft {needed} or newer, stack {stack.name} has {there}"
        older = [kind for kind, version in known.ADAPTER_PEFT.items() if found is not None and known.at_least(found, version)]
        hint = f"kind: {' or '.join(older)}, or a stack with it" if older else "a stack with it, or adapter: none"
        yield Finding("error", "library-missing", message, key="adapter.kind", hint=hint)


def _model(adapter: Lora, facts: ModelFacts) -> Iterator[Finding]:
    for target in adapter.targets or []:
        if target not in facts.linear_layers:
            hint = nearest(target, facts.linear_layers) or f"it has {', '.join(facts.linear_layers)}"
            yield Finding("error", "lora-target", f"the model has no linear layer {target}", key="adapter.targets", hint=hint)
    places = SAVEABLE_MODULES[facts.architecture]
    for name in adapter.modules_to_save or []:
        if name not in places:
            hint = nearest(name, places) or f"it has {', '.join(places)}"
            yield Finding("error", "module-to-save", f"the model has no module {name}", key="adapter.modules_to_save", hint=hint)
        elif facts.tied and places[name] in ("embedding", "head"):
            message = f"{name}: this model's head is its embedding, and a copy of one would no longer be the other"
            yield Finding("error", "module-to-save", message, key="adapter.modules_to_save", hint="leave it out, or adapter: none")
