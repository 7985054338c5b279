"""xformers' memory-efficient attention over the blocks of rows.

For transformers 5 a function of its attention interface, for transformers 4 classes in the place of the models' sdpa classes.
B batch, H heads, S sequence, D head dimension, T = B × S.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from launcher.train.blocks import Blocks


def bias_of(blocks: Blocks, device: torch.device) -> Any:
    """xformers' mask with its tensors on ``device``; made once for all layers there."""
    if device not in blocks.made:
        blocks.made[device] = causal_bias(blocks.lengths, blocks.window, device)
    return blocks.made[device]


def causal_bias(lengths: Sequence[int], window: int | None, device: torch.device) -> Any:
    """``BlockDiagonalCausalMask``, or its local form where the window cuts one of the blocks."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    # 0.0.26 moves the mask's tensors itself, later ones want them beside the queries
    where = {"device": device} if "device" in inspect.signature(BlockDiagonalCausalMask.from_seqlens).parameters else {}
    mask = BlockDiagonalCausalMask.from_seqlens(list(lengths), **where)
    return mask if window is None or max(lengths) <= window else mask.make_local_attention(window)


def operator(query_1THD: torch.Tensor, key_1THD: torch.Tensor, value_1THD: torch.Tensor, bias: Any, dropout: float, scale: float) -> Any:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query_1THD, key_1THD, value_1THD, attn_bias=bias, p=dropout, scale=scale)


def attend_blocks(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    dropout: float = 0.0,
    blocks: Blocks | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An entry of transformers' attention interface; the output is B S H D."""
    assert blocks is not None and attention_mask is None, "every forward pass goes through borders()"
    return _attend(query_BHSD, key, value, blocks, dropout, scaling), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks, dropout: float, scale: float) -> torch.Tensor:
    rows, heads, length, dimension = query.shape
    assert sum(blocks.lengths) == rows * length
    # under autocast the rotary tables, which are fp32, leave queries and keys in fp32 beside half values
    query, key = query.to(value.dtype), key.to(value.dtype)

    def joined(tensor: torch.Tensor) -> torch.Tensor:
        # the backward pass takes no grouped keys and values: they are copied out to all heads, but a single one is only looked at by all
        given = tensor.shape[1]
        if 1 < given < heads:
            tensor = tensor.repeat_interleave(heads // given, dim=1)
        return tensor.transpose(1, 2).reshape(1, rows * length, -1, dimension).expand(-1, -1, heads, -1)

    output = operator(joined(query), joined(key), joined(value), bias_of(blocks, query.device), dropout, scale)
    assert isinstance(output, torch.Tensor)
    return output.view(rows, length, heads, dimension)


# transformers 4


def take_blocks(model: torch.nn.Module) -> None:
    """Replace the sdpa classes of a transformers 4 model by ours."""
    for module in model.modules():
        replacement = _REPLACEMENTS.get(type(module).__name__)
        if replacement is not None:
            module.__class__ = replacement(type(module))


def give_blocks(model: torch.nn.Module, blocks: Blocks) -> None:
    """Lay the blocks of the next forward pass (and its recomputation in the backward pass) where its layers find them, since
    transformers 4 hands no arguments down to them.
    """
    for module in model.modules():
        if hasattr(module, "takes_blocks"):
            module.__dict__["blocks"] = blocks


def _rotary(sdpa: type) -> type:
    """For starcoder2 and llama, whose classes differ in how they ask for the rotary tables."""
    modeling = inspect.getmodule(sdpa)
    by_length = sdpa.__name__.startswith("Starcoder2")

    class BlockedAttention(sdpa):  # type: ignore[misc]
        takes_blocks = True

        def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
            rows, length, _width = hidden_states.shape
            query = self.q_proj(hidden_states).view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
            key = self.k_proj(hidden_states).view(rows, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
            value = self.v_proj(hidden_states).view(rows, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
            if by_length:
                cos, sin = self.rotary_emb(value, seq_len=length)
                query, key = modeling.apply_rotary_pos_emb(query, key, cos, sin, position_ids)  # type: ignore[union-attr]
            else:
                cos, sin = self.rotary_emb(value, position_ids)
                query, key = modeling.apply_rotary_pos_emb(query, key, cos, sin)  # type: ignore[union-attr]
            dropout = self.attention_dropout if self.training else 0.0
            output = _attend(query, key, value, self.blocks, dropout, self.head_dim**-0.5)
            output = self.o_proj(output.reshape(rows, length, self.hidden_size))
            if by_length:
                output = torch.nn.functional.dropout(output, p=self.residual_dropout, training=self.training)
            return output, None, None

    return BlockedAttention


def _gpt_bigcode(sdpa: type) -> type:
    class BlockedAttention(sdpa):  # type: ignore[misc]
        takes_blocks = True

        def _attn(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
            """Multi-query: B S (H·D) and B S D, else B H S D, as the class above it wants them back."""
            shape = query.shape
            if self.multi_query:
                query = query.view(shape[0], shape[1], self.num_heads, self.head_dim).transpose(1, 2)
                key, value = key.unsqueeze(1), value.unsqueeze(1)
            dropout = self.attn_pdrop if self.training else 0.0
            scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
            output = _attend(query, key, value, self.blocks, dropout, scale)
            return (output.reshape(shape) if self.multi_query else output.transpose(1, 2)), None

    return BlockedAttention


_REPLACEMENTS = {"Starcoder2SdpaAttention": _rotary, "LlamaSdpaAttention": _rotary, "GPTBigCodeSdpaAttention": _gpt_bigcode}
