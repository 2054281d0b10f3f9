"""Builds and exports the diffusion model of a tokenizer stage that trains one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.schema import Recipe
from underpaint.data.loader import Batch
from underpaint.errors import ConfigError
from underpaint.interfaces.loss import StepSizes
from underpaint.models.build import build_generator_parts
from underpaint.models.folders import copy_generator, load_folder, save_generator
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.models.tokenizer import Tokenizer
from underpaint.run.data import RunData
from underpaint.run.session import Session
from underpaint.training.diffusion_stage import DiffusionModule, StepNoise, check_losses, diffusion_losses
from underpaint.training.heads import differences
from underpaint.training.joint_stage import JointModule, LatentNorm, running_statistics
from underpaint.training.tokenizer_stage import TokenizerModule, tokenizer_sizes

__all__ = ["Partner", "check_denoiser", "take_denoiser"]


def check_denoiser(recipe: Recipe, index: int, tokenizer: Tokenizer, data: RunData) -> None:
    """Refuse a stage's diffusion model that cannot be made for this tokenizer and data, before any stage is trained.

    Args:
        recipe: The recipe.
        index: Which stage of it, one with a denoiser.
        tokenizer: The recipe's, of any weights.
        data: The images.

    Raises:
        ConfigError: Backbone, losses and tokenizer do not fit each other, or nothing would reach the tokenizer.
        DataError: The conditioner needs captions that the data set lacks, or a part needs files that are not there.
    """
    config, path = recipe.stages[index].diffusion(), _path(index)
    sizes = tokenizer_sizes(tokenizer, data.config.height, data.config.width)
    # On the meta device it takes no memory for weights.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone, _ = build_generator_parts(
            config,
            tokenizer,
            grid=sizes.grid,
            classes=len(data.classes),
            has_text=data.train.has_text,
            seed=0,
            path=path,
        )
    name = config.backbone.name
    if backbone.companion:
        raise ConfigError(
            f"{path}.backbone '{name}' denoises a companion vector, which a stage cannot give it; "
            "take a backbone without one, such as 'sit/XL-1'."
        )
    sizes = attrs.evolve(sizes, hidden_width=backbone.width)
    with torch.random.fork_rng(devices=[]):
        losses = diffusion_losses(config, torch.device("cpu"), sizes, path)
        check_losses(losses, config, backbone, sizes)
    if not any(item.aligns for item in losses.items):
        raise ConfigError(
            f"{path}.losses has no loss that reads hidden states of the backbone, so nothing of it would reach the "
            "tokenizer; add {name: repa, weight: 0.5, encoder: …}, or train the diffusion model in 'diffusion'."
        )


class Partner:
    """The diffusion model that trains with the tokenizer of a stage, as `check_denoiser` lets it pass.

    Args:
        session: The run.
        index: Which stage of the recipe.
        tokenizer: Whose latents it is trained on.
        sizes: Those of the tokenizer and of the images.

    Attributes:
        losses: Those of the diffusion model.
        blocks: Its blocks.
    """

    def __init__(self, session: Session, index: int, tokenizer: Tokenizer, sizes: StepSizes) -> None:
        stage, data = session.recipe.stages[index], session.data
        assert stage.denoiser is not None
        config, path = stage.diffusion(), _path(index)
        self._session = session
        self._stage = stage
        backbone, conditioner = build_generator_parts(
            config,
            tokenizer,
            grid=sizes.grid,
            classes=len(data.classes),
            has_text=data.train.has_text,
            seed=session.stage_seed(index),
            path=path,
        )
        device = session.ranks.device
        losses = diffusion_losses(config, device, attrs.evolve(sizes, hidden_width=backbone.width), path)
        self.blocks: Sequence[nn.Module] = backbone.blocks() or [backbone]
        self._text = conditioner.accepts == "text"
        self.losses = losses
        self._denoiser = DiffusionModule(backbone, conditioner, losses, path=config.path, predicts=config.predicts)
        shape = (sizes.latent_channels, *sizes.grid)
        self._noise = StepNoise(config, shape, session.stage_seed(index), device)

    def join(self, tokenizer: TokenizerModule, channels: int) -> JointModule:
        """Return the module that the engine trains, on the device."""
        config = self._stage.denoiser
        assert config is not None
        norm = LatentNorm(channels, momentum=config.momentum, average=self._session.ranks.average)
        module = JointModule(tokenizer, self._denoiser, norm, alignment=config.alignment)
        return module.to(self._session.ranks.device)

    def arguments(self, batch: Batch, step: int, micro: int) -> tuple[Tensor | Sequence[str], Tensor, Tensor, Tensor]:
        """Return what the diffusion model is given with a micro-batch: inputs, noise, t, drop."""
        size = len(batch)
        first = (self._session.ranks.rank * self._session.recipe.engine.accumulation + micro) * size
        return (self._inputs(batch), *self._noise.rows(step, slice(first, first + size)))

    def one(self) -> tuple[Tensor | Sequence[str], Tensor, Tensor, Tensor]:
        """Return the same for a single image, for counting the arithmetic."""
        inputs: Tensor | list[str] = [""] if self._text else torch.zeros(1, dtype=torch.int64)
        return (inputs, *self._noise.rows(0, slice(0, 1)))

    def _inputs(self, batch: Batch) -> Tensor | Sequence[str]:
        if self._text:
            return [text or "" for text in batch.texts or ("",) * len(batch)]
        # On the CPU, where the conditioner checks their range. Unlabelled data is all of one class.
        return torch.zeros(len(batch), dtype=torch.int64) if batch.labels is None else batch.labels

    def export(self, state: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
        """Write the generator to ``stages/NAME/generator``, and give the tokenizer the running statistics.

        Args:
            state: Full state dict of the joint module.
            tokenizer: The stage's result.
        """
        tokenizer.statistics = running_statistics(state["norm.mean"], state["norm.variance"])
        recipe, stage = self._session.recipe, self._stage
        config = stage.diffusion()
        generator = Generator(
            tokenizer,
            self._denoiser.backbone,
            self._denoiser.conditioner,
            grid=tokenizer.grid(self._session.data.config.height, self._session.data.config.width),
            classes=self._session.data.classes,
            settings=SamplingSettings(sampler=recipe.evaluation.sampler, guidance=recipe.evaluation.guidance),
            path=config.path,
            predicts=config.predicts,
            about={
                "title": f"{recipe.name}: generator after stage {stage.name}",
                "facts": [
                    f"{config.backbone.name} trained with the tokenizer for {stage.steps} steps of {stage.batch}."
                ],
            },
        )
        own = {name.removeprefix("denoiser."): tensor for name, tensor in state.items()}
        parts = {name: tensor for name, tensor in own.items() if name.startswith(("backbone.", "conditioner."))}
        save_generator(copy_generator(generator, parts), self._session.folder.stage(stage.name) / "generator")


def _path(index: int) -> str:
    return f"stages[{index}].denoiser"


def take_denoiser(session: Session, start: str, module: DiffusionModule) -> None:
    """Give a new diffusion model the weights of the one that a stage trained.

    Raises:
        ConfigError: They are of another make.
    """
    found = load_folder(session.folder.stage(start) / "generator")
    assert isinstance(found, Generator)
    for part in ("backbone", "conditioner"):
        mine, theirs = getattr(module, part), getattr(found, part)
        wrong = differences(mine.state_dict(), theirs.state_dict())
        if wrong:
            raise ConfigError(
                f"diffusion.start is '{start}', whose {part} differs from that of 'diffusion' in {len(wrong)} tensors, "
                f"the first '{wrong[0]}'; give both the same options, or remove diffusion.start."
            )
        mine.load_state_dict(theirs.state_dict())
