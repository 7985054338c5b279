"""What is measured: configurations as data, and the preset that each of them is. No torch here.

Lengths, batches, attention, dtype, checkpointing, optimizer and adapter vary around the two sources' ways to train.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from launcher.plan import Batch, Layout
from launcher.preset.hardware import Hardware
from launcher.preset.model import ModelFacts, num_parameters
from launcher.preset.reading import read_hardware, read_model_facts, read_stack
from launcher.preset.schema import Preset
from launcher.preset.stack import Stack

MODELS = {
    "santacoder": "bigcode/gpt_bigcode-santacoder",
    "starcoder2-3b": "bigcode/starcoder2-3b",
    "starcoder2-7b": "bigcode/starcoder2-7b",
    "starcoder2-15b": "bigcode/starcoder2-15b",
    "codellama-7b": "codellama/CodeLlama-7b-hf",
}


@dataclass(frozen=True)
class Case:
    model: str
    sequence_length: int = 1024
    micro_batch: int = 1
    attention: str = "sdpa"
    dtype: str = "bf16"
    checkpointing: bool = False
    optimizer: str = "adamw"
    micro_steps: int = 2
    padded: bool = False
    """Batches with pads: the model gets a mask."""
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    """None named: all linear layers."""
    evaluation: int = 0
    """Micro batch of an evaluation after the update; 0: none."""
    layers: int = 0
    """0: all of the model's."""
    selective: bool = False
    """Of checkpointing: what is cheap."""
    cross_entropy: str = "plain"

    @property
    def name(self) -> str:
        words = [self.model, f"{self.sequence_length}x{self.micro_batch}", self.attention, self.dtype, self.optimizer]
        words += ["selective"] * self.selective
        words += ["checkpointing"] * self.checkpointing + ["padded"] * self.padded + [f"steps{self.micro_steps}"]
        words += [f"lora{self.lora_rank}" + "".join(f"-{target}" for target in self.lora_targets)] * (self.lora_rank > 0)
        words += [self.cross_entropy] * (self.cross_entropy != "plain")
        words += [f"eval{self.evaluation}"] * (self.evaluation > 0) + [f"layers{self.layers}"] * (self.layers > 0)
        return " ".join(words)


def case_of(value: dict[str, Any]) -> Case:
    return Case(**{**value, "lora_targets": tuple(value["lora_targets"])})


def to_json(case: Case) -> dict[str, Any]:
    return asdict(case)


def facts_of(case: Case) -> ModelFacts:
    facts = read_model_facts(MODELS[case.model].rpartition("/")[2].lower()).value
    if not case.layers:
        return facts
    fewer = facts.model_copy(update={"layers": case.layers})
    return fewer.model_copy(update={"parameters": num_parameters(fewer)})


def preset_of(case: Case, hardware: str = "h200") -> Preset:
    adapter: Any = "none"
    if case.lora_rank:
        adapter = {"kind": "lora", "rank": case.lora_rank, "targets": list(case.lora_targets) or None}
    return Preset.model_validate(
        {
            "name": "measured",
            "model": {"name": MODELS[case.model]},
            "data": {"name": "none/none", "packing": "none" if case.padded else "concatenate"},
            "training": {
                "sequence_length": case.sequence_length,
                "effective_batch": case.micro_batch * case.micro_steps,
                "micro_batch": case.micro_batch,
                "optimizer": case.optimizer,
                "learning_rate": 1e-5,
                "weight_decay": 0.1,
                "dtype": case.dtype,
                "activation_checkpointing": ("selective" if case.selective else "full") if case.checkpointing else "none",
                "cross_entropy": case.cross_entropy,
            },
            "attention": case.attention,
            "adapter": adapter,
            "parallelism": "single",
            "evaluation": {"every": "epoch" if case.evaluation else "never", "micro_batch": max(1, case.evaluation)},
            "hardware": hardware,
            "gpus": 1,
            "stack": "torch2.10-cu128",
        }
    )


def surroundings(case: Case, hardware: str = "h200") -> tuple[Hardware, Layout, Batch]:
    """Hardware, layout and batch, as the planner would give them for one GPU."""
    node = read_hardware(hardware).value
    whole = case.micro_batch * case.micro_steps
    return node, Layout(1, 1, 1, node.cpus, node.memory_gib, 1), Batch(whole, (whole,), case.micro_batch, case.micro_steps)


def stack_of(case: Case) -> Stack | None:
    """What to predict with, so that like is compared with like: the measured batches have pads whenever any has. A current transformers
    may meet a batch without, and then leaves grouped keys in fp32 to plain arithmetic, which the prediction allows for; the old one copies.
    """
    return read_stack("torch2.3-cu121").value if case.padded else None


