"""FSDP2: weights, gradients and optimizer state are sharded by rows, each decoder layer and the rest as one unit. torch 2.6 or newer.

Gradients are reduced in every micro step: kept whole until the last one, they would fill the memory that sharding frees. FSDP2 averages
them, so each loss is multiplied by the world size, as for DDP. On GPUs this was not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.train.adafactor import ShardedAdafactor
from launcher.train.attention import by_blocks
from launcher.train.batches import MicroBatch
from launcher.train.borders import form_for
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.engine import Engine
from launcher.train.layers import decoder_layers
from launcher.train.model import load_model
from launcher.train.optimizer import build_optimizer, parameter_groups
from launcher.train.pieces import Piece, whole_piece
from launcher.train.ranks import Ranks

_COMPUTE = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FsdpEngine(Engine):
    """``model`` and ``wrapped`` are the same module, whose parameters are DTensors; so is the optimizer's state."""

    @property
    def sharded(self) -> bool:
        return True

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        return self.optimizer

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The root's stay whole after a forward pass that no backward pass follows, and are other objects then."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()
        return super().trained_parameters()

    def piece(self, tensor: torch.Tensor) -> Piece:
        if not isinstance(tensor, DTensor):
            return whole_piece(tensor, written=self.rank == 0)
        (placement,) = tensor.placements
        local = tensor.to_local()
        if not isinstance(placement, Shard):
            return Piece(local, tuple(tensor.shape), 0, self.rank == 0)
        assert placement.dim == 0, "fully_shard cuts rows, and a stretch of rows is one stretch of the flattened tensor"
        row = math.prod(tensor.shape[1:])
        return Piece(local, tuple(tensor.shape), first_row(tensor.shape[0], self.world_size, self.rank) * row, local.numel() > 0)

    def backward(self, batch: MicroBatch, step_targets: int, *, last: bool) -> torch.Tensor:
        loss_sum = self.loss_sum(batch)
        (loss_sum * (self.world_size / step_targets)).backward()  # type: ignore[no-untyped-call]
        return loss_sum.detach().to(torch.float64)

    def update(self, rate: float, max_grad_norm: float) -> float:
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trained_parameters().values(), max_grad_norm or float("inf"))
        whole_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        self.set_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(whole_norm)

    def settle(self) -> None:
        """FSDP2's order of summation does not change after the first pass."""


def build_fsdp(plan: Plan, folder: str, ranks: Ranks) -> FsdpEngine:
    """Errors: UsageError when torch made something else of the plan; what loading the model raises."""
    training = plan.preset["training"]
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    compute = _COMPUTE[training["dtype"]]
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=None if compute is None else torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if plan.preset["offload"] == "all" else OffloadPolicy(),
    }
    for turn in range(plan.layout.ranks_per_node):  # so that a node's RAM holds one whole model at a time
        if turn == ranks.rank % plan.layout.ranks_per_node:
            # a layer at a time goes to the GPU, and a shard of it stays
            model = load_model(plan, folder, replace(ranks, device=torch.device("cpu")))
            layers = decoder_layers(model)
            for layer in layers:
                fully_shard(layer, **arguments)
            fully_shard(model, **arguments)
        ranks.all(True)  # wait for each other
    if training["optimizer"] == "adafactor":
        groups = parameter_groups(model, training)
        optimizer: torch.optim.Optimizer = ShardedAdafactor(groups, training["learning_rate"], mesh.get_group())
    else:
        optimizer = build_optimizer(model, training)
    require_sharded(plan, model, layers, mesh)
    form = form_for(model.config.model_type, plan.attention, by_blocks=by_blocks(plan))
    return FsdpEngine(model, model, optimizer, form, CrossEntropy(model, training["cross_entropy"]), ranks.rank, ranks.world_size)


def first_row(rows: int, world_size: int, rank: int) -> int:
    """Where a rank's rows begin: shares are of equal size, rounded up, and the last ones smaller or empty (``torch.chunk``)."""
    return min(rows, -(-rows // world_size) * rank)


def require_sharded(plan: Plan, model: torch.nn.Module, layers: Iterable[torch.nn.Module], mesh: DeviceMesh) -> None:
    """Every parameter is a DTensor of the planned mesh and this rank holds its share of it, no more. Errors: UsageError."""
    found: str | None = None
    if mesh.size() != plan.world_size:
        found = f"{mesh.size()} ranks, the plan has {plan.world_size}"
    elif not isinstance(model, FSDPModule) or not all(isinstance(layer, FSDPModule) for layer in layers):
        found = f"{type(model).__name__} whose layers are not sharded one by one"
    for name, parameter in model.named_parameters():
        if found is not None:
            break
        if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),) or parameter.device_mesh != mesh:
            found = f"{name} as {type(parameter).__name__} {getattr(parameter, 'placements', '')}"
            continue
        rows, rank = parameter.shape[0], mesh.get_rank()
        share = first_row(rows, plan.world_size, rank + 1) - first_row(rows, plan.world_size, rank)
        local = parameter.to_local()
        if local.shape != (share, *parameter.shape[1:]):
            found = f"{name} with {tuple(local.shape)} of {tuple(parameter.shape)} on rank {rank}"
    if found is not None:
        raise UsageError(f"FSDP2 set up {found}", code="engine", key="parallelism")
