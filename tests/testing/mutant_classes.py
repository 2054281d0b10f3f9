"""The classes behind ``mutants.py``: the skeletons of ``plugins new``, each with one thing wrong."""

import attrs
import torch
from torch import nn
from underpaint_demo_adapter.adapter import Linear
from underpaint_demo_backbone.backbone import Conv as Backbone
from underpaint_demo_conditioner.conditioner import Table
from underpaint_demo_decoder.decoder import Conv as Decoder
from underpaint_demo_metric.metric import MeanAbsoluteError
from underpaint_demo_sampler.sampler import Midpoint
from underpaint_demo_tracker.tracker import Csv

from underpaint import Condition, Posterior, Prediction, Reconstruction

# ------------------------------------------------------------------------------ adapters


class WrongLatents(Linear):
    """Gives half of the channels."""

    def forward(self, features):
        return Posterior(super().forward(features).mean[:, ::2])


@attrs.frozen
class _Odd(Posterior):
    def kl(self):
        return super().kl() - 1000


class NegativeKl(Linear):
    """Has a negative divergence."""

    def forward(self, features):
        posterior = super().forward(features)
        return _Odd(posterior.mean, posterior.logvar)


class ConstantLatent(Linear):
    """Ignores the features."""

    def forward(self, features):
        posterior = super().forward(features)
        return Posterior(torch.ones_like(posterior.mean) + 0 * self.project.bias.sum())


class IdleParameter(Linear):
    """Has a parameter that takes no part."""

    def __init__(self, config, *, in_channels, latent_channels):
        super().__init__(config, in_channels=in_channels, latent_channels=latent_channels)
        self.idle = nn.Parameter(torch.zeros(3))


# ------------------------------------------------------------------------------ decoders


class WrongScale(Decoder):
    """Gives half of the size, and square images."""

    def forward(self, latents):
        image = super().forward(latents).image
        side = image.shape[-1] // 2
        return Reconstruction(nn.functional.interpolate(image, (side, side)))


class Descending(Decoder):
    """Has its pyramid the wrong way round."""

    def forward(self, latents):
        image = super().forward(latents).image
        return Reconstruction(image, (nn.functional.avg_pool2d(image, 2), nn.functional.avg_pool2d(image, 4)))


class Flipped(Decoder):
    """Turns images by half a turn."""

    def forward(self, latents):
        return Reconstruction(super().forward(latents).image.flip(2, 3))


class ForeignLastLayer(Decoder):
    """Names a parameter that is not its own."""

    def last_layer(self):
        return nn.Parameter(torch.zeros(3))


# ------------------------------------------------------------------------------ backbones


class WrongVelocity(Backbone):
    """Cuts oblong latents to a square."""

    def forward(self, x_t, t, condition, layers=()):
        result = super().forward(x_t, t, condition, layers)
        side = min(x_t.shape[-2:])
        return Prediction(result.velocity[..., :side, :side], result.hidden)


class PromisesVariance(Backbone):
    """Says that it gives a variance, and gives none."""

    variance = True


class AlwaysHidden(Backbone):
    """Returns all hidden states, asked or not."""

    def __init__(self, config, **context):
        super().__init__(attrs.evolve(config, depth=3), **context)

    def forward(self, x_t, t, condition, layers=()):
        return super().forward(x_t, t, condition, range(3))


class WrongHidden(Backbone):
    """Returns hidden states as maps."""

    def forward(self, x_t, t, condition, layers=()):
        result = super().forward(x_t, t, condition, layers)
        return Prediction(result.velocity, {k: v.transpose(1, 2) for k, v in result.hidden.items()})


class Timeless(Backbone):
    """Ignores the time."""

    def _vector(self, t, condition):
        return self.pooled(condition.pooled) if condition.pooled is not None else super()._vector(t * 0, condition)


class Unconditional(Backbone):
    """Ignores the condition."""

    def _vector(self, t, condition):
        return super()._vector(t, Condition())


