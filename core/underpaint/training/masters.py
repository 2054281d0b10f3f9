"""The fp32 master weights and Adam moments: where ZeRO keeps them, how they are read and set as full tensors."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from underpaint.config.engine import OptimizerConfig
from underpaint.training.ema import Ema
from underpaint.training.one_pass import one_pass_available, update_in_one_pass

__all__ = ["MOMENTS", "Group", "Masters", "ReplicatedMasters", "ShardedMasters"]

MOMENTS = ("exp_avg", "exp_avg_sq")

# Numbers by which the places of parameters in a flat tensor begin: 128 bytes of bf16, which matrix products like.
_ALIGNED = 64


@attrs.frozen(eq=False)
class Group:
    """Trainable parameters with the same settings of AdamW.

    Attributes:
        name: Name of the part they belong to.
        optimizer: The settings.
        names: Name of each parameter in the module.
        params: The parameters.
    """

    name: str
    optimizer: OptimizerConfig
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]


class Masters(ABC):
    """Full-tensor access to weights that every ZeRO stage keeps in another place.

    Attributes:
        shards: The flat fp32 tensors that the optimizer of this rank updates.
    """

    shards: list[Tensor]

    @abstractmethod
    def full(self, name: str, moment: str | None = None) -> Tensor:
        """Return the fp32 weight of a parameter, or one of its Adam moments; every rank calls it and receives it."""

    @abstractmethod
    def assign(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Set the weight, or a moment, from a full tensor that every rank holds."""

    @abstractmethod
    def publish(self) -> None:
        """Make the module compute with the master weights. Every rank calls it."""


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def make_moments(optimizer: torch.optim.Optimizer, shards: Sequence[Tensor]) -> None:
    """Create AdamW's state as its first step would, so that it can be read and set before any step."""
    for shard in shards:
        optimizer.state[shard] = {
            # The fused kernels read the step on the device, the others on the host.
            "step": torch.zeros((), device=shard.device if optimizer.defaults["fused"] else "cpu"),
            **{moment: torch.zeros_like(shard, requires_grad=False) for moment in MOMENTS},
        }


class ReplicatedMasters(Masters):
    """ZeRO 0: every rank has everything.

    DeepSpeed's stage 0 has no bf16 with fp32 gradients, and its functions for full tensors return None there.
    So the weights, and the gradients of one optimizer step, live in one flat tensor each per group: gradients
    accumulate in fp32 whatever the weights' type, and reduction, norm, clipping, AdamW and EMA are a few large
    kernels instead of one per parameter.

    Args:
        groups: What trains. The parameters must be fp32 and on the device; they become views of flat tensors.
        dtype: Type that the module computes in.
        summed: Whether gradients of several micro-batches or ranks are added for a step.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, *, summed: bool) -> None:
        device = groups[0].params[0].device
        self.shards = []
        self._one_pass = one_pass_available(device)
        self._gradients: list[Tensor] = []
        self._rounded: list[Tensor] = []
        self._params: list[nn.Parameter] = []
        self._gradient_views: list[Tensor] = []
        self._place: dict[str, tuple[int, int, torch.Size]] = {}
        self._optimizer: torch.optim.AdamW | None = None
        if self._one_pass:
            self._norm = torch.zeros((), pin_memory=True)
        # Gradients that nothing is added to are used as they come: the kernel clips them in fp32.
        gradient_type = dtype if self._one_pass and not summed else torch.float32
        for index, group in enumerate(groups):
            offsets = list(itertools.accumulate((_aligned(param.numel()) for param in group.params), initial=0))
            weights = torch.zeros(offsets[-1], device=device)
            gradients = torch.zeros(offsets[-1], device=device, dtype=gradient_type)
            rounded = weights if dtype == torch.float32 else torch.zeros_like(weights, dtype=dtype)
            for name, param, offset in zip(group.names, group.params, offsets[:-1], strict=True):
                place = slice(offset, offset + param.numel())
                weights[place].copy_(param.detach().flatten())
                param.data = rounded[place].view_as(param)
                self._params.append(param)
                self._gradient_views.append(gradients[place].view_as(param))
                self._place[name] = (index, offset, param.shape)
            self.shards.append(nn.Parameter(weights))
            self._gradients.append(gradients)
            self._rounded.append(rounded)
        self.publish()

    def link(self, optimizer: torch.optim.AdamW) -> None:
        """Take up the optimizer that was made for the shards."""
        self._optimizer = optimizer
        make_moments(optimizer, self.shards)

    @torch.no_grad()
    def collect(self, *, first: bool) -> None:
        """Add the gradients of a micro-batch to the flat ones; the first of a step replaces them."""
        pairs = zip(self._gradient_views, self._params, strict=True)
        found = [(view, param.grad) for view, param in pairs if param.grad is not None]
        if first and len(found) < len(self._params):
            torch._foreach_zero_(self._gradients)
        if found:
            views, gradients = (list(column) for column in zip(*found, strict=True))
            if first:
                torch._foreach_copy_(views, gradients)
            else:
                torch._foreach_add_(views, gradients)
        for param in self._params:
            param.grad = None

    @torch.no_grad()
    def step(self, count: int, *, clip: float | None, ema: Ema | None, decay: float) -> float:
        """Average the gradients over the ranks, clip them, and change the weights, their average and the module's.

        Args:
            count: Number of this step, from 1.
            clip: Norm that gradients are clipped to.
            ema: The average of the weights.
            decay: Its decay in this step.

        Returns:
            The gradients' norm before clipping. When it is not finite nothing changes; the reduction made the norm
            the same on every rank.
        """
        norm = self._reduce()
        # The one wait for the device in an optimizer step: whether the step counts decides about step count and
        # learning rate on the host.
        if self._one_pass:
            # Not for what is queued after the norm: the device has work while the host prepares the next step.
            self._norm.copy_(norm, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._update(count, norm, clip, ema, decay)
            copied.synchronize()
            return self._norm.item()
        value = norm.item()
        if math.isfinite(value):
            self._update_by_torch(norm, clip)
            self.publish()
            if ema is not None:
                ema.update(decay)
        return value

    def _reduce(self) -> Tensor:
        """Average the gradients over the ranks and return their norm."""
        world_size = dist.get_world_size()
        if world_size > 1:
            for gradient in self._gradients:
                dist.all_reduce(gradient)
            torch._foreach_div_(self._gradients, float(world_size))
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self._gradients]
        return torch.stack(norms).square().sum().sqrt()

    def _update(self, count: int, norm: Tensor, clip: float | None, ema: Ema | None, decay: float) -> None:
        # The optimizer lends its settings and moments; its own count of steps stays where it was.
        assert self._optimizer is not None
        for index, group in enumerate(self._optimizer.param_groups):
            shard = self.shards[index]
            state = self._optimizer.state[shard]
            update_in_one_pass(
                shard.detach(),
                self._gradients[index],
                (state["exp_avg"], state["exp_avg_sq"]),
                group,
                step=count,
                norm=norm,
                clip=clip,
                average=None if ema is None else ema.shards[index],
                decay=decay,
                rounded=None if self._rounded[index].dtype == shard.dtype else self._rounded[index],
            )

    def _update_by_torch(self, norm: Tensor, clip: float | None) -> None:
        assert self._optimizer is not None
        if clip is not None:
            # As torch.nn.utils.clip_grad_norm_ does it, so that a plain loop gives the same numbers.
            torch._foreach_mul_(self._gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        for shard, gradient in zip(self.shards, self._gradients, strict=True):
            shard.grad = gradient
        self._optimizer.step()
        # DeepSpeed steps the optimizer too, which finds nothing to do.
        for shard in self.shards:
            shard.grad = None

    def _tensor(self, index: int, moment: str | None) -> Tensor:
        if moment is None:
            return self.shards[index].detach()
        assert self._optimizer is not None
        state: Tensor = self._optimizer.state[self.shards[index]][moment]
        return state

    def full(self, name: str, moment: str | None = None) -> Tensor:
        """Return a view: nothing is gathered."""
        index, offset, shape = self._place[name]
        return self._tensor(index, moment)[offset : offset + shape.numel()].view(shape)

    @torch.no_grad()
    def assign(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Copy the tensor into its place."""
        self.full(name, moment).copy_(value)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the weights into the module; in fp32 the module's are the master weights."""
        for rounded, shard in zip(self._rounded, self.shards, strict=True):
            if rounded.dtype != shard.dtype:
                rounded.copy_(shard)


