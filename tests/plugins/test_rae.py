"""RAE's adapter, decoders and recipes; `test_rae_import` compares the decoder with the original."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import underpaint
from underpaint import Adapter, ConfigError, Decoder, Features
from underpaint.run.recipes import load_recipe
from underpaint_rae.decoder import grid_positions


def adapter(channels: int = 4, **options: Any) -> Adapter:
    return underpaint.create("adapter", "rae/identity", in_channels=(7, channels), latent_channels=channels, **options)


def decoder(name: str = "rae/vit-b", latent: int = 4, stride: int = 2, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return underpaint.create("decoder", name, latent_channels=latent, stride=stride, **options)


def small(**options: Any) -> Decoder:
    return decoder(width=8, depth=2, heads=2, hidden=12, **options)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize(("training", "tau"), [(False, 0.8), (True, 0.0)])
def test_the_last_map_itself_is_the_latent(training: bool, tau: float) -> None:
    maps = (random(2, 7, 3, 5), random(2, 4, 3, 5, seed=1))
    identity = adapter(tau=tau).train(training)
    posterior = identity(Features(maps))
    assert posterior.logvar is None
    assert posterior.mode() is maps[1]
    assert posterior.sample() is maps[1]
    assert list(identity.parameters()) == []
    assert (identity.latent_channels, identity.stride) == (4, 1)


def test_training_noise_has_one_uniform_scale_for_each_sample() -> None:
    maps = torch.zeros(20_000, 4, 1, 2)
    torch.manual_seed(0)
    posterior = adapter().train()(Features((maps,)))
    assert posterior.mean is maps
    assert posterior.logvar is not None
    assert posterior.logvar.shape == maps.shape
    sigma = (0.5 * posterior.logvar).exp()
    assert torch.equal(sigma, sigma[:, :1, :1, :1].expand_as(sigma))
    ordered = sigma[:, 0, 0, 0].double().sort().values
    # Kolmogorov–Smirnov against U(0, 0.8); 1.95 / √n is exceeded once in a thousand seeds.
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert float((ordered / 0.8 - steps).abs().max()) < 1.95 / math.sqrt(len(ordered))
    assert float(ordered[0]) > 0.0
    assert float(ordered[-1]) <= 0.8 * (1 + 1e-6)


def test_samples_have_the_noise_that_the_posterior_states() -> None:
    torch.manual_seed(1)
    posterior = adapter(tau=0.5).train()(Features((torch.full((4, 4, 50, 50), 3.0),)))
    assert posterior.logvar is not None
    noise = posterior.sample(torch.Generator().manual_seed(2)) - 3.0
    sigma = (0.5 * posterior.logvar[:, 0, 0, 0]).exp()
    torch.testing.assert_close(noise.flatten(1).std(1), sigma, rtol=0.03, atol=0.0)


def test_gradients_reach_the_encoder_through_the_mean_alone() -> None:
    maps = random(2, 4, 3, 3).requires_grad_()
    adapter().train()(Features((maps,))).sample().sum().backward()
    assert maps.grad is not None
    assert torch.equal(maps.grad, torch.ones_like(maps))


def test_other_channels_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"768 channels.*32 are asked for.*latent_channels to 768"):
        underpaint.create("adapter", "rae/identity", in_channels=(768,), latent_channels=32)


# -------------------------------------------------------------------------------------------------- encoder


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in a fixed order from the name alone: biases small, norms about 1, matrices of unit gain."""
    index = np.arange(math.prod(shape), dtype=np.float64)
    share = np.abs(np.sin(index * 12.9898 + zlib.crc32(name.encode()) % 1009) * 43758.5453) % 1.0
    values = 2.0 * share - 1.0
    if name.endswith("gamma"):
        values = 0.2 + 0.1 * values
    elif name in ("pos_embed", "reg_token", "cls_token"):
        values = 0.3 * values
    elif name.endswith("bias"):
        values = 0.1 * values
    elif "norm" in name:
        values = 1.0 + 0.2 * values
    elif name != "images":
        values = values * math.sqrt(3.0 / math.prod(shape[1:]))
    return torch.from_numpy(values.reshape(shape)).float()


