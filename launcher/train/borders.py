"""Documents that share a row must not see each other: how each model is told so, and the proof that it obeyed.

Why not rely on reset positions alone: with a cache or a mask, models ignore them in silence. Why several forms: transformers 4 reads a
4D mask differently in almost every model. The proof runs at the start of every life, so that no version can be wrong unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers

from launcher.errors import GateError
from launcher.train.model import input_device

Form = Literal["additive", "ones", "causal_buffer"]
"""additive: 4D float mask, 0 where a position may look, the lowest number elsewhere. ones: 4D, 1 where it may look.
causal_buffer: the model takes 2D masks only, so its own causal mask is replaced for the time of the forward pass."""


def form_for(model_type: str, attention: str) -> Form:
    if int(transformers.__version__.split(".")[0]) >= 5:
        return "additive"
    if model_type == "gpt_bigcode":
        return "causal_buffer"
    return "ones" if (model_type, attention) == ("starcoder2", "eager") else "additive"


@contextmanager
def borders(model: torch.nn.Module, form: Form, documents_BS: torch.Tensor | None) -> Iterator[dict[str, Any]]:
    """Arguments of the forward pass which keep the documents of the only row apart; the model is as before afterwards.

    None where rows hold one document each.
    """
    if documents_BS is None:
        yield {}
        return
    documents_BS = documents_BS.to(input_device(model))
    same_SS = documents_BS[0][:, None] == documents_BS[0][None, :]
    visible_SS = same_SS.tril()
    if form == "causal_buffer":
        owner: Any = next(module for module in model.modules() if type(module).__name__ == "GPTBigCodeModel")
        causal = owner.bias
        owner.bias = visible_SS.to(causal.device)
        try:
            yield {}
        finally:
            owner.bias = causal
    elif form == "ones":
        yield {"attention_mask": visible_SS[None, None].float()}
    else:
        mask_SS = torch.zeros(visible_SS.shape, device=visible_SS.device).masked_fill(~visible_SS, torch.finfo(torch.float32).min)
        yield {"attention_mask": mask_SS[None, None]}


@torch.no_grad()
def require_borders(model: torch.nn.Module, form: Form, device: torch.device) -> None:
    """Two documents of 6 tokens in a row: the second must not notice the first or its own future, and must notice its own past.

    Compared bit for bit, in the same shapes, so it holds in every precision. Errors: GateError.
    """
    documents_BS = torch.arange(2, device=device).repeat_interleave(6)[None]
    positions_BS = torch.arange(6, device=device).repeat(2)[None]
    tokens_BS = torch.arange(1, 13, device=device)[None]

    def logits_of_second(changed: list[int]) -> torch.Tensor:
        changed_BS = tokens_BS.clone()
        changed_BS[0, changed] = 0
        with borders(model, form, documents_BS) as arguments:
            logits_BSV = model(input_ids=changed_BS, position_ids=positions_BS, use_cache=False, **arguments).logits
        assert isinstance(logits_BSV, torch.Tensor)
        return logits_BSV[0, 6:]

    was_training = model.training
    model.eval()
    plain, foreign, own = logits_of_second([]), logits_of_second([0, 1, 2, 3, 4, 5, 11]), logits_of_second([6])
    model.train(was_training)
    if not torch.equal(plain[:5], foreign[:5]) or torch.equal(plain[5], own[5]):
        message = f"transformers {transformers.__version__} does not keep the documents of a row apart in this model"
        raise GateError(message, code="packing", key="data.packing", hint="packing: none")
