"""PatchGAN critics: convolutions that judge overlapping patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from underpaint import ConfigError, StepSizes, StepTensors
from underpaint_critics.adversary import Adversary, Judgement
from underpaint_critics.config import MultiScaleConfig, PatchGanConfig
from underpaint_critics.layers import LocalBatchNorm

__all__ = ["MultiScale", "PatchCritic", "PatchGan"]

_KERNEL = 4
_LOCAL = 8


class PatchCritic(nn.Module):
    """Isola et al. 2017: `layers` convolutions of stride 2, one of stride 1, and one to the logits, all 4×4.

    All but the first and the last are normalised; leaky rectifiers of slope 0.2 stand between. Weights start from
    N(0, 0.02), scales of norms from N(1, 0.02).

    Args:
        channels: Channels of the first layer, doubled by each next up to eight times as many.
        layers: Convolutions of stride 2.
        padding: Pixels of zeros around each layer's input: 1 in pix2pix and latent diffusion, 2 in pix2pixHD.
        norm: From channels to a norm.
        bias: Whether normalised convolutions have a bias, which their norm takes away again.
    """

    def __init__(
        self, channels: int, layers: int, *, padding: int, norm: Callable[[int], nn.Module], bias: bool
    ) -> None:
        super().__init__()
        widths = [3, *(channels * min(2**level, 8) for level in range(layers + 1))]
        self.layers = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = 2 if level < layers else 1
            convolution = nn.Conv2d(inputs, outputs, _KERNEL, stride, padding, bias=bias or level == 0)
            normalised = [norm(outputs)] if level else []
            self.layers.append(nn.Sequential(convolution, *normalised, nn.LeakyReLU(0.2)))
        self.layers.append(nn.Conv2d(widths[-1], 1, _KERNEL, 1, padding))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all layers for B×3×H×W images; the last holds the logits, B×1×h×w."""
        x = images.to(next(self.parameters()).dtype).contiguous(memory_format=torch.channels_last)
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class _Pyramid(nn.Module):
    """Critics on images and on halves of them, the finest first."""

    def __init__(self, critics: list[PatchCritic]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(critics)

    def forward(self, seen: tuple[Tensor, ...]) -> Judgement:
        (x,) = seen
        judgement = []
        for index, critic in enumerate(self.scales):
            if index:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            judgement.append(critic(x))
        return judgement


class PatchGan(Adversary):
    """An adversarial loss with the PatchGAN critic of latent diffusion.

    The critic's two terms are halved, as there. With three layers a logit sees 70×70 pixels. The critic has 2,765,633
    parameters at the default options.
    """

    def __init__(self, config: PatchGanConfig) -> None:
        # Statistics of the batch at hand are all that a critic in training ever uses.
        batch_norm = partial(nn.BatchNorm2d, track_running_stats=False)
        norm = batch_norm if config.norm == "batch" else partial(LocalBatchNorm, virtual_batch=_LOCAL)
        critic = PatchCritic(config.channels, config.layers, padding=1, norm=norm, bias=False)
        super().__init__(config, _Pyramid([critic]))
        self._layers = config.layers

    def prepare(self, sizes: StepSizes) -> None:
        """Check that the images are large enough for a logit.

        Raises:
            ConfigError: They are not.
        """
        # Each of the two last layers takes one pixel off.
        least = 3 * 2**self._layers
        if min(sizes.image) < least:
            raise ConfigError(
                f"The loss 'critics/patchgan' with {self._layers} layers needs images of {least} px or more, and they "
                f"have {sizes.image[0]}×{sizes.image[1]} px; lower its option 'layers'."
            )


class MultiScale(Adversary):
    """An adversarial loss with pix2pixHD's critics at several scales (Wang et al. 2018, eq. 3 and 4).

    Each critic is a `PatchCritic`; images are halved by 3×3 average pooling. The game is averaged over the critics.
    Feature matching is the mean absolute difference of each hidden map of the image and of its reconstruction, summed
    over maps with the weight 4 / (layers + 1) and averaged over critics. The critics have 8,299,587 parameters at the
    default options.
    """

    def __init__(self, config: MultiScaleConfig) -> None:
        norm = partial(LocalBatchNorm, virtual_batch=config.virtual_batch)
        critics = [
            PatchCritic(config.channels, config.layers, padding=2, norm=norm, bias=True) for _ in range(config.scales)
        ]
        super().__init__(config, _Pyramid(critics))
        self._feature_weight = config.feature_weight
        self._layers = config.layers

    def further_terms(self, fake: Judgement, step: StepTensors) -> dict[str, Tensor]:
        """Return ``feature_matching``, times its factor, unless that is 0."""
        if not self._feature_weight:
            return {}
        assert step.images is not None
        with torch.no_grad():
            real = self.judge(self.look(step.images))
        gaps = [
            (a.float() - b.float()).abs().mean()
            for ours, theirs in zip(fake, real, strict=True)
            for a, b in zip(ours[:-1], theirs[:-1], strict=True)
        ]
        weight = self._feature_weight * 4.0 / (self._layers + 1) / len(fake)
        return {"feature_matching": weight * torch.stack(gaps).sum()}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, LocalBatchNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
