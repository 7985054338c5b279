"""ZeRO of DeepSpeed: optimizer state sharded (1), gradients too (2), weights too (3), with or without offload to the node's RAM.

DeepSpeed is called directly, with the configuration that was rendered from ``templates/deepspeed``. It averages gradients over ranks and
would divide losses by its accumulation: the first is undone by a factor, the second is not asked for. Its partitions are stretches of
flattened parameters, which is how they are saved; none of its own checkpoints are used. With bf16 it adds up
gradients of micro steps in bf16, where the other engines do so in fp32. On GPUs this was not run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from launcher.errors import UsageError
from launcher.plan import Plan
from launcher.train.attention import by_blocks
from launcher.train.batches import MicroBatch
from launcher.train.borders import form_for
from launcher.train.cross_entropy import CrossEntropy
from launcher.train.engine import Engine, Numbers
from launcher.train.model import load_model
from launcher.train.optimizer import build_optimizer
from launcher.train.pieces import Piece
from launcher.train.ranks import Ranks

_COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Fragment:
    """Where a parameter's entries lie on this rank."""

    flat: torch.Tensor
    """The fp32 partition that the optimizer updates; key of its state."""
    offset: int
    """Of the parameter's first entry here, in ``flat``."""
    count: int
    start: int
    """Of the same entry in the flattened parameter."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ZeroEngine(Engine):
    """``wrapped``: DeepSpeed's engine. ``optimizer``: its ZeRO optimizer, around one of torch's that knows flat partitions only."""

    stage: int

    @property
    def sharded(self) -> bool:
        return True

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        inner = self.optimizer.optimizer
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def backward(self, batch: MicroBatch, step_targets: int, *, last: bool) -> torch.Tensor:
        self.wrapped.set_gradient_accumulation_boundary(last)
        loss_sum = self.loss_sum(batch)
        self.wrapped.backward(loss_sum * (self.world_size / step_targets), scale_wrt_gas=False)
        return loss_sum.detach().to(torch.float64)

    def update(self, rate: float, max_grad_norm: float) -> float:
        assert self.wrapped.gradient_clipping() == max_grad_norm, "the rendered configuration is of the same plan"
        self.set_rate(rate)
        self.wrapped.step()
        return float(self.wrapped.get_global_grad_norm())

    def settle(self) -> None:
        """DeepSpeed's order of summation does not change after the first pass."""

    def weights(self) -> dict[str, Piece]:
        """The fp32 partitions, from which DeepSpeed makes the weights that are computed with."""
        return {name: _piece(fragment, fragment.flat) for name, fragment in self._fragments()}

    def weights_changed(self) -> None:
        zero = self.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones stay gathered
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def optimizer_state(self) -> tuple[dict[str, Piece], Numbers]:
        """Entries that belong to a whole partition (AdamW's step) are written with a parameter's first entry."""
        pieces: dict[str, Piece] = {}
        for name, fragment in self._fragments():
            for key, value in self.torch_optimizer.state[fragment.flat].items():
                if value.shape == fragment.flat.shape:
                    pieces[f"{name}/{key}"] = _piece(fragment, value)
                else:
                    assert value.dim() == 0, f"state {key} of shape {tuple(value.shape)} is of no known kind"
                    pieces[f"{name}/{key}"] = Piece(value, (), 0, fragment.start == 0)
        return pieces, {}

    def set_numbers(self, numbers: Mapping[str, Mapping[str, float]]) -> None:
        assert not numbers, "AdamW has none"

    def create_optimizer_state(self) -> None:
        """As for other engines, partition by partition; gradient buffers that DeepSpeed made stay."""
        inner = self.torch_optimizer
        members = [list(group["params"]) for group in inner.param_groups]
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["params"], group["lr"] = [], 0.0
        for number, flat in self._partitions():
            kept, flat.grad = flat.grad, torch.zeros_like(flat)
            inner.param_groups[number]["params"] = [flat]
            inner.step()
            inner.param_groups[number]["params"] = []
            flat.grad = kept
        for group, parameters, rate in zip(inner.param_groups, members, rates):
            group["params"], group["lr"] = parameters, rate

    def _partitions(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Number of the optimizer's parameter group, and a partition of it."""
        zero = self.optimizer
        if self.stage < 3:
            yield from enumerate(zero.single_partition_of_fp32_groups)
        else:
            for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield zero.sub_group_to_group_id[number], flat

    def _fragments(self) -> Iterator[tuple[str, _Fragment]]:
        """Of the parameters that have entries here."""
        zero = self.optimizer
        parameters: dict[str, Any] = dict(self.trained_parameters())
        for name, parameter in parameters.items():
            if self.stage < 3:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    yield name, _Fragment(flat, here.start, here.numel, there.start, tuple(parameter.shape))
                continue
            number, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = self.rank * int(size)
            count = min(int(size), parameter.ds_numel - start)  # the last partitions end with padding
            if count > 0:
                flat = zero.fp32_partitioned_groups_flat[number]
                yield name, _Fragment(flat, int(offset), count, start, tuple(parameter.ds_shape))


def build_zero(plan: Plan, folder: str, ranks: Ranks, config_file: Path) -> ZeroEngine:
    """Errors: UsageError when DeepSpeed made something else of the plan; what loading the model raises."""
    training, stage = plan.preset["training"], int(plan.preset["parallelism"][-1])
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    if ranks.device.type == "cpu":
        # an operator for inference, which it would compile for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", dist_init_required=False, verbose=False)
    model = load_model(plan, folder, replace(ranks, device=torch.device("cpu")) if stage == 3 else ranks)
    optimizer = build_optimizer(model, training)
    if stage == 3:  # a parameter at a time goes to the GPU, and a partition of it stays
        compute = _COMPUTE[training["dtype"]]
        for parameter in model.parameters():  # Init casts what is made within it only, and initialize leaves Init's work alone
            parameter.data = parameter.data.to(compute)
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=compute)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(ranks.device)
    wrapped, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    _require_as_planned(plan, wrapped, zero, stage)
    form = form_for(model.config.model_type, plan.attention, by_blocks=by_blocks(plan))
    loss = CrossEntropy(model, training["cross_entropy"])
    return ZeroEngine(model, wrapped, zero, form, loss, ranks.rank, ranks.world_size, stage)


