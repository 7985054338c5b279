"""Documents that share a row must not see each other: how each model and kind of attention is told so, and the proof that it obeyed.

Why not rely on reset positions alone: with a cache or a mask, models ignore them in silence, and gpt_bigcode never hands them to its
kernels. Why several forms: transformers 4 reads a 4D mask differently in almost every model. The proof runs at the start of every
life, so that no version can be wrong unnoticed.

A block is a stretch of positions of one row that may look at one another: a document, or a row's pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers

from launcher.errors import GateError
from launcher.train.attention import TRANSFORMERS_4
from launcher.train.blocks import Blocks
from launcher.train.model import input_device
from launcher.train.xformers_attention import give_blocks

Form = Literal["additive", "visible", "ones", "causal_buffer", "padding", "lengths", "blocks", "laid_blocks", "block_mask"]
"""additive: 4D float mask, 0 where a position may look, the lowest number elsewhere. visible: 4D bool mask. ones: 4D, 1 where it may look.
causal_buffer: the model takes 2D masks only, so its own causal mask is replaced for the time of the forward pass. padding: nothing but
the 2D mask of pads. lengths: the blocks' cumulated lengths (flash attention). blocks, laid_blocks: the lengths of blocks, as an argument or
laid into the model (xformers; blocks: sdpa too). block_mask: flex attention's.
"""

WITH_WINDOW = ("starcoder2", "mistral")
"""Models that obey ``sliding_window`` of their config, in every layer. In llama's it means nothing."""

LONGEST_PROOF = 128
"""Tokens of a document in the proof; a row of two is as long as the shortest that flex attention treats as training."""


def form_for(model_type: str, attention: str, *, by_blocks: bool = False) -> Form:
    if attention in ("flash2", "flash3"):
        return "padding" if TRANSFORMERS_4 else "lengths"
    if by_blocks:
        return "blocks"
    if attention == "xformers":
        return "laid_blocks" if TRANSFORMERS_4 else "blocks"
    if attention == "flex":
        return "block_mask"
    if not TRANSFORMERS_4:
        return "visible" if attention == "sdpa" else "additive"
    if model_type == "gpt_bigcode":
        return "causal_buffer"
    return "ones" if (model_type, attention) == ("starcoder2", "eager") else "additive"


