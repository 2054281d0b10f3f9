"""PatchGAN critics, their layers, and what all adversarial losses share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import AdversarialLoss, ConfigError, Reconstruction, StepSizes, StepTensors
from underpaint_critics.adversary import Adversary
from underpaint_critics.config import PatchGanConfig
from underpaint_critics.layers import LocalBatchNorm, SpectralConv1d
from underpaint_critics.objectives import critic_terms, model_term


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name: str, **options: Any) -> AdversarialLoss:
    torch.manual_seed(0)
    return underpaint.create("loss", f"critics/{name}", **options)


def shown(size: int = 32, b: int = 2, step: int = 0) -> StepTensors:
    images, decoded = random(b, 3, size, size), random(b, 3, size, size, seed=1).requires_grad_()
    return StepTensors(step=step, images=images, reconstruction=Reconstruction(decoded))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("name", "model", "real", "fake"),
    [
        ("hinge", lambda d: -d, lambda d: np.maximum(0, 1 - d), lambda d: np.maximum(0, 1 + d)),
        ("least-squares", lambda d: (d - 1) ** 2, lambda d: (d - 1) ** 2, lambda d: d**2),
        (
            "non-saturating",
            # −log of the probability that the critic gives to the wanted answer.
            lambda d: -np.log(1 / (1 + np.exp(-d))),
            lambda d: -np.log(1 / (1 + np.exp(-d))),
            lambda d: -np.log(1 - 1 / (1 + np.exp(-d))),
        ),
    ],
)
def test_objectives_in_closed_form(name: Any, model: Any, real: Any, fake: Any) -> None:
    # Two scales of different size count the same.
    ours, theirs = ([random(2, n, seed=seed + n).double() for n in (3, 50)] for seed in (0, 1))
    a, b = ([x.numpy() for x in side] for side in (ours, theirs))
    assert float(model_term(name, ours)) == pytest.approx(np.mean([model(x).mean() for x in a]), rel=1e-9)
    on_real, on_fake = critic_terms(name, theirs, ours)
    assert float(on_real) == pytest.approx(np.mean([real(x).mean() for x in b]), rel=1e-9)
    assert float(on_fake) == pytest.approx(np.mean([fake(x).mean() for x in a]), rel=1e-9)


def test_terms_of_bfloat16_logits_are_float32() -> None:
    assert model_term("hinge", [random(2, 4).bfloat16()]).dtype == torch.float32


# -------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (2, 1), (8, 1), (16, 2), (9, 3), (11, 11), (12, 2), (20, 4)])
def test_local_batch_norm_is_batch_norm_of_consecutive_groups(batch: int, groups: int) -> None:
    norm = LocalBatchNorm(5, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = random(batch, 5, 3, 4).double()
    assert norm.groups(batch) == groups
    wanted = [F.batch_norm(part, None, None, norm.weight, norm.bias, True) for part in x.chunk(groups)]
    torch.testing.assert_close(norm(x), torch.cat(wanted))
    torch.testing.assert_close(norm(x.flatten(2)), torch.cat(wanted).flatten(2))
    torch.testing.assert_close(norm(x.contiguous(memory_format=torch.channels_last)), torch.cat(wanted))


def test_spectral_convolution_is_the_circular_one_divided_by_its_gain() -> None:
    layer = SpectralConv1d(6, 7, 9).double()
    x = random(2, 6, 11).double()
    for _ in range(100):
        layer(x)
    gain = torch.linalg.svdvals(layer.weight.flatten(1)).max()
    wanted = nn.Conv1d(6, 7, 9, padding=4, padding_mode="circular").double()
    wanted.load_state_dict({"weight": layer.weight / gain, "bias": layer.bias})
    torch.testing.assert_close(layer(x), wanted(x))


def test_spectral_vectors_move_in_training_only_and_two_passes_can_be_undone() -> None:
    layer = SpectralConv1d(3, 4, 3)
    before = layer.left.clone()
    layer.eval()(random(1, 3, 5))
    assert torch.equal(layer.left, before)
    layer.train()
    (layer(random(1, 3, 5)).sum() - layer(random(1, 3, 5, seed=1)).sum()).backward()
    assert not torch.equal(layer.left, before)


# -------------------------------------------------------------------------------------------------- critics


def test_published_parameter_counts() -> None:
    assert parameters(make("patchgan").critic) == 2_765_633
    assert parameters(make("multiscale").critic) == 8_299_587


def test_a_logit_of_patchgan_sees_seventy_pixels() -> None:
    critic = make("patchgan", channels=2, norm="local").critic
    # A norm sees everything; without it the reach is that of the convolutions.
    for layer in critic.scales[0].layers:
        if isinstance(layer, nn.Sequential) and len(layer) == 3:
            layer[1] = nn.Identity()
    image = random(1, 3, 128, 128).requires_grad_()
    logits = critic((image,))[0][-1]
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize(("name", "padding"), [("patchgan", 1), ("multiscale", 2)])
def test_patch_critic_against_plain_functions(name: str, padding: int) -> None:
    critic = make(name, channels=4).critic.double()
    image = random(3, 3, 40, 48).double()
    judgement = critic((image,))
    for index, maps in enumerate(judgement):
        x = image
        for _ in range(index):
            # Averages of what lies inside, at the edge too.
            weight = torch.ones(3, 1, 3, 3, dtype=x.dtype)
            count = F.conv2d(torch.ones_like(x), weight, stride=2, padding=1, groups=3)
            x = F.conv2d(x, weight, stride=2, padding=1, groups=3) / count
        state = critic.scales[index].state_dict()
        for level, stride in enumerate([2, 2, 2, 1, 1]):
            inner = level < 4
            at = f"layers.{level}.0" if inner else f"layers.{level}"
            assert (f"{at}.bias" in state) == (name == "multiscale" or level in (0, 4))
            x = F.conv2d(x, state[f"{at}.weight"], state.get(f"{at}.bias"), stride, padding)
            if inner and level:
                x = F.batch_norm(
                    x, None, None, state[f"layers.{level}.1.weight"], state[f"layers.{level}.1.bias"], True
                )
            x = torch.where(x > 0, x, 0.2 * x) if inner else x
            torch.testing.assert_close(maps[level], x)


def test_weights_start_as_in_pix2pix() -> None:
    critic = make("patchgan").critic.requires_grad_(False).scales[0]
    assert float(critic.layers[2][0].weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(critic.layers[3][1].weight.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(critic.layers[3][1].weight.std()) == pytest.approx(0.02, rel=0.2)


@torch.no_grad()
def test_images_too_small_for_a_logit_are_refused() -> None:
    sizes = StepSizes(image=(24, 64), latent_channels=4, grid=(3, 8))
    make("patchgan", channels=2).prepare(sizes)
    make("patchgan", channels=2)(shown(24))
    with pytest.raises(ConfigError, match="needs images of 48 px or more.*lower its option 'layers'"):
        make("patchgan", channels=2, layers=4).prepare(sizes)


# ----------------------------------------------------------------------------------------------- the losses


@torch.no_grad()
def test_feature_matching_by_its_definition() -> None:
    loss, step = make("multiscale", channels=4, feature_weight=7.0), shown()
    assert step.images is not None
    assert step.reconstruction is not None
    terms = loss(step)
    assert set(terms) == {"adversarial", "feature_matching"}
    real, fake = loss.critic((step.images,)), loss.critic((step.reconstruction.image,))
    gaps = [[float((a - b).abs().mean()) for a, b in zip(x[:4], y[:4])] for x, y in zip(real, fake)]
    assert float(terms["feature_matching"]) == pytest.approx(7.0 * np.mean(np.sum(gaps, 1)), rel=1e-5)
    assert float(terms["adversarial"]) == pytest.approx(np.mean([float((x[4] - 1).square().mean()) for x in fake]))
    assert set(make("multiscale", channels=4, feature_weight=0.0)(step)) == {"adversarial"}


@torch.no_grad()
def test_critic_terms_are_halved_as_in_latent_diffusion() -> None:
    loss, step = make("patchgan", channels=4), shown()
    assert step.reconstruction is not None
    terms = loss.criticise(step)
    real, fake = loss.critic((step.images,))[0][-1], loss.critic((step.reconstruction.image,))[0][-1]
    assert float(terms["critic_real"]) == pytest.approx(0.5 * float(F.relu(1 - real).mean()), rel=1e-5)
    assert float(terms["critic_fake"]) == pytest.approx(0.5 * float(F.relu(1 + fake).mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["patchgan", "multiscale"])
def test_the_model_step_touches_nothing_of_the_critic(name: str) -> None:
    loss, step = make(name, channels=4), shown()
    called = []
    for parameter in loss.critic.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: called.append(p))
        parameter.register_hook(lambda g: called.append(g))
    # One parameter is frozen by its owner, and stays so.
    next(loss.critic.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in loss.critic.parameters()]
    sum(loss(step).values()).backward()
    assert called == []
    assert [p.requires_grad for p in loss.critic.parameters()] == flags
    assert all(p.grad is None for p in loss.critic.parameters())
    assert step.reconstruction is not None
    assert float(step.reconstruction.image.grad.abs().sum()) > 0


@pytest.mark.parametrize("objective", ["hinge", "least-squares", "non-saturating"])
def test_the_critic_learns_to_tell_them_apart(objective: str) -> None:
    loss, step = make("patchgan", channels=8, objective=objective), shown(b=4)
    optimizer = torch.optim.Adam(loss.critic.parameters(), 2e-3)
    totals = []
    for _ in range(30):
        optimizer.zero_grad()
        total = sum(loss.criticise(step).values())
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.5 * totals[0]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["patchgan", "multiscale"])
def test_a_critic_kept_in_bfloat16_judges_float32_images(name: str, autocast: bool) -> None:
    exact, step = make(name, channels=8), shown()
    rounded = make(name, channels=8)
    rounded.critic.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = {**rounded(step), **rounded.criticise(step)}
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in rounded.critic.parameters())
    for term, value in {**exact(step), **exact.criticise(step)}.items():
        assert float(terms[term].detach()) == pytest.approx(float(value.detach()), rel=0.1, abs=0.1)


# -------------------------------------------------------------------------------------- the gradient penalty


class _Linear(nn.Module):
    """D(x) is the mean of two logits, each linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(2, 3 * 4 * 4))

    def forward(self, seen: tuple[Tensor, ...]) -> list[list[Tensor]]:
        return [[seen[0].flatten(1) @ self.weight.T]]