def _piece(fragment: _Fragment, flat: torch.Tensor) -> Piece:
    return Piece(flat.detach().narrow(0, fragment.offset, fragment.count), fragment.shape, fragment.start, written=True)


def _require_as_planned(plan: Plan, engine: Any, optimizer: Any, stage: int) -> None:
    """Class, stage, dtype, batch, and that this rank holds its share of the state and no more. Errors: UsageError."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    expected = DeepSpeedZeroOptimizer_Stage3 if stage == 3 else DeepSpeedZeroOptimizer
    batch = (plan.batch.micro_batch, plan.batch.micro_steps)
    found: str | None = None
    if engine.world_size != plan.world_size:
        found = f"{engine.world_size} ranks, the plan has {plan.world_size}"
    elif type(optimizer) is not expected or engine.zero_optimization_stage() != stage:
        found = f"{type(optimizer).__name__} of stage {engine.zero_optimization_stage()} for zero{stage}"
    elif optimizer.dtype != _COMPUTE[plan.preset["training"]["dtype"]]:
        found = f"{optimizer.dtype} weights for {plan.preset['training']['dtype']}"
    elif (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()) != batch:
        found = f"another micro batch and accumulation than the plan's {batch}"
    elif stage == 2 and not optimizer.partition_gradients:
        found = "whole gradients for zero2"
    elif stage == 3 and not all(hasattr(parameter, "ds_id") for parameter in engine.module.parameters()):
        found = "whole weights for zero3"
    else:
        found = _wrong_share(plan, engine, optimizer, stage)
    if found is not None:
        raise UsageError(f"DeepSpeed set up {found}", code="engine", key="parallelism")


def _wrong_share(plan: Plan, engine: Any, optimizer: Any, stage: int) -> str | None:
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    whole = sum(parameter.ds_numel if stage == 3 else parameter.numel() for parameter in trained)
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    held = sum(flat.numel() for flat in flats)
    padding = 64 * (len(trained) if stage == 3 else len(flats))  # each stretch is rounded up to a whole number for each rank
    if not whole <= held * plan.world_size <= whole + padding * plan.world_size:
        return f"{held} of {whole} entries on a rank of {plan.world_size}"
    offloaded = plan.preset["offload"] != "none"
    if offloaded != all(flat.device.type == "cpu" for flat in flats) and plan.layout.gpus_per_node:
        return f"optimizer state on {flats[0].device}, the plan says offload: {plan.preset['offload']}"
    return None
