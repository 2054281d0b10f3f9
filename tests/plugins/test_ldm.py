"""The convolutional decoder: its size, its shapes, its parts in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import underpaint
from underpaint import ConfigError, Decoder
from underpaint.run.recipes import load_recipe


def make(latent: int = 4, stride: int = 8, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return underpaint.create("decoder", "ldm/decoder", latent_channels=latent, stride=stride, **options)


def count_by_hand(d: int, widths: list[int], blocks: int, attention: bool) -> int:
    """Parameters of the published layout: weights and biases of every convolution, two per normalised channel."""

    def conv(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side**2 + outputs

    def residual(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * inputs + conv(inputs, outputs, 3) + 2 * outputs + conv(outputs, outputs, 3) + shortcut

    def attend(width: int) -> int:
        return 2 * width + 4 * conv(width, width, 1)

    deep = widths[-1]
    total = conv(d, d, 1) + conv(d, deep, 3) + 2 * residual(deep, deep) + attend(deep)
    channels = deep
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            total += residual(channels, width)
            channels = width
        if attention and width == deep and level == len(widths) - 1:
            total += blocks * attend(width)
        if level > 0:
            total += conv(width, width, 3)
    return total + 2 * channels + conv(channels, 3, 3)


@pytest.mark.parametrize(
    ("d", "stride", "options", "widths", "exact"),
    [
        # VA-VAE f16d32: 41.4 M in AlignTok's specification.
        (32, 16, {}, [128, 128, 256, 256, 512], 41_418_659),
        # Stable Diffusion's f8 decoder has 49,490,179 parameters, its post_quant_conv 20 more.
        (4, 8, {"attention": False}, [128, 256, 512, 512], 49_490_199),
        (16, 4, {"base": 64, "blocks": 2}, [64, 128, 256], None),
        (8, 2, {"multipliers": (1, 3), "base": 32, "blocks": 1}, [32, 96], None),
    ],
)
def test_parameters(d: int, stride: int, options: dict[str, Any], widths: list[int], exact: int | None) -> None:
    with torch.device("meta"):
        counted = sum(p.numel() for p in make(d, stride, **options).parameters())
    by_hand = count_by_hand(d, widths, options.get("blocks", 3), options.get("attention", True))
    assert counted == by_hand
    if exact is not None:
        assert counted == exact


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_any_grid_becomes_its_image(stride: int, grid: tuple[int, int]) -> None:
    decoder = make(4, stride, base=32, blocks=1)
    result = decoder(torch.zeros(2, 4, *grid))
    assert result.image.shape == (2, 3, grid[0] * stride, grid[1] * stride)
    assert result.pyramid == ()


def test_output_is_not_squashed() -> None:
    decoder = make(4, 4, base=32, blocks=1)
    last = decoder.last_layer()
    assert last is not None
    with torch.no_grad():
        last.mul_(100)
    assert float(decoder(torch.randn(1, 4, 4, 4)).image.detach().abs().max()) > 1


def test_last_layer_is_what_makes_the_colours() -> None:
    decoder = make(4, 4, base=32, blocks=1)
    last = decoder.last_layer()
    assert isinstance(last, nn.Parameter)
    assert last.shape == (3, 32, 3, 3)
    assert any(last is p for p in decoder.parameters())


def numpy_group_norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-6)
    return parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def numpy_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    reach = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_whole_decoder_in_float64() -> None:
    """The published order of layers, written once more in numpy."""
    decoder = make(3, 2, base=32, blocks=1, multipliers=(1, 2)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    z = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in decoder.named_parameters()}

    def conv(name: str, x: np.ndarray) -> np.ndarray:
        return numpy_conv(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        groups = 32 if x.shape[1] >= 128 else x.shape[1] // 4
        return numpy_group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"])

    def residual(name: str, x: np.ndarray) -> np.ndarray:
        h = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in w else x)

    def attend(name: str, x: np.ndarray) -> np.ndarray:
        b, c, height, width = x.shape
        tokens = norm(f"{name}.norm", x).reshape(b, c, -1).transpose(0, 2, 1)
        q, k, v = np.split(tokens @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"], 3, axis=-1)
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(c))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        mixed = mixed @ w[f"{name}.out.weight"].T + w[f"{name}.out.bias"]
        return x + mixed.transpose(0, 2, 1).reshape(b, c, height, width)

    x = conv("conv_in", conv("post_quant_conv", z.numpy()))
    x = residual("middle.2", attend("middle.1", residual("middle.0", x)))
    x = attend("levels.1", residual("levels.0", x))
    x = conv("levels.2.conv", x.repeat(2, axis=2).repeat(2, axis=3))
    x = conv("conv_out", silu(norm("norm_out", residual("levels.3", x))))
    np.testing.assert_allclose(decoder(z).image.detach().numpy(), x, rtol=1e-9, atol=1e-10)


def test_all_parameters_learn() -> None:
    decoder = make(4, 4, base=32, blocks=1)
    decoder(torch.randn(1, 4, 2, 2)).image.square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())


@pytest.mark.parametrize(
    ("stride", "options", "message"),
    [
        (14, {}, "defaults for the strides 4, 8, 16, and the encoder and adapter give 14"),
        (
            16,
            {"multipliers": (1, 2, 4)},
            "3 multipliers make a decoder of stride 4, and the encoder and adapter give 16",
        ),
        (8, {"base": 50}, "50 × 1 = 50 channels does not divide into 12"),
        (8, {"base": 68}, "68 × 2 = 136 channels does not divide into 32"),
        (8, {"multipliers": ()}, "give at least one"),
        (8, {"multipliers": (1, 0, 2, 2)}, "all 1 or more"),
        (8, {"blocks": 0}, "blocks"),
    ],
)
def test_what_cannot_be_made_is_refused(stride: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(4, stride, **options)


def test_without_post_quant_conv_the_latent_goes_straight_in() -> None:
    plain, full = make(4, 4, base=32, blocks=1, post_quant_conv=False), make(4, 4, base=32, blocks=1)
    assert set(full.state_dict()) - set(plain.state_dict()) == {"post_quant_conv.weight", "post_quant_conv.bias"}
    identity = {"post_quant_conv.weight": torch.eye(4).view(4, 4, 1, 1), "post_quant_conv.bias": torch.zeros(4)}
    full.load_state_dict({**plain.state_dict(), **identity})
    z = torch.randn(1, 4, 2, 3)
    torch.testing.assert_close(plain(z).image, full(z).image)


RECIPES = ["kl-vae", "kl-vae-f16d32", "kl-vae-small", "va-vae", "va-vae-small"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name: str) -> None:
    """Every component exists and takes its options, and encoder and decoder are of one stride."""
    tokenizer = load_recipe(f"recipe:{name}").tokenizer
    assert tokenizer.encoder is not None
    assert tokenizer.adapter is not None
    assert tokenizer.decoder is not None
    with torch.device("meta"):
        encoder = underpaint.create("encoder", tokenizer.encoder.name, **tokenizer.encoder.options)
        underpaint.create(
            "adapter",
            tokenizer.adapter.name,
            in_channels=encoder.info.channels,
            latent_channels=tokenizer.latent_channels,
        )
        underpaint.create(
            "decoder",
            tokenizer.decoder.name,
            latent_channels=tokenizer.latent_channels,
            stride=encoder.info.stride,
            **tokenizer.decoder.options,
        )


@pytest.mark.parametrize("name", RECIPES)
def test_weights_for_sums_over_pixels_are_converted(name: str) -> None:
    """1e-6, 1e4 and 1e8 of the published losses, divided by the values of an image (aligntok.md §3.1)."""
    recipe = load_recipe(f"recipe:{name}")
    values = 3 * recipe.data.height * recipe.data.width
    for stage in recipe.stages:
        losses = {loss.name: loss for loss in stage.losses}
        assert losses["kl"].weight == pytest.approx(1e-6 / values, rel=1e-2)
        for loss, limit in (("critics/patchgan", 1e4), ("vf", 1e8)):
            adaptive = losses[loss].adaptive if loss in losses else None
            assert (adaptive is None) == (loss == "vf" and not name.startswith("va-vae"))
            if adaptive is not None:
                assert adaptive.limit == pytest.approx(limit / values, rel=1e-2)


def test_va_vae_is_trained_as_released() -> None:
    """aligntok.md §4.2: epochs, weights, margins and starts of the three stages."""
    recipe = load_recipe("recipe:va-vae")
    epoch = 1_281_167 // 256
    found = []
    for stage in recipe.stages:
        losses = {loss.name: loss for loss in stage.losses}
        vf, critic = losses["vf"], losses["critics/patchgan"]
        assert (stage.batch, stage.optimizer.lr, stage.optimizer.betas) == (256, 1e-4, (0.5, 0.9))
        assert critic.critic is not None
        assert (critic.weight, critic.critic.start) == (0.5, critic.start)
        margins = vf.options.get("cosine_margin", 0), vf.options.get("distance_margin", 0)
        found.append((stage.steps / epoch, vf.weight, margins, critic.start, critic.critic.carry))
    assert found == [
        (100, 0.5, (0, 0), 5001, None),
        (15, 0.1, (0, 0), 1, "align"),
        (15, 0.1, (0.5, 0.25), 1, "reconstruct"),
    ]