class ShardedMasters(Masters):
    """ZeRO 1–3: through DeepSpeed's functions for full tensors.

    Args:
        groups: What trains.
        optimizer: The AdamW inside DeepSpeed's optimizer.
        wrapper: DeepSpeed's optimizer.
        stage: ZeRO stage.
    """

    def __init__(self, groups: Sequence[Group], optimizer: torch.optim.Optimizer, wrapper: Any, stage: int) -> None:
        from deepspeed import utils, zero

        self._api = utils
        self._gathered = zero.GatheredParameters
        self._wrapper = wrapper
        self._partitioned = stage == 3
        self._params = {name: param for group in groups for name, param in zip(group.names, group.params, strict=True)}
        if self._partitioned:
            self.shards = list(wrapper.fp32_partitioned_groups_flat)
            make_moments(optimizer, self.shards)
        else:
            self.shards = [param for group in wrapper.param_groups for param in group["params"]]
            make_moments(optimizer, self.shards)
            for group, shard in zip(groups, self.shards, strict=True):
                # DeepSpeed makes this link after the first step; a checkpoint is loaded before it.
                utils.lazy_init_hp_params_optimizer_state(list(group.params), shard, optimizer.state)

    def full(self, name: str, moment: str | None = None) -> Tensor:
        """Gather the shards of all ranks."""
        param = self._params[name]
        if moment is None:
            value = self._api.safe_get_full_fp32_param(param)
        else:
            value = self._api.safe_get_full_optimizer_state(param, moment)
        assert isinstance(value, Tensor), name
        return value

    @torch.no_grad()
    def assign(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Copy the part of this rank into its shard."""
        param: Any = self._params[name]
        if self._partitioned:
            # The setters for full tensors do not pad: they fail where the size is no multiple of the ranks.
            share = param.ds_tensor.numel()
            own = torch.zeros(share, device=value.device)
            part = value.flatten()[dist.get_rank() * share : (dist.get_rank() + 1) * share]
            own[: part.numel()].copy_(part)
            if moment is None:
                self._api.safe_set_local_fp32_param(param, own)
            else:
                self._api.safe_set_local_optimizer_state(param, own, moment)
        elif moment is None:
            self._api.safe_set_full_fp32_param(param, value)
        else:
            self._api.safe_set_full_optimizer_state(param, value, moment)

    @torch.no_grad()
    def publish(self) -> None:
        """Gather the master weights into the module."""
        if not self._partitioned:
            self._wrapper.update_lp_params()
            return
        for name, param in self._params.items():
            value = self.full(name)
            # Also refreshes the small parameters that stage 3 keeps whole on every rank.
            with self._gathered([param], modifier_rank=0):
                param.data.copy_(value)
