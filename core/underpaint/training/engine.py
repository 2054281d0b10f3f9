"""One module, its AdamW and its moving average, trained by DeepSpeed on any number of ranks."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.errors import ConfigError, UnderpaintError, suggest
from underpaint.training.ema import Ema
from underpaint.training.masters import MOMENTS, Group, Masters, ReplicatedMasters, ShardedMasters
from underpaint.training.outputs import Boxed, close_outputs, open_outputs
from underpaint.training.ranks import Ranks
from underpaint.training.schedule import ema_decay, rate_factor
from underpaint.training.state import StateReader, write_state

__all__ = ["Engine", "NotFiniteError", "StepResult", "check_parts"]

_log = logging.getLogger("underpaint")

# Elements that are reduced at once: large enough to fill a link, small enough to be a minor part of the memory.
_BUCKET = 200_000_000


class NotFiniteError(UnderpaintError):
    """Too many steps in a row were skipped."""


@attrs.frozen
class StepResult:
    """What one call of `Engine.step` did.

    Attributes:
        grad_norm: Norm of the gradient of all parameters before clipping; not finite when the step was skipped,
            NaN between the micro-batches of one step.
        lr: Learning rate of each part.
        skipped: The loss or a gradient was not finite on some rank or the step was dropped, and nothing changed on any.
        dropped: It was dropped by what `Engine.backward` was told; None where that was told nothing.
        applied: The weights changed.
    """

    grad_norm: Tensor | float
    lr: dict[str, float]
    skipped: bool
    applied: bool
    dropped: bool | None = None


def check_parts(config: OptimizerConfig, parts: Iterable[str], path: str = "optimizer") -> None:
    """Refuse settings of single parts that name no part.

    Args:
        config: The optimizer.
        parts: Names of what it trains.
        path: Where it stands in the recipe, for the message.

    Raises:
        ConfigError: It names another part.
    """
    known = set(parts)
    unknown = sorted(set(config.parts) - known)
    if unknown:
        raise ConfigError(
            f"{path}.parts names '{unknown[0]}', which is no part that is trained here. {suggest(unknown[0], known)}"
        )


def _groups(module: nn.Module, parts: Mapping[str, nn.Module], config: OptimizerConfig) -> list[Group]:
    check_parts(config, parts)
    owner = {id(param): name for name, part in reversed(list(parts.items())) for param in part.parameters()}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            members.setdefault(owner.get(id(param), "rest"), []).append((name, param))
    if not members:
        raise ConfigError("None of the parameters requires a gradient; let the stage train at least one part.")
    return [
        Group(
            name=part,
            optimizer=config.of(part),
            names=tuple(name for name, _ in pairs),
            params=tuple(param for _, param in pairs),
        )
        for part, pairs in members.items()
    ]


class Engine:
    """Trains one module; the same code for ZeRO 0–3, CPU or GPU, fp32 or bf16 with fp32 master weights.

    The module moves to the device and belongs to the engine from then on. All ranks start from rank 0's weights.
    In bf16 the parameters are bf16 and the forward runs under autocast, so inputs may stay fp32.

    Args:
        module: What is trained, in fp32.
        parts: Submodules by name, for ``optimizer.parts``. A parameter of several parts counts
            to the first; trainable parameters outside all parts form the part ``rest``.
        optimizer: AdamW and its schedule.
        config: Device, ZeRO stage, precision, accumulation, `max_bad_steps`.
        steps: Optimizer steps of the whole training, for the schedule.
        micro_batch: Samples of one forward on one rank.
        ema: Decay of the moving average, or None for none.
        ema_ramp: Its ramp; see `ema_decay`.
        ranks: The processes; entered.

    Attributes:
        module: The module. Call the engine, not the module, to train it.
        ranks: The processes.
        train_state: Optimizer steps that were applied.

    Raises:
        ConfigError: Nothing trains, or ``optimizer.parts`` names no part.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        parts: Mapping[str, nn.Module],
        optimizer: OptimizerConfig,
        config: EngineConfig,
        steps: int,
        micro_batch: int,
        ema: float | None,
        ranks: Ranks,
        ema_ramp: float | None = None,
    ) -> None:
        self.module = module
        self.ranks = ranks
        self.train_state = 0
        self._config = config
        self._optimizer_config = optimizer
        self._steps = steps
        self._micro = 0
        self._bad = 0
        self._kept: Tensor | None = None
        self._dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        self._groups = _groups(module, parts, optimizer)
        self._names = tuple(name for group in self._groups for name in group.names)
        self._shapes = {
            name: p.shape for group in self._groups for name, p in zip(group.names, group.params, strict=True)
        }
        self._name_of = {id(param): name for name, param in module.named_parameters()}

        module.to(ranks.device)
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        # DeepSpeed rounds frozen weights to bf16, and partitions them under ZeRO 3; exports need them as they were.
        self._frozen: dict[str, Tensor] = {}
        if ranks.is_main:
            frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
            self._frozen = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in frozen.items()}
        self._masters, self._adam, self._deepspeed = self._initialize(micro_batch)
        self._ema = None if ema is None else Ema(self._masters.shards)
        self._ema_decay = (ema or 0.0, ema_ramp)

    def _initialize(self, micro_batch: int) -> tuple[Masters, torch.optim.AdamW, Any]:
        import deepspeed

        config, groups = self._config, self._groups
        originals: dict[str, Tensor] = {}
        targets: list[list[nn.Parameter] | list[Tensor]]
        if config.zero == 0:
            if self._dtype != torch.float32:
                for param in self.module.parameters():
                    if not param.requires_grad:
                        param.data = param.data.to(self._dtype)
            summed = config.accumulation > 1 or self.ranks.world_size > 1
            replicated = ReplicatedMasters(groups, self._dtype, summed=summed)
            targets = [[shard] for shard in replicated.shards]
        else:
            targets = [list(group.params) for group in groups]
            if self._dtype != torch.float32:
                # DeepSpeed makes the fp32 master weights from the rounded ones.
                pairs = (
                    (name, param) for group in groups for name, param in zip(group.names, group.params, strict=True)
                )
                originals = {name: param.detach().to("cpu", copy=True) for name, param in pairs}
        adam = torch.optim.AdamW(
            [
                {"params": target, "name": group.name, "betas": group.optimizer.betas}
                for target, group in zip(targets, groups, strict=True)
            ],
            lr=self._optimizer_config.lr,
            weight_decay=self._optimizer_config.weight_decay,
            fused=self.ranks.device.type == "cuda",
        )
        # ZeRO 3 puts a function of its own in its place, for good.
        linear = nn.functional.linear
        self._linear = None if linear.__module__.startswith("deepspeed") else linear
        boxed = Boxed(self.module, self.autocast)
        if config.zero == 3:
            open_outputs(boxed.modules())
        settings = self._deepspeed_config(micro_batch)
        # Its bf16 optimizer prints tables of memory use; its warnings go through its logger.
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(model=boxed, optimizer=adam, config=settings, dist_init_required=False)
        if config.zero == 3:
            close_outputs(boxed.modules())
        if config.zero == 0:
            engine.enable_backward_allreduce = False
            replicated.link(adam)
            return replicated, adam, engine
        masters = ShardedMasters(groups, adam, engine.optimizer, config.zero)
        for name, value in originals.items():
            masters.assign(name, value.to(self.ranks.device))
        return masters, adam, engine

    def _deepspeed_config(self, micro_batch: int) -> dict[str, Any]:
        sharded = self._config.zero > 0
        total = sum(shape.numel() for shape in self._shapes.values())
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self._config.accumulation,
            "gradient_clipping": (self._optimizer_config.clip or 0.0) if sharded else 0.0,
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self._config.zero, "reduce_bucket_size": min(_BUCKET, max(total, 2))},
            "bf16": {
                "enabled": sharded and self._dtype == torch.bfloat16,
                "immediate_grad_update": True,
                "check_grad_overflow": True,
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            # Sums of bf16 gradients over many ranks lose what the fp32 accumulation keeps.
            "communication_data_type": "fp32",
        }

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Context in which the module computes: bf16 autocast, or nothing in fp32.

        For calls of `module` that go past the engine, such as a critic's verdict in the generator's step.
        """
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward through DeepSpeed."""
        return self._deepspeed(*args, **kwargs).content

    def backward(self, loss: Tensor, keep: Tensor | None = None) -> None:
        """Compute gradients of a scalar loss, the mean over this rank's micro-batch; accumulation divides it.

        Args:
            loss: The loss.
            keep: A boolean on the device, the same on every rank: false drops the optimizer step.
        """
        # A loss that is not finite can still have finite gradients. The factor, 1 or NaN, carries it into all of them,
        # and the gradient norm into all ranks, without asking the device for the loss.
        good = torch.isfinite(loss.detach())
        if keep is not None:
            good = good & keep
            self._kept = keep if self._kept is None else self._kept & keep
        loss = loss * torch.where(good, 1.0, math.nan)
        self._deepspeed.backward(loss)
        if isinstance(self._masters, ReplicatedMasters):
            self._masters.collect(first=self._micro % self._config.accumulation == 0)

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each part in the coming optimizer step."""
        return {
            group.name: group.optimizer.lr * rate_factor(group.optimizer, self.train_state, self._steps)
            for group in self._groups
        }

    def step(self, terms: Mapping[str, Tensor] | None = None) -> StepResult:
        """End a micro-batch; the last one of an optimizer step changes the weights.

        Args:
            terms: The terms of the loss by name, to say which of them was not finite where a step is skipped.

        Returns:
            What happened, the same on every rank.

        Raises:
            NotFiniteError: `max_bad_steps` optimizer steps in a row were skipped.
        """
        self._micro += 1
        rates = self.rates()
        if self._micro % self._config.accumulation != 0:
            self._deepspeed.step()
            return StepResult(math.nan, rates, skipped=False, applied=False)
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]]
        # At most one wait for the device per step is ours, in the step of replicated masters. Under ZeRO 1–3 DeepSpeed
        # has read the norm, reduced over the ranks, to decide the same; its answer is on the host already.
        decay = ema_decay(*self._ema_decay, self.train_state + 1)
        norm: Tensor | float
        if isinstance(self._masters, ReplicatedMasters):
            norm = self._masters.step(
                self.train_state + 1, clip=self._optimizer_config.clip, ema=self._ema, decay=decay
            )
            self._deepspeed.step()
            applied = math.isfinite(norm)
        else:
            self._deepspeed.step()
            applied = bool(self._deepspeed.was_step_applied())
            norm = self._deepspeed.get_global_grad_norm()
            if applied and self._ema is not None:
                self._ema.update(decay)
        kept, self._kept = self._kept, None
        # The device is asked only for the reason of a step that it has not taken.
        dropped = None if kept is None else not applied and not bool(kept.item())
        if not applied:
            self._count_bad("A loss was beyond the stage's guard" if dropped else self._blamed(terms or {}))
            return StepResult(norm, rates, skipped=True, applied=False, dropped=dropped)
        self._bad = 0
        self.train_state += 1
        return StepResult(norm, rates, skipped=False, applied=True, dropped=dropped)

    def _blamed(self, terms: Mapping[str, Tensor]) -> str:
        """Say which terms were not finite on any rank. Every rank calls it."""
        mine = [name for name, value in terms.items() if not bool(value.detach().isfinite().all())]
        found = sorted({name for names in self.ranks.all_gather_object(mine) for name in names})
        if not found:
            return "The loss or its gradient was not finite"
        return f"The loss was not finite in {', '.join(repr(name) for name in found)}"

    def _count_bad(self, reason: str) -> None:
        self._bad += 1
        limit = self._config.max_bad_steps
        if self._bad >= limit:
            raise NotFiniteError(
                f"{reason} in {self._bad} optimizer steps in a row, after {self.train_state} good ones; lower "
                "optimizer.lr or set optimizer.clip, and go on from the last checkpoint."
            )
        if self.ranks.is_main:
            _log.warning(
                "%s after step %d; the step is skipped on all ranks (%d in a row, training stops at %d).",
                reason,
                self.train_state,
                self._bad,
                limit,
            )

    def _averaged(self, kind: str) -> contextlib.AbstractContextManager[None]:
        if kind == "raw":
            return contextlib.nullcontext()
        assert kind == "ema", kind
        if self._ema is None:
            raise UnderpaintError(
                "The moving average was asked for, but 'ema' is null in this stage; use the raw weights."
            )
        return self._ema.swapped()

    @contextlib.contextmanager
    def using(self, kind: str) -> Iterator[None]:
        """Context in which `module` computes with the weights of `kind`, for measurements. Every rank enters it.

        Args:
            kind: ``raw`` or ``ema``.
        """
        with self._averaged(kind):
            self._masters.publish()
            yield
        self._masters.publish()

    def state(self, kind: str) -> dict[str, Tensor]:
        """Gather the full state dict in fp32. Every rank calls it.

        Args:
            kind: ``raw`` for the weights, ``ema`` for their average. Frozen weights and buffers are the same in both.

        Returns:
            On rank 0 all tensors of ``module.state_dict()`` by name, on the CPU; on the others nothing.

        Raises:
            UnderpaintError: ``ema`` without a moving average.
        """
        gathered: dict[str, Tensor] = dict(self._frozen)
        with self._averaged(kind):
            for name in self._names:
                value = self._masters.full(name)
                if self.ranks.is_main:
                    gathered[name] = value.to("cpu", copy=True)
        if not self.ranks.is_main:
            return {}
        result: dict[str, Tensor] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter):
                result[name] = gathered[self._name_of[id(tensor)]]
            else:
                tensor = tensor.detach().to("cpu", copy=True)
                result[name] = tensor.float() if tensor.is_floating_point() else tensor
        return result

    def save(self, folder: Path) -> None:
        """Write the training state, in a form that any number of ranks and any ZeRO stage can load.

        Full tensors, each in the file of one rank, ``engine-00000-of-0000N.safetensors``. Every rank calls it.

        Raises:
            OSError: Some rank could not write; raised on all of them.
        """
        write_state(
            folder,
            self.ranks,
            step=self.train_state,
            sizes={name: shape.numel() for name, shape in self._shapes.items()},
            read=self._read,
            kinds=("param", *MOMENTS, *(("ema",) if self._ema is not None else ())),
            buffers=self._buffers(),
        )

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.module.state_dict(keep_vars=True).keys()
        return {name: buffer.detach() for name, buffer in self.module.named_buffers() if name in persistent}

    def _read(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        with self._averaged("ema" if kind == "ema" else "raw"):
            for name in self._names:
                yield name, self._masters.full(name, kind if kind in MOMENTS else None)

    def load(self, folder: Path) -> None:
        """Take up a training state that `save` wrote. Every rank calls it.

        Raises:
            DataError: Files are missing or damaged, or hold the state of another module; raised on all ranks.
        """
        buffers = self._buffers()
        kinds = ("param", *MOMENTS, *(("ema",) if self._ema is not None else ()))
        with StateReader(folder, self.ranks, shapes=self._shapes, kinds=kinds, buffers=buffers) as reader:
            for kind in kinds:
                moment = kind if kind in MOMENTS else None
                with self._averaged("ema" if kind == "ema" else "raw"):
                    for name in self._names:
                        self._masters.assign(name, reader.tensor(kind, name).to(self.ranks.device), moment)
            for name, buffer in buffers.items():
                buffer.copy_(reader.tensor("buffer", name))
            self.train_state = reader.step
        self._masters.publish()
        for shard in self._masters.shards:
            self._adam.state[shard]["step"].fill_(float(self.train_state))

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers. The module is not usable afterwards; take `state` first."""
        self._deepspeed.destroy()
        if self._linear is not None:
            nn.functional.linear = self._linear