def test_penalty_of_a_linear_critic_in_closed_form() -> None:
    loss = Adversary(PatchGanConfig(r1=3.0, r1_interval=4), _Linear())
    slope = loss.critic.weight.detach().mean(0)
    terms = loss.criticise(shown(4))
    assert float(terms["critic_r1"].detach()) == pytest.approx(4 * 1.5 * float(slope.square().sum()), rel=1e-5)
    terms["critic_r1"].backward()
    # The gradient of γ/2·‖mean of w‖² is γ·mean / 2 for each of the two.
    torch.testing.assert_close(loss.critic.weight.grad, (4 * 3.0 * slope / 2).expand(2, -1))


def test_penalty_comes_every_so_many_steps_and_keeps_its_name() -> None:
    loss = make("patchgan", channels=4, r1=1.0, r1_interval=3)
    found = [float(loss.criticise(shown(step=step))["critic_r1"].detach()) for step in range(7)]
    assert [value > 0 for value in found] == [True, False, False, True, False, False, True]
    assert "critic_r1" not in make("patchgan", channels=4).criticise(shown())


@pytest.mark.parametrize("name", ["patchgan", "multiscale"])
def test_penalty_reaches_the_critic_through_its_norms(name: str) -> None:
    loss = make(name, channels=4, r1=10.0)
    loss.criticise(shown())["critic_r1"].backward()
    gradients = [p.grad for n, p in loss.critic.named_parameters() if n.endswith("0.weight")]
    assert gradients
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
