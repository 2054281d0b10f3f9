"""The losses behind ``mutants.py``, each with one thing wrong."""

import random

import torch
from torch import nn
from underpaint_demo_loss.loss import Charbonnier

from underpaint import AdversarialLoss, Loss


class NotScalar(Charbonnier):
    """Returns one value per sample."""

    def forward(self, step):
        return {"x": (step.reconstruction.image - step.images).square().mean((1, 2, 3))}


class Undeclared(Charbonnier):
    """Reads a field that it does not declare."""

    def forward(self, step):
        return {"x": super().forward(step)["charbonnier"] + step.posterior.kl().mean()}


class UnknownNeed(Charbonnier):
    """Needs a field that does not exist."""

    needs = frozenset({"images", "reconstruction", "depth"})


class Unseeded(Charbonnier):
    """Draws numbers that torch's seed does not govern."""

    def forward(self, step):
        return {"x": super().forward(step)["charbonnier"] * (1 + random.random())}


class IdleUnit(Charbonnier):
    """Names something to compile that it never calls."""

    def __init__(self, config):
        super().__init__(config)
        self.idle = nn.Identity()

    def units(self):
        return (self.idle,)


class CompiledOtherwise(Charbonnier):
    """Gives something else when it is compiled."""

    def units(self):
        return (self,)

    def forward(self, step):
        value = super().forward(step)["charbonnier"]
        return {"x": 2.0 * value if torch.compiler.is_compiling() else value}


class Sums(Charbonnier):
    """Sums over the batch."""

    def forward(self, step):
        return {"x": (step.reconstruction.image - step.images).square().sum()}


class Detached(Charbonnier):
    """Cuts the gradient."""

    def forward(self, step):
        return {"x": super().forward(step)["charbonnier"].detach().requires_grad_(True)}


class RootAtZero(Charbonnier):
    """Takes the root of a distance."""

    def forward(self, step):
        return {"x": (step.reconstruction.image - step.images).square().mean((1, 2, 3)).sqrt().mean()}


class NoAutocast(Charbonnier):
    """Adds a product to a tensor that it takes to be of the same type."""

    def forward(self, step):
        error = (step.reconstruction.image - step.images).transpose(0, 1).flatten(1)
        product = error @ error.T / error.shape[1]
        return {"x": torch.zeros(3, 3).index_add(0, torch.arange(3), product).square().mean()}


class InPlace(Charbonnier):
    """Clamps the originals in place."""

    def forward(self, step):
        step.images.mul_(0.5)
        return super().forward(step)


# ------------------------------------------------------------------------------ losses that train


class _Projection(Loss):
    """Predicts features from latents."""

    needs = frozenset({"features", "latents"})
    trains = True

    def __init__(self, config):
        super().__init__()

    def prepare(self, sizes):
        self.project = nn.Conv2d(sizes.latent_channels, sizes.feature_channels[-1], 1)

    def forward(self, step):
        return {"x": (self.project(step.latents) - step.features.maps[-1].detach()).square().mean()}


class NothingTrains(_Projection):
    """Freezes what it says trains."""

    def prepare(self, sizes):
        super().prepare(sizes)
        self.requires_grad_(False)


class IdleHead(_Projection):
    """Has a parameter that takes no part."""

    def prepare(self, sizes):
        super().prepare(sizes)
        self.idle = nn.Parameter(torch.zeros(3))


# ------------------------------------------------------------------------------ losses with a critic


class _Adversarial(AdversarialLoss):
    """Keeps every promise."""

    needs = frozenset({"images", "reconstruction"})

    def __init__(self, config):
        super().__init__()
        self.critic = nn.Conv2d(3, 1, 4, 4)

    def judge(self, image):
        return nn.functional.conv2d(image, self.critic.weight.detach(), self.critic.bias.detach(), 4)

    def forward(self, step):
        return {"x": -self.judge(step.reconstruction.image).mean()}

    def criticise(self, step):
        fake = self.critic(step.reconstruction.image.detach())
        return {"real": (self.critic(step.images) - 1).square().mean(), "fake": fake.square().mean()}


class FrozenCritic(_Adversarial):
    """Has a critic that learns nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.critic.weight.requires_grad_(False)
        self.critic.bias.requires_grad_(False)

    def criticise(self, step):
        return {name: value.requires_grad_() for name, value in super().criticise(step).items()}


class HeadOutside(_Adversarial):
    """Has a parameter outside of its critic."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(()))


class TeachesCritic(_Adversarial):
    """Gives the critic the model's gradient."""

    def judge(self, image):
        return self.critic(image)


class CountsCalls(_Adversarial):
    """Changes a buffer of the critic in the model's step."""

    def __init__(self, config):
        super().__init__(config)
        self.critic.register_buffer("calls", torch.zeros(()))

    def judge(self, image):
        self.critic.calls += 1
        return super().judge(image)


class LeavesFlags(_Adversarial):
    """Switches the critic off for the model's step, and forgets to switch it on."""

    def judge(self, image):
        return self.critic.requires_grad_(False)(image)


class TeachesModel(_Adversarial):
    """Lets the critic's gradient into the reconstruction."""

    def criticise(self, step):
        return {**super().criticise(step), "fake": self.critic(step.reconstruction.image).square().mean()}
