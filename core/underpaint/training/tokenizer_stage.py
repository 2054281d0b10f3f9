"""One stage of tokenizer training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from underpaint.config.stages import EquivarianceConfig, GuardConfig, LoraConfig, StageConfig
from underpaint.data.transforms import to_tensor
from underpaint.errors import ConfigError, DataError, suggest
from underpaint.interfaces.adapter import Posterior
from underpaint.interfaces.decoder import Reconstruction
from underpaint.interfaces.encoder import Features
from underpaint.interfaces.loss import StepSizes, StepTensors
from underpaint.models.tokenizer import Tokenizer
from underpaint.training.equivariance import View, draw_view, resized, turned_latents
from underpaint.training.guard import Guard
from underpaint.training.lora import add_pairs
from underpaint.training.terms import WeightedLosses

__all__ = ["TokenizerModule", "check_teacher", "shown", "tokenizer_losses", "tokenizer_sizes"]

_PARTS = ("encoder", "adapter", "decoder")
_MADE = frozenset({"posterior", "latents", "reconstruction"})


def tokenizer_sizes(tokenizer: Tokenizer, height: int, width: int) -> StepSizes:
    """Return what losses may need to know of a tokenizer, for images of a size."""
    return StepSizes(
        image=(height, width),
        latent_channels=tokenizer.latent_channels,
        grid=tokenizer.grid(height, width),
        feature_channels=tokenizer.encoder.info.channels,
    )


def tokenizer_losses(
    stage: StageConfig,
    index: int,
    device: torch.device,
    sizes: StepSizes,
    *,
    has_labels: bool = False,
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> WeightedLosses:
    """Make the losses of a tokenizer stage.

    Raises:
        ConfigError: One of them needs what the stage does not have, such as a teacher.
    """
    available = {"step", "inputs", "images", "encoder", "features", "posterior", "latents", "reconstruction"}
    if has_labels:
        available.add("labels")
    if stage.teacher is not None:
        available |= {"reference_features", "reference_posterior"}
    return WeightedLosses(
        stage.losses,
        available=frozenset(available),
        sizes=sizes,
        device=device,
        path=f"stages[{index}].losses",
        average=average,
    )


def check_teacher(teacher: Tokenizer, student: Tokenizer, stage: StageConfig) -> None:
    """Refuse a teacher whose latents cannot be compared with the student's.

    Raises:
        DataError: Channels or strides differ.
    """
    mine = (student.latent_channels, student.stride)
    other = (teacher.latent_channels, teacher.stride)
    if mine != other:
        raise DataError(
            f"The teacher '{stage.teacher}' of stage '{stage.name}' gives {other[0]} channels at stride {other[1]}, "
            f"and the stage trains {mine[0]} channels at stride {mine[1]}."
        )


class TokenizerModule(nn.Module):
    """What the engine trains: encoder, adapter, decoder and the losses' heads, with the loss computed in ``forward``.

    Parts that the stage does not train are frozen, in evaluation mode, and run without gradients when nothing
    before them learns. Parts that no loss asks for are not run. The teacher and the losses that do not train are not
    submodules: they are neither trained nor saved.

    Args:
        tokenizer: The model to train, modified in place.
        trains: Parts that learn, or submodules of them such as ``decoder.heads``.
        losses: Weighted losses.
        teacher: Frozen tokenizer whose latents are the reference, or None.
        equivariance: Equivariance regularisation, or None.
        also: Fields of `StepTensors` that are needed beside those that the losses read.

    Attributes:
        learning: The modules that learn, by name; the heads of the losses are ``losses``.

    Raises:
        ConfigError: `trains` names no part of this tokenizer, or an adaptive weight has nothing to be measured at.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        trains: Sequence[str],
        losses: WeightedLosses,
        teacher: Tokenizer | None = None,
        equivariance: EquivarianceConfig | None = None,
        also: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.encoder = tokenizer.encoder
        self.adapter = tokenizer.adapter
        self.decoder = tokenizer.decoder
        self.losses = losses.heads
        self._equivariance = equivariance
        self._needs = losses.needs | also
        self._stride = tokenizer.stride
        self._outside: tuple[Any, ...] = (losses, None if teacher is None else teacher.eval().requires_grad_(False))
        for name in _PARTS:
            getattr(self, name).requires_grad_(False)
        self.learning: dict[str, nn.Module] = {path: _submodule(self, path) for path in trains}
        for module in self.learning.values():
            module.requires_grad_(True)
        if len(self.losses):
            self.learning["losses"] = self.losses
        self._learns = [any(path.partition(".")[0] == name for path in trains) for name in _PARTS]
        self._layers: dict[str, nn.Parameter] = {at: self._last_layer(at) for at in losses.adaptive}
        self.train()

    def add_guard(self, config: GuardConfig, average: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor] | None:
        """Watch the reconstruction losses of the stage.

        Args:
            config: The guard.
            average: Averages a tensor over the ranks.

        Returns:
            From an optimizer step to whether the losses of the last forward may count, on the device; None where the
            stage has no reconstruction loss.
        """
        losses: WeightedLosses = self._outside[0]
        keys = [item.key for item in losses.items if item.is_reference]
        if not keys:
            return None
        self.guard = Guard(config, keys, average).to(next(self.encoder.parameters()).device)
        return lambda step: self.guard(losses.reconstruction, step)

    def add_lora(self, config: LoraConfig) -> None:
        """Freeze the parts that are adapted, and give them low-rank pairs that learn in their place.

        Raises:
            ConfigError: A part has no such layers, or an adaptive weight is measured at one.
        """
        for name in config.parts:
            add_pairs(self.learning[name], config, name)
        for at, layer in self._layers.items():
            if not layer.requires_grad:
                raise ConfigError(
                    f"An adaptive weight is measured at the last layer of the {at}, where with lora only pairs learn; "
                    "give the loss a fixed weight, or leave the part out of lora.parts."
                )

    def _last_layer(self, part: str) -> nn.Parameter:
        layer = getattr(self, part).last_layer()
        name = getattr(self, part).spec.name
        if not isinstance(layer, nn.Parameter):
            raise ConfigError(
                f"An adaptive weight is measured at the last layer of the {part}, and '{name}' declares none; "
                "give the loss a fixed weight."
            )
        if not layer.requires_grad:
            raise ConfigError(
                f"An adaptive weight is measured at the last layer of the {part}, which this stage does not train; "
                "give the loss a fixed weight, or train the part."
            )
        return layer

    def train(self, mode: bool = True) -> TokenizerModule:
        """Set training mode for what learns; the rest stays in evaluation mode."""
        self.training = mode
        for name in _PARTS:
            getattr(self, name).train(False)
        for module in self.learning.values():
            module.train(mode)
        return self

    def forward(
        self, pixels: Tensor, step: int, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], StepTensors]:
        """Compute the loss of B×H×W×3 uint8 images.

        Returns:
            The weighted loss; its terms; what critics judge, images and reconstruction, detached.
        """
        total, terms, tensors = self.judge(pixels, step, labels)
        return total, terms, shown(tensors)

    def judge(
        self, pixels: Tensor, step: int, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], StepTensors]:
        """Compute the loss of B×H×W×3 uint8 images, and return all that it was computed from.

        Losses are given float32 and add up in it whatever the precision of the parts. In bf16 their networks compute
        under autocast like the parts, but for what a loss itself takes out of it, as SSIM and the VF loss do.
        """
        losses: WeightedLosses
        losses, teacher = self._outside
        images = to_tensor(pixels)
        view = View()
        if self._equivariance is not None and self.training:
            view = draw_view(self._equivariance, square=images.shape[-2] == images.shape[-1])
        inputs = self._shrunk(images, view.input_scale)
        # Without an adapter that learns or a part that is run, the encoder's own type decides.
        dtype = next(self.encoder.parameters()).dtype
        given = inputs.to(dtype)
        tensors = StepTensors(step=step, inputs=inputs, images=inputs, labels=labels, encoder=self.encoder)
        encoder_learns, adapter_learns, _ = self._learns
        recording = torch.is_grad_enabled()
        if self._needs & (_MADE | {"features"}):
            with torch.set_grad_enabled(encoder_learns and recording):
                features = self.encoder(given)
            tensors.features = _float_features(features)
            if self._needs & _MADE:
                with torch.set_grad_enabled((encoder_learns or adapter_learns) and recording):
                    posterior = self.adapter(features)
                    latents = posterior.sample() if self.training else posterior.mode()
                tensors.posterior = _float_posterior(posterior)
                tensors.latents = latents.float()
                if "reconstruction" in self._needs:
                    made = self.decoder(turned_latents(latents, view))
                    tensors.reconstruction = Reconstruction(
                        made.image.float(), tuple(image.float() for image in made.pyramid)
                    )
                    tensors.images = self._target(images, inputs, view, made.image)
        if teacher is not None:
            with torch.no_grad():
                reference = teacher.encoder(given.to(next(teacher.parameters()).dtype))
                tensors.reference_features = _float_features(reference)
                tensors.reference_posterior = _float_posterior(teacher.adapter(reference))
        total, terms = losses(tensors, self._layers)
        return total, terms, tensors

    def _shrunk(self, images: Tensor, scale: float) -> Tensor:
        if scale == 1.0:
            return images
        sides = (max(1, round(side * scale / self._stride)) * self._stride for side in images.shape[-2:])
        return resized(images, *sides)

    def _target(self, images: Tensor, inputs: Tensor, view: View, made: Tensor) -> Tensor:
        if view.latent_scale == 1.0 and not view.turns:
            return inputs
        # Quarter turns are drawn for square images only, so the sides need not change places.
        return torch.rot90(resized(images, *made.shape[-2:]), view.turns, (-2, -1))


def shown(tensors: StepTensors) -> StepTensors:
    """Return what critics judge of a step: images and reconstruction, detached."""
    made = tensors.reconstruction
    copy = None if made is None else Reconstruction(made.image.detach(), tuple(i.detach() for i in made.pyramid))
    return StepTensors(step=tensors.step, images=tensors.images, reconstruction=copy)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    node = module
    for depth, name in enumerate(path.split(".")):
        children = dict(node.named_children())
        if name not in children:
            place = ".".join(path.split(".")[:depth])
            raise ConfigError(f"trains names '{path}', but '{place}' has no '{name}'. {suggest(name, children)}")
        node = children[name]
    return node


def _float_features(features: Features) -> Features:
    pooled = None if features.pooled is None else features.pooled.float()
    tokens = None if features.class_tokens is None else tuple(token.float() for token in features.class_tokens)
    return Features(tuple(m.float() for m in features.maps), pooled, tokens)


def _float_posterior(posterior: Posterior) -> Posterior:
    return Posterior(posterior.mean.float(), None if posterior.logvar is None else posterior.logvar.float())