class IgnoresMask(Backbone):
    """Averages hidden tokens too."""

    def _vector(self, t, condition):
        return super()._vector(t, Condition(tokens=condition.tokens, pooled=condition.pooled))


class DividesByTime(Backbone):
    """Predicts the clean latent, and divides by t for the velocity."""

    def forward(self, x_t, t, condition, layers=()):
        result = super().forward(x_t, t, condition, layers)
        return Prediction((x_t - result.velocity) / t.view(-1, 1, 1, 1), result.hidden)


class OtherWidth(Backbone):
    """States another width than it has."""

    def __init__(self, config, **context):
        super().__init__(config, **context)
        self.stated = True

    def forward(self, x_t, t, condition, layers=()):
        self.width = 16
        result = super().forward(x_t, t, condition, layers)
        self.width = 32
        return result

    @property
    def blocks_width(self):
        return self.width

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "stated":
            super().__setattr__("width", 32)


class NeedsOtherWidth(Backbone):
    """Fails for a condition as wide as itself."""

    def __init__(self, config, *, pooled_dim, **context):
        if pooled_dim == config.width:
            raise ValueError("too wide")
        super().__init__(config, pooled_dim=pooled_dim, **context)


class OnlyTiny(Backbone):
    """Cannot be made at the size of its defaults."""

    def __init__(self, config, **context):
        if config.width > 16:
            raise ValueError("too large")
        super().__init__(config, **context)


# ------------------------------------------------------------------------------ conditioners


class WrongWidth(Table):
    """Declares another width."""

    def __init__(self, **context):
        super().__init__(**context)
        self.pooled_dim += 1


class NeverDrops(Table):
    """Ignores the drop mask."""

    def forward(self, inputs, drop=None):
        return super().forward(inputs)


class DropsAll(Table):
    """Gives the null condition always."""

    def forward(self, inputs, drop=None):
        return super().forward(inputs, torch.ones_like(inputs, dtype=torch.bool))


class LongerNull(Table):
    """Has a mask and tokens in the null condition only."""

    def __init__(self, **context):
        super().__init__(**context)
        self.pooled_dim, self.token_dim = 0, self.pooled_dim

    def forward(self, inputs, drop=None):
        return Condition(tokens=super().forward(inputs, drop).pooled[:, None].expand(-1, 3, -1))

    def null(self, batch, device):
        return Condition(tokens=super().null(batch, device).pooled[:, None].expand(-1, 4, -1))


class OneForAll(Table):
    """Gives all inputs the same condition."""

    def forward(self, inputs, drop=None):
        return super().forward(torch.zeros_like(inputs), drop)


# ------------------------------------------------------------------------------ metrics


class Tensors(MeanAbsoluteError):
    """Returns tensors."""

    def compute(self):
        return {"mae": self.total / self.count}


class NoDirection(MeanAbsoluteError):
    """States no direction."""

    higher_is_better = None


class MeanOfMeans(MeanAbsoluteError):
    """Averages batches instead of images."""

    def update(self, images, references):
        self.total += (images - references).abs().double().mean()
        self.count += 1


class NeverForgets(MeanAbsoluteError):
    """Keeps a sum of its own."""

    def __init__(self):
        super().__init__()
        self.seen = 0.0

    def update(self, images, references):
        super().update(images, references)
        self.seen += float(images.mean())

    def compute(self):
        return {"mae": super().compute()["mae"] + self.seen}


class WrongDirection(MeanAbsoluteError):
    """Calls more error better."""

    higher_is_better = True


class OneSided(MeanAbsoluteError):
    """Calls itself a metric of distributions and needs both sides."""

    paired = False


class NoState(MeanAbsoluteError):
    """Keeps its state in plain attributes."""

    def __init__(self):
        super().__init__()
        self._defaults.clear()
        self._reductions.clear()
        self.total, self.count = 0.0, 0

    def reset(self):
        super().reset()
        self.total, self.count = 0.0, 0


