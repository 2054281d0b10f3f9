"""The critics of adversarial losses, each trained by an engine of its own."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from safetensors.torch import save
from torch import Tensor, nn

from underpaint.config.engine import EngineConfig, OptimizerConfig
from underpaint.config.losses import CriticConfig
from underpaint.config.recipe import write_atomically
from underpaint.config.stages import GuardConfig
from underpaint.errors import ConfigError, DataError
from underpaint.interfaces.loss import AdversarialLoss, StepTensors
from underpaint.training.engine import Engine
from underpaint.training.heads import differences
from underpaint.training.ranks import Ranks
from underpaint.training.terms import LossItem
from underpaint.weights import load_weights

__all__ = ["CriticTrainer", "carry_critic", "check_whole"]


class _CriticModule(nn.Module):
    """What the critic's engine trains; the loss itself, with its frozen networks, is not part of it."""

    def __init__(self, loss: AdversarialLoss) -> None:
        super().__init__()
        self.critic = loss.critic
        self._outside = (loss,)

    def forward(self, step: StepTensors) -> tuple[Tensor, dict[str, Tensor]]:
        (loss,) = self._outside
        terms = loss.criticise(step)
        return torch.stack([value.float() for value in terms.values()]).sum(), terms


def check_whole(item: LossItem, config: EngineConfig) -> None:
    """Refuse a critic that no rank would have the whole of.

    Args:
        item: The adversarial loss.
        config: Engine settings of the run.

    Raises:
        ConfigError: ZeRO 3 was asked for.
    """
    if config.zero == 3:
        raise ConfigError(
            f"The loss '{item.config.name}' has a critic, and engine.zero is 3: the model's step needs the whole "
            "critic on every rank; set engine.zero to 2 or less."
        )


class CriticTrainer:
    """Trains the critic of one loss on the images and reconstructions that the model's step has just made.

    Args:
        item: The adversarial loss.
        optimizer: The stage's optimizer, where the critic has none of its own.
        config: Engine settings of the run.
        steps: Optimizer steps of the stage.
        micro_batch: Images of one forward on one rank.
        ranks: The processes.
        guard: Which steps are dropped, or None.

    Attributes:
        key: Name of the loss within the stage.
        dropped: Whether the guard dropped the last step; None where nothing was guarded.

    Raises:
        ConfigError: ZeRO 3 was asked for, which keeps no rank able to use the critic in the model's step.
    """

    def __init__(
        self,
        item: LossItem,
        *,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        steps: int,
        micro_batch: int,
        ranks: Ranks,
        guard: GuardConfig | None = None,
    ) -> None:
        assert isinstance(item.loss, AdversarialLoss)
        check_whole(item, config)
        self.key = item.key
        self.dropped: bool | None = None
        settings = item.config.critic or CriticConfig()
        own = settings.optimizer
        if own is None:
            # Its parts are those of the model.
            own = attrs.evolve(optimizer, parts={})
        self._start = settings.start
        self._guard = guard
        self._average = ranks.average
        self._module = _CriticModule(item.loss)
        self._engine = Engine(
            self._module,
            parts={"critic": item.loss.critic},
            optimizer=own,
            config=config,
            steps=max(1, steps - settings.start),
            micro_batch=micro_batch,
            ema=None,
            ranks=ranks,
        )

    def step(self, shown: StepTensors) -> dict[str, Tensor]:
        """Train on one micro-batch and return the critic's terms; nothing before its first step."""
        if shown.step < self._start:
            return {}
        loss, terms = self._engine(shown)
        keep = None
        if self._guard is not None and shown.step >= self._guard.after:
            keep = self._average(loss.detach()).abs() <= self._guard.critic
        self._engine.backward(loss, keep)
        self.dropped = self._engine.step(terms).dropped
        return {name: value.detach() for name, value in terms.items()}

    def save(self, folder: Path) -> None:
        """Write the training state into a subfolder of a checkpoint. Every rank calls it."""
        (folder / self.key).mkdir(exist_ok=True)
        self._engine.save(folder / self.key)

    def load(self, folder: Path) -> None:
        """Take up a training state that `save` wrote."""
        self._engine.load(folder / self.key)

    def export(self, folder: Path, ranks: Ranks) -> None:
        """Write the critic's weights for a later stage to carry on with. Every rank calls it."""
        state = self._engine.state("raw")
        if ranks.is_main:
            folder.mkdir(exist_ok=True)
            tensors = {name.removeprefix("critic."): tensor.contiguous() for name, tensor in state.items()}
            write_atomically(folder / f"{self.key}.safetensors", save(tensors))

    def close(self) -> None:
        """Release the engine."""
        self._engine.close()


def carry_critic(item: LossItem, folder: Path, stage: str) -> None:
    """Give a loss the critic that an earlier stage exported.

    Args:
        item: The adversarial loss.
        folder: The earlier stage's ``critics`` folder.
        stage: The earlier stage, for messages.

    Raises:
        DataError: That stage has no such critic, or one of another make.
    """
    assert isinstance(item.loss, AdversarialLoss)
    path = folder / f"{item.key}.safetensors"
    if not path.exists():
        found = sorted(file.stem for file in folder.glob("*.safetensors"))
        raise DataError(
            f"The critic of '{item.config.name}' should be carried over from stage '{stage}', which has "
            f"{'none of that loss: ' + ', '.join(found) if found else 'no critic'}; remove 'carry', or name another "
            "stage."
        )
    state = load_weights(str(path))
    wrong = differences(item.loss.critic.state_dict(), state)
    if wrong:
        raise DataError(
            f"The critic of stage '{stage}' differs from this stage's '{item.config.name}' in {len(wrong)} tensors, "
            f"the first '{wrong[0]}'; give both stages the same options, or remove 'carry'."
        )
    item.loss.critic.load_state_dict(state)