def _cases() -> list[Case]:
    santa, three, seven, fifteen, llama = MODELS
    return [
        # FastCode: santacoder, AdamW; what fits and what does not
        *[Case(santa, 1024, micro, kind) for micro in (1, 2, 4) for kind in ("sdpa", "eager")],
        *[Case(santa, 2048, micro, kind) for micro in (1, 2) for kind in ("sdpa", "eager")],
        Case(santa, 2048, 4),
        Case(santa, 2048, 1, checkpointing=True),
        Case(santa, 2048, 2, checkpointing=True),
        Case(santa, 2048, 2, "eager", checkpointing=True),
        Case(santa, 2048, 1, dtype="fp32", checkpointing=True),
        Case(santa, 2048, 1, dtype="fp32"),
        Case(santa, 2048, 1, "eager", dtype="fp32"),
        Case(santa, 2048, 2, dtype="fp16"),
        Case(santa, 1024, 2, padded=True),
        Case(santa, 2048, 2, micro_steps=1),
        Case(santa, 2048, 2, optimizer="adafactor"),
        Case(santa, 2048, 2, lora_rank=8, lora_targets=("c_attn", "c_proj")),
        Case(santa, 512, 1, evaluation=4),
        # memtune: StarCoder2, Adafactor, fp32, padded to 1024
        Case(three, 1024, 8, dtype="fp32", optimizer="adafactor", padded=True),
        Case(seven, 1024, 8, dtype="fp32", optimizer="adafactor", padded=True),
        Case(fifteen, 1024, 5, dtype="fp32", optimizer="adafactor", padded=True),
        Case(three, 1024, 2, "eager", dtype="fp32", optimizer="adafactor", padded=True),
        Case(three, 1024, 2, dtype="fp32"),
        *[Case(three, length, 2, kind) for length in (1024, 2048) for kind in ("sdpa", "eager")],
        Case(three, 1024, 4, padded=True),
        Case(three, 4096, 1),
        Case(three, 2048, 4, checkpointing=True),
        Case(three, 1024, 2, micro_steps=1),
        Case(three, 2048, 2, lora_rank=8),
        Case(three, 1024, 8, checkpointing=True, optimizer="adafactor", padded=True, evaluation=8),
        *[Case(seven, length, 1, kind) for length in (1024, 2048) for kind in ("sdpa", "eager")],
        Case(seven, 2048, 2, checkpointing=True, optimizer="adafactor"),
        Case(seven, 1024, 2, micro_steps=1, optimizer="adafactor"),
        Case(seven, 2048, 2, lora_rank=16),
        *[Case(fifteen, 1024, 1, kind) for kind in ("sdpa", "eager")],
        Case(fifteen, 2048, 1, checkpointing=True),
        Case(fifteen, 1024, 4, checkpointing=True, optimizer="adafactor", padded=True),
        Case(fifteen, 2048, 1, lora_rank=8, checkpointing=True),
        *[Case(llama, length, 1, kind) for length in (1024, 2048) for kind in ("sdpa", "eager")],
        Case(llama, 2048, 2, checkpointing=True),
        Case(llama, 1024, 2, dtype="fp32", optimizer="adafactor"),
        Case(llama, 2048, 2, lora_rank=8, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj")),
        Case(llama, 2048, 1, lora_rank=8, checkpointing=True, padded=True),
    ]


CASES = _cases()

QUICK = [
    Case("starcoder2-3b", 1024, 2, layers=2),
    Case("santacoder", 1024, 2, "eager", checkpointing=True, layers=3),
    Case("codellama-7b", 1024, 1, dtype="fp32", optimizer="adafactor", padded=True, layers=2),
    Case("starcoder2-3b", 2048, 2, checkpointing=True, selective=True, cross_entropy="chunked", layers=4),
    Case("codellama-7b", 2048, 2, checkpointing=True, selective=True, cross_entropy="chunked", layers=4),
    Case("santacoder", 2048, 4, cross_entropy="chunked", layers=2),
]
"""A few layers of the real widths: seconds each. What the tests measure again."""

CUDA_CASES = [
    Case("santacoder", 1024, 2),
    Case("santacoder", 2048, 2),
    Case("santacoder", 2048, 4),
    Case("santacoder", 1024, 4, "eager"),
    Case("santacoder", 2048, 1, "eager", dtype="fp32"),
    Case("santacoder", 2048, 2, checkpointing=True),
    Case("santacoder", 2048, 2, dtype="fp16", padded=True),
    Case("santacoder", 2048, 2, lora_rank=8),
    Case("starcoder2-3b", 1024, 2),
    Case("starcoder2-3b", 2048, 4, checkpointing=True),
    Case("starcoder2-3b", 1024, 8, dtype="fp32", optimizer="adafactor", padded=True),
    Case("starcoder2-3b", 1024, 2, dtype="fp32", optimizer="adafactor"),
    Case("starcoder2-7b", 1024, 1, optimizer="adafactor"),
    Case("starcoder2-7b", 2048, 2, lora_rank=8),
    Case("codellama-7b", 2048, 1, checkpointing=True, optimizer="adafactor"),
    Case("codellama-7b", 2048, 2, lora_rank=8),
]
"""For one real GPU; those that do not fit there are left out."""