class WrongReduction(MeanAbsoluteError):
    """Averages a sum over the ranks, and counts the images of all."""

    def __init__(self):
        super().__init__()
        self._reductions["total"] = lambda values: values.mean(0)


class LosesState(MeanAbsoluteError):
    """Forgets its images when pickled."""

    def __getstate__(self):
        state = super().__getstate__()
        return {**state, "total": torch.zeros((), dtype=torch.float64)}


class EmptyProtocol(MeanAbsoluteError):
    """Has nothing to say."""

    def protocol(self):
        return {}


class SecretNetwork(MeanAbsoluteError):
    """Measures with a network that it does not name."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 2)


class ChangesImages(MeanAbsoluteError):
    """Clamps in place."""

    def update(self, images, references):
        super().update(images.mul_(0.5), references)


# ------------------------------------------------------------------------------ samplers


class Backwards(Midpoint):
    """Adds the velocity."""

    def sample(self, field, noise, fresh):
        return super().sample(lambda x, t: -field(x, t), noise, fresh)


class Crude(Midpoint):
    """Looks at the velocity at the start only."""

    def sample(self, field, noise, fresh):
        first = []

        def constant(x, t):
            value = field(x, t)
            first.append(value)
            return first[0]

        return super().sample(constant, noise, fresh)


class StopsEarly(Midpoint):
    """Leaves out the last step."""

    def sample(self, field, noise, fresh):
        x = noise
        for index in range(self.steps - 1):
            x = x - field(x, torch.full((len(x),), 1 - index / self.steps, dtype=x.dtype)) / self.steps
        return x


class FromZero(Midpoint):
    """Counts the time from noise."""

    def sample(self, field, noise, fresh):
        return super().sample(lambda x, t: field(x, 1 - t), noise, fresh)


class GlobalNoise(Midpoint):
    """Draws noise of its own."""

    def sample(self, field, noise, fresh):
        return super().sample(field, noise, fresh) + 0.01 * torch.randn_like(noise)


class SharesNoise(Midpoint):
    """Adds the first sample's noise to all."""

    def sample(self, field, noise, fresh):
        return super().sample(field, noise, fresh) + 0.01 * fresh()[:1]


class SharesMean(Midpoint):
    """Centres the batch."""

    def sample(self, field, noise, fresh):
        x = super().sample(field, noise, fresh)
        return x - x.mean(0, keepdim=True) + noise.mean(0, keepdim=True)


class OverwritesNoise(Midpoint):
    """Works in place."""

    def sample(self, field, noise, fresh):
        noise.copy_(super().sample(field, noise, fresh))
        return noise.clone()


class SinglePrecision(Midpoint):
    """Gives float32 whatever the noise is."""

    def sample(self, field, noise, fresh):
        return super().sample(field, noise, fresh).float()


class MissesCount(Midpoint):
    """Counts steps, not evaluations."""

    def protocol(self):
        return {"solver": "midpoint", "evaluations": self.steps}


# ------------------------------------------------------------------------------ trackers


class Silent(Csv):
    """Writes nothing."""

    def scalars(self, step, values):
        pass

    def image(self, step, name, image):
        pass


class Elsewhere(Csv):
    """Writes beside its folder."""

    def image(self, step, name, image):
        super().image(step, name, image)
        (self.folder.parent / "latest.txt").write_text(name)


class ClosesOnce(Csv):
    """Raises when it is closed again."""

    closed = False

    def close(self):
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class Fussy(Csv):
    """Refuses what is no finite number."""

    def scalars(self, step, values):
        super().scalars(step, {name: int(value * 1e6) for name, value in values.items()})


class Overwrites(Csv):
    """Starts its file anew."""

    def __init__(self, *, folder, run):
        super().__init__(folder=folder, run=run)
        (self.folder / "scalars.csv").unlink(missing_ok=True)