@pytest.mark.slow
def test_latents_of_dinov2_with_registers_are_the_originals() -> None:
    """Every 7919th value of a latent of noise, 256 px to 384×16×16.

    By ``RAE.encode`` of the original code at commit a4d18c4 on the ViT-S of transformers 4.56.2, in float32, with the
    weights that `formula` makes of timm's names.
    """
    encoder = underpaint.create(
        "encoder", "timm/vit_small_patch14_reg4_dinov2@random", norm="plain", antialias=False
    ).eval()
    trunk: Any = encoder.trunk
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            p.copy_(formula(name, tuple(p.shape)))
        latents = encoder(formula("images", (1, 3, 256, 256))).maps[-1].flatten().double().numpy()
    expected = [
        -0.288844, 1.227779, -1.851346, 0.625247, 2.001173, 2.176152, -0.394923,
        -1.062251, -0.588939, -1.051791, 0.615207, -0.13917, 0.248686,
    ]  # fmt: skip
    np.testing.assert_allclose(latents[::7919], expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.abs(latents).mean(), 0.7981979923, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize(
    ("name", "width", "original"),
    # Counted on the original at 768×16×16 to 256×256 px; it keeps 257 positions among its parameters.
    [("b", 768, 86_435_328), ("l", 1024, 304_150_272), ("xl", 1152, 415_352_704)],
)
def test_parameters_are_the_originals_without_its_positions(name: str, width: int, original: int) -> None:
    with torch.device("meta"):
        model = decoder(f"rae/vit-{name}", 768, 16)
    assert sum(p.numel() for p in model.parameters()) == original - 257 * width
    assert list(model.buffers()) == []


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("stride", [2, 3])
def test_any_grid_becomes_its_image(grid: tuple[int, int], stride: int) -> None:
    result = small(stride=stride)(torch.zeros(2, 4, *grid))
    assert result.image.shape == (2, 3, grid[0] * stride, grid[1] * stride)
    assert result.pyramid == ()


def test_positions_are_maes() -> None:
    rows, columns, width = 3, 5, 16
    table = grid_positions(rows, columns, width)
    for row in range(rows):
        for column in range(columns):
            expected = [
                wave(index / 10_000 ** (i / (width / 4)))
                for index in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(width // 4)
            ]
            np.testing.assert_allclose(table[row * columns + column].numpy(), expected, atol=1e-6)


def numpy_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * weight + bias


def test_whole_decoder_in_float64_on_an_oblong_grid() -> None:
    """The published order of layers, written once more in numpy."""
    model = small(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    z = torch.randn(2, 4, 2, 3, generator=generator, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return numpy_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = linear(z.numpy().reshape(2, 4, 6).transpose(0, 2, 1), "embed") + grid_positions(2, 3, 8).double().numpy()
    x = np.concatenate([np.broadcast_to(w["class_token"], (2, 1, 8)), x], axis=1)
    for i in range(2):
        q, k, v = np.split(linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.qkv"), 3, axis=-1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = np.exp(q[..., part] @ k[..., part].transpose(0, 2, 1) / 2.0)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        x = x + linear(np.concatenate(heads, axis=-1), f"blocks.{i}.out")
        inner = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.0")
        x = x + linear(inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))), f"blocks.{i}.mlp.2")
    patches = linear(norm(x, "norm")[:, 1:], "pixels").reshape(2, 2, 3, 2, 2, 3)
    image = np.zeros((2, 3, 4, 6))
    for row, column, down, right in np.ndindex(2, 3, 2, 2):
        image[:, :, 2 * row + down, 2 * column + right] = patches[:, row, column, down, right]
    unit = image * np.reshape([0.5, 0.6, 0.7], (3, 1, 1)) + np.reshape([0.1, 0.2, 0.3], (3, 1, 1))
    np.testing.assert_allclose(model(z).image.detach().numpy(), unit * 2 - 1, rtol=1e-9, atol=1e-9)


def test_last_layer_makes_the_pixels() -> None:
    model = small()
    last = model.last_layer()
    assert isinstance(last, nn.Parameter)
    assert last.shape == (12, 8)
    assert any(last is p for p in model.parameters())


@pytest.mark.parametrize("options", [{"width": 10, "heads": 5}, {"width": 12, "heads": 5}])
def test_widths_that_do_not_divide_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="multiple of 4 and of heads"):
        decoder(**options)


# -------------------------------------------------------------------------------------------------- recipes


def test_the_recipe_is_the_papers() -> None:
    recipe = load_recipe("recipe:rae")
    (stage,) = recipe.stages
    epoch = 1_281_167 // 512
    assert (stage.batch, stage.steps, stage.ema) == (512, 16 * epoch, 0.9978)
    optimizer = stage.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.9, 0.95), 0.0)
    assert (optimizer.warmup, optimizer.schedule, optimizer.final, optimizer.clip) == (epoch, "cosine", 0.1, None)
    critic = stage.losses[2]
    assert critic.critic is not None
    assert critic.adaptive is not None
    assert (critic.weight, critic.start, critic.critic.start) == (0.75, 8 * epoch, 6 * epoch)
    assert (critic.adaptive.at, critic.adaptive.eps, critic.adaptive.limit) == ("decoder", 1e-6, 1e4)
    # The noise exists only where the adapter counts to the parts that train.
    assert stage.trains == ("adapter", "decoder")
    assert not recipe.data.flip
    assert (recipe.data.size, recipe.data.resize, recipe.data.crop) == (256, 384, "random")
