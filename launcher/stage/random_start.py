"""A model without a past: a tokenizer trained on the documents and weights drawn from a seed. Runs in the staging process (Python 3.9)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import UsageError

EOS = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2
"""All bytes, EOS and PAD."""


def model_config(arguments: dict[str, Any]) -> Any:
    """The transformers config. Errors: UsageError for an unknown type, argument or value (transformers keeps a typo in silence)."""
    from transformers import CONFIG_MAPPING

    values = dict(arguments)
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"{model_type!r} is no model type of the installed transformers",
            key="model.config.model_type",
            hint=_nearest(model_type, CONFIG_MAPPING.keys()),
        )
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known = {*vars(default), *inspect.signature(config_class.__init__).parameters, *config_class.attribute_map} - {"self", "kwargs"}
    known |= {"rope_theta"} if hasattr(default, "rope_parameters") else set()  # transformers 5 still takes it
    for name in values:
        if name not in known:
            raise UsageError(
                f"{model_type} has no argument {name!r}", key=f"model.config.{name}", code="unknown-key", hint=_nearest(name, known)
            )
    try:
        config = config_class(**values)
    except Exception as error:  # each version has its own validation classes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{model_type} refuses these arguments: {first}", key="model.config") from error
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"{config.vocab_size} is too small",
            key="model.config.vocab_size",
            hint=f"at least {SMALLEST_VOCABULARY}: all bytes, EOS and padding",
        )
    return config


def train_tokenizer(batches: Iterator[list[str]], vocab_size: int, marks: Sequence[str] = ()) -> Any:
    """A byte-level BPE of at most ``vocab_size`` entries, as a ``PreTrainedTokenizerFast`` with EOS and a padding token of its own.

    ``marks``: further special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD, *marks], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(batches, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def save_model(config: Any, tokenizer: Any, seed: int, folder: Path) -> int:
    """Draw the weights in fp32 and save them with config and tokenizer, as ``from_pretrained`` reads them. Gives their number."""
    import torch
    from transformers import AutoModelForCausalLM

    for name, value in (
        ("bos_token_id", tokenizer.eos_token_id),
        ("eos_token_id", tokenizer.eos_token_id),
        ("pad_token_id", tokenizer.pad_token_id),
    ):
        setattr(config, name, value)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UsageError(
            f"{config.model_type} cannot be built with these arguments: {str(error).splitlines()[0]}", key="model.config"
        ) from error
    model = model.to(torch.float32)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def _nearest(name: str, known: Any) -> str | None:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else None
