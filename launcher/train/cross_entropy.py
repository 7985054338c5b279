"""The loss without whole logits: computed inside the model's head, so that DDP, FSDP and ZeRO see an ordinary forward pass of the head.

Where logits are computed a piece at a time, the gradients of the head's input and weight are made in the forward pass, while the piece
is there: nothing is computed twice. Shapes: T tokens of a micro batch, C of a piece, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launcher.errors import UsageError
from launcher.train.batches import NO_TARGET

PIECE_TOKENS = 1024
"""The memory model counts with it (``launcher.hardware.activations.LOSS_CHUNK_TOKENS``)."""


class CrossEntropy:
    """Cross-entropy summed over the targets of a micro batch, as ``training.cross_entropy`` says: plain, chunked or fused."""

    def __init__(self, model: Any, kind: str) -> None:
        """Except for plain, the model's head gives this loss in the place of logits while it is called from here.

        Errors: UsageError when the head is not one weight, or liger-kernel is missing.
        """
        self.kind = kind
        self._targets_BS: torch.Tensor | None = None
        if kind != "plain":
            self._head = _head_of(model)
            self._linear = self._head._old_forward if hasattr(self._head, "_hf_hook") else self._head.forward
            self._sum = _fused_sum() if kind == "fused" else _chunked_sum
            # accelerate's hook (device_map) calls _old_forward, after it moved the input to the head's device
            setattr(self._head, "_old_forward" if hasattr(self._head, "_hf_hook") else "forward", self._head_forward)

    def sum(self, forward: Callable[[], torch.Tensor], targets_BS: torch.Tensor) -> torch.Tensor:
        """``forward`` runs the whole model, wrapped as it is, and returns what it calls logits. A scalar in fp32."""
        if self.kind == "plain":
            logits_BSV = forward()
            return torch.nn.functional.cross_entropy(
                logits_BSV.float().flatten(0, 1),
                targets_BS.to(logits_BSV.device).flatten(),
                reduction="sum",
                ignore_index=NO_TARGET,
            )
        self._targets_BS = targets_BS
        try:
            loss_sum = forward()
        finally:
            self._targets_BS = None
        assert loss_sum.dim() == 0, f"cross_entropy: {self.kind} was planned, the model's head gave logits"
        return loss_sum

    def _head_forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        if self._targets_BS is None:
            logits: torch.Tensor = self._linear(hidden_BSD)
            return logits
        targets_T = self._targets_BS.to(hidden_BSD.device).flatten()
        return self._sum(hidden_BSD.flatten(0, -2), self._head.weight, targets_T)


def _head_of(model: Any) -> Any:
    head = model.get_output_embeddings()
    if type(head).__name__ == "ModulesToSaveWrapper":  # peft: a trained copy beside the frozen one
        head = head.modules_to_save[head.active_adapters[0]]
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:  # adapted and quantised ones are subclasses
        message = f"the loss is computed from the head's weight, and this head is a {type(head).__name__}"
        raise UsageError(message, code="cross-entropy-head", key="training.cross_entropy", hint="cross_entropy: plain")
    return head


def _chunked_sum(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    half = torch.nn.functional.linear(hidden_TD[:1], weight_VD[:1]).dtype  # what autocast, if there is any, computes in
    loss_sum: torch.Tensor = _InPieces.apply(hidden_TD, weight_VD, targets_T, half, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss_sum


class _InPieces(torch.autograd.Function):
    """``dtype``: of the matrix products. The weight's gradient is added up in fp32, as one matrix product over all tokens would."""

    @staticmethod
    def forward(
        context: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> torch.Tensor:
        for_hidden, for_weight = (with_gradients and needed for needed in context.needs_input_grad[:2])
        with torch.autocast(hidden_TD.device.type, enabled=False):
            computed_VD = weight_VD.to(dtype)
            loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
            hidden_grad_TD = torch.empty_like(hidden_TD) if for_hidden else None
            weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if for_weight else None
            for start in range(0, len(hidden_TD), PIECE_TOKENS):
                piece = slice(start, start + PIECE_TOKENS)
                hidden_CD, targets_C = hidden_TD[piece].to(dtype), targets_T[piece]
                logits_CV = (hidden_CD @ computed_VD.t()).float()
                counted_C = targets_C != NO_TARGET
                index_C1 = torch.where(counted_C, targets_C, 0)[:, None]
                logsum_C1 = logits_CV.logsumexp(1, keepdim=True)
                loss_sum += ((logsum_C1 - logits_CV.gather(1, index_C1))[:, 0] * counted_C).sum()
                if hidden_grad_TD is None and weight_grad_VD is None:
                    continue
                grad_CV = logits_CV.sub_(logsum_C1).exp_()  # the softmax, less 1 at the target
                grad_CV.scatter_add_(1, index_C1, torch.full_like(logsum_C1, -1.0))
                grad_CV = grad_CV.mul_(counted_C[:, None]).to(dtype)
                if hidden_grad_TD is not None:
                    hidden_grad_TD[piece] = grad_CV @ computed_VD
                if weight_grad_VD is not None:
                    if dtype == torch.float32:
                        weight_grad_VD.addmm_(grad_CV.t(), hidden_CD)
                    else:
                        weight_grad_VD += grad_CV.t() @ hidden_CD
        context.gradients = hidden_grad_TD, weight_grad_VD, weight_VD.dtype
        return loss_sum

    @staticmethod
    def backward(context: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        hidden_grad_TD, weight_grad_VD, dtype = context.gradients
        del context.gradients
        if hidden_grad_TD is not None:
            hidden_grad_TD.mul_(scale)
        if weight_grad_VD is not None:
            weight_grad_VD = weight_grad_VD.mul_(scale).to(dtype)
        return hidden_grad_TD, weight_grad_VD, None, None, None


def _fused_sum() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """liger-kernel's kernel, called directly: its patches have no entry for starcoder2 and gpt_bigcode and silently do nothing there."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused
    except ImportError as error:
        message = f"fused needs liger-kernel: {error}"
        raise UsageError(message, code="library-missing", key="training.cross_entropy", hint="cross_entropy: chunked") from error

    def fused_sum(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        dtype = torch.nn.functional.linear(hidden_TD[:1], weight_VD[:1]).dtype
        # input, weight, target, bias, class weights, ignored index, z-loss, label smoothing, reduction, softcap, return z-loss, sums in
        arguments = (None, None, NO_TARGET, 0.0, 0.0, "sum", None, False, torch.float32)
        loss_sum: torch.Tensor = Fused.apply(hidden_TD.to(dtype), weight_VD.to(dtype), targets_T, *arguments)[0]
        return loss_sum

    return fused_sum