@contextmanager
def borders(
    model: torch.nn.Module, form: Form, documents_BS: torch.Tensor | None, attention_mask_BS: torch.Tensor | None, shape: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Arguments of the forward pass which keep documents apart and pads out; the model is as before afterwards, but for ``laid_blocks``.

    ``documents_BS``: None where rows hold one document each. ``attention_mask_BS``: None where there are no pads. ``shape``: B and S.
    """
    window = _window(model, shape[1])
    if form in ("lengths", "blocks", "laid_blocks", "block_mask"):
        yield _kernel_arguments(model, form, block_numbers(documents_BS, attention_mask_BS, shape), window)
        return
    if documents_BS is None and (window is None or not TRANSFORMERS_4):  # transformers' own masks do
        yield {} if attention_mask_BS is None else {"attention_mask": attention_mask_BS.to(input_device(model))}
        return
    if form == "padding":
        raise GateError(
            f"flash attention of transformers {transformers.__version__} knows no borders and counts a window otherwise",
            code="packing", key="data.packing", hint="attention: sdpa or xformers, or packing: none",
        )  # fmt: skip
    visible_BSS = _visible(block_numbers(documents_BS, attention_mask_BS, shape).to(input_device(model)), window)
    if form == "causal_buffer":
        with _causal_buffer(model, visible_BSS):
            yield {}
    elif form == "visible":
        yield {"attention_mask": visible_BSS[:, None]}
    elif form == "ones":
        yield {"attention_mask": visible_BSS[:, None].float()}
    else:
        mask_BSS = torch.zeros(visible_BSS.shape, device=visible_BSS.device).masked_fill(~visible_BSS, torch.finfo(torch.float32).min)
        yield {"attention_mask": mask_BSS[:, None]}


def block_numbers(documents_BS: torch.Tensor | None, attention_mask_BS: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """Block that each position belongs to, B S, counted over all rows from 0. A block ends with its row."""
    begins_BS = torch.zeros(shape, dtype=torch.bool)
    begins_BS[:, 0] = True
    for labels_BS in (documents_BS, attention_mask_BS):
        if labels_BS is not None:
            begins_BS[:, 1:] |= (labels_BS[:, 1:] != labels_BS[:, :-1]).cpu()
    return begins_BS.flatten().cumsum(0).view(shape) - 1


@torch.no_grad()
def require_borders(model: torch.nn.Module, form: Form, device: torch.device, length: int = 6) -> None:
    """Two documents of ``length`` tokens in a row: the second must not notice the first or its own future, and must notice its own past.

    Compared bit for bit, in the same shapes, so it holds in every precision. Errors: GateError.
    """
    length = min(length, LONGEST_PROOF)
    documents_BS = torch.arange(2).repeat_interleave(length)[None]
    positions_BS = torch.arange(length, device=device).repeat(2)[None]
    tokens_BS = (torch.arange(2 * length, device=device) % 12 + 1)[None]

    def logits_of_second(changed: list[int]) -> torch.Tensor:
        changed_BS = tokens_BS.clone()
        changed_BS[0, changed] = 0
        with borders(model, form, documents_BS, None, (1, 2 * length)) as arguments:
            logits_BSV = model(input_ids=changed_BS, position_ids=positions_BS, use_cache=False, **arguments).logits
        assert isinstance(logits_BSV, torch.Tensor)
        return logits_BSV[0, length:]

    was_training = model.training
    model.eval()
    plain, own = logits_of_second([]), logits_of_second([2 * length - 2])
    foreign = logits_of_second([*range(length), 2 * length - 1])
    model.train(was_training)
    if not torch.equal(plain[:-1], foreign[:-1]) or torch.equal(plain[-1], own[-1]):
        message = f"transformers {transformers.__version__} does not keep the documents of a row apart in this model"
        raise GateError(message, code="packing", key="data.packing", hint="packing: none")


def _window(model: torch.nn.Module, length: int) -> int | None:
    """The model's sliding window (positions that a query sees, itself among them) where a row is longer than it."""
    config: Any = model.config
    window = getattr(config, "sliding_window", None) if config.model_type in WITH_WINDOW else None
    return int(window) if window is not None and length > window else None


def _visible(numbers_BS: torch.Tensor, window: int | None) -> torch.Tensor:
    visible_BSS = (numbers_BS[:, :, None] == numbers_BS[:, None, :]).tril()
    return visible_BSS if window is None else visible_BSS.triu(1 - window)


def _kernel_arguments(model: torch.nn.Module, form: Form, numbers_BS: torch.Tensor, window: int | None) -> dict[str, Any]:
    if form == "block_mask":
        return {"attention_mask": _block_mask(numbers_BS.to(input_device(model)), window)}
    lengths = torch.bincount(numbers_BS.flatten())
    if form == "lengths":  # the window is the model's own affair there
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(input_device(model))
        longest = int(lengths.max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    blocks = Blocks(tuple(lengths.tolist()), window)
    if form == "blocks":
        return {"blocks": blocks}
    give_blocks(model, blocks)
    return {}


def _block_mask(numbers_BS: torch.Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = numbers_BS.shape

    def looks_at(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        visible = (k <= q) & (numbers_BS[b, q] == numbers_BS[b, k])
        return visible if window is None else visible & (q - k < window)

    return create_block_mask(looks_at, rows, None, length, length, device=numbers_BS.device)


class _Rows:
    """Answers the one question that gpt_bigcode of transformers 4 asks its causal mask, with a mask for each row."""

    def __init__(self, visible_BSS: torch.Tensor) -> None:
        self._visible_BSS = visible_BSS

    def __getitem__(self, _index: Any) -> torch.Tensor:
        return self._visible_BSS


@contextmanager
def _causal_buffer(model: torch.nn.Module, visible_BSS: torch.Tensor) -> Iterator[None]:
    owner: Any = next(module for module in model.modules() if type(module).__name__ == "GPTBigCodeModel")
    causal = owner._buffers.pop("bias")
    owner.__dict__["bias"] = _Rows(visible_BSS.to(causal.device))
    try:
        yield
    finally:
        del owner.__dict__["bias"]
        owner._buffers["bias"] = causal
