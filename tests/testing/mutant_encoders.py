"""The spoilt encoders of ``mutants.py``: the skeleton of ``plugins new``, each with one thing wrong."""

import attrs
import torch
from torch import nn
from underpaint_demo_encoder.encoder import Conv as Encoder

from underpaint import Features


class WrongChannels(Encoder):
    """Declares other channels."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.info = attrs.evolve(self.info, channels=(8, 8))


class WrongGrid(Encoder):
    """Halves the grid."""

    def forward(self, images):
        return Features(tuple(nn.functional.avg_pool2d(m, 2) for m in super().forward(images).maps))


class KeepsClassToken(Encoder):
    """Keeps a first token and drops the last cell instead."""

    def forward(self, images):
        maps = []
        for item in super().forward(images).maps:
            tokens = item.flatten(2)
            shifted = torch.cat((tokens.mean(2, keepdim=True), tokens[:, :, :-1]), dim=2)
            maps.append(shifted.reshape(item.shape))
        return Features(tuple(maps))


class StrayClassToken(Encoder):
    """Gives a class token more than it has maps."""

    def forward(self, images):
        features = super().forward(images)
        tokens = tuple(m.mean((2, 3)) for m in (*features.maps, features.maps[-1]))
        return Features(features.maps, features.pooled, tokens)


class Transposed(Encoder):
    """Swaps height and width."""

    def forward(self, images):
        return Features(tuple(m.transpose(2, 3) for m in super().forward(images).maps))


class NotNormalised(Encoder):
    """Takes images as they come."""

    def forward(self, images):
        return super().forward((images * self.std + self.mean) * 2 - 1)


class NormalisedTwice(Encoder):
    """Normalises what is normalised."""

    def forward(self, images):
        return super().forward((((images + 1) / 2 - self.mean) / self.std) * 2 - 1)


class WrongMean(Encoder):
    """Declares the mean of another model."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.info = attrs.evolve(self.info, mean=(0.5, 0.5, 0.5))


class RandomInEval(Encoder):
    """Draws noise in evaluation mode."""

    def forward(self, images):
        return Features(tuple(m + 0.01 * torch.randn_like(m) for m in super().forward(images).maps))


class MixesBatch(Encoder):
    """Normalises over the batch."""

    def forward(self, images):
        return Features(tuple(m - m.mean(0, keepdim=True) for m in super().forward(images).maps))


class SingleFloat(Encoder):
    """Gives float32 whatever it is."""

    def forward(self, images):
        return Features(tuple(m.float() for m in super().forward(images).maps))


class OtherDevice(Encoder):
    """Makes a tensor on the CPU."""

    def forward(self, images):
        return Features(tuple(m + torch.zeros(m.shape[-1]) for m in super().forward(images).maps))


class Counts(Encoder):
    """Counts its calls in a buffer."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


class HiddenWeight(Encoder):
    """Has a random weight that the state dict does not."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.register_buffer("hidden", torch.randn(config.width, 1, 1), persistent=False)

    def forward(self, images):
        return Features(tuple(m + self.hidden for m in super().forward(images).maps))


class Unpicklable(Encoder):
    """Holds a lambda."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.act = lambda x: x


class NoGradient(Encoder):
    """Always runs without gradients."""

    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class FrozenWhenMade(Encoder):
    """Freezes itself."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.requires_grad_(False)


class NoLicence(Encoder):
    """States no licence."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.info = attrs.evolve(self.info, licence=" ")


class NotANumber(Encoder):
    """Divides zero by zero."""

    def forward(self, images):
        features = super().forward(images)
        return Features(features.maps, features.pooled * 0 / 0)


class AnySize(Encoder):
    """Accepts any size."""

    def grid(self, height, width):
        return height // self.info.stride, width // self.info.stride


class ReadsValues(Encoder):
    """Looks at a weight while it is made."""

    def __init__(self, config, *, weights, load=True):
        super().__init__(config, weights=weights, load=load)
        self.scale = float(self.patches.weight.abs().max())


class Ignorant(Encoder):
    """Gives the same features for every image and every weight."""

    def forward(self, images):
        return Features(tuple(m * 0 + 1 for m in super().forward(images).maps))


class Undocumented(Encoder):
    pass
