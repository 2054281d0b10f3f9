"""The convolutional encoder and its adapter: sizes, shapes, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import underpaint
from underpaint import Adapter, ConfigError, DataError, Encoder, Features, Tokenizer

SMALL: dict[str, Any] = {"base": 32, "multipliers": (1, 1, 2), "blocks": 1}


def encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return underpaint.create("encoder", "ldm/encoder", **options)


def adapter(channels: tuple[int, ...] = (64,), latent: int = 4, **options: Any) -> Adapter:
    torch.manual_seed(0)
    return underpaint.create("adapter", "ldm/gaussian", in_channels=channels, latent_channels=latent, **options)


def size(*parts: nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    ("options", "latent", "expected"),
    [
        # Counted on the published code: its encoder, which ends with conv_out, and its quant_conv.
        ({}, 32, 28_413_248 + 4_160),
        ({}, 16, 28_265_760 + 1_056),
        ({"multipliers": (1, 2, 4, 4), "attention": False}, 4, 34_163_592 + 72),
        ({"multipliers": (1, 2, 4), "attention": False}, 3, 22_351_238 + 42),
    ],
)
def test_parameters_are_those_of_the_published_code(options: dict[str, Any], latent: int, expected: int) -> None:
    with torch.device("meta"):
        trunk = encoder(**options)
        assert size(trunk, adapter(trunk.info.channels, latent)) == expected


@pytest.mark.parametrize(
    ("latent", "quant", "expected"),
    [
        (4, True, 83_653_863),  # Stable Diffusion's VAE, as published
        (16, False, 83_819_683),  # FLUX's, counted on its code
    ],
)
def test_whole_autoencoders_have_the_published_size(latent: int, quant: bool, expected: int) -> None:
    with torch.device("meta"):
        trunk = encoder(multipliers=(1, 2, 4, 4), attention=False)
        decoder = underpaint.create(
            "decoder", "ldm/decoder", latent_channels=latent, stride=8, attention=False, post_quant_conv=quant
        )
        assert size(trunk, adapter(trunk.info.channels, latent, quant_conv=quant), decoder) == expected


@pytest.mark.parametrize(("multipliers", "stride"), [((1, 2), 2), ((1, 1, 2), 4), ((1, 1, 1, 2), 8), ((1,) * 5, 16)])
def test_levels_make_the_stride_also_of_oblong_images(multipliers: tuple[int, ...], stride: int) -> None:
    trunk = encoder(base=16, multipliers=multipliers, blocks=1)
    (features,) = trunk(torch.zeros(2, 3, 32, 48)).maps
    assert trunk.info.stride == stride
    assert features.shape == (2, 16 * multipliers[-1], 32 // stride, 48 // stride)
    assert trunk.info.channels == (features.shape[1],)


def test_images_that_do_not_divide_are_refused() -> None:
    with pytest.raises(DataError, match=r"30×32 px do not divide into the 4 px cells.*28×32"):
        encoder(**SMALL)(torch.zeros(1, 3, 30, 32))


def test_images_go_in_as_they_are() -> None:
    trunk = encoder(**SMALL)
    assert (trunk.info.mean, trunk.info.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    seen: list[torch.Tensor] = []
    first = next(m for m in trunk.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    trunk(images)
    assert torch.equal(seen[0], images)


def test_features_have_passed_silu() -> None:
    # The smallest value that SiLU takes.
    (features,) = encoder(**SMALL)(torch.randn(2, 3, 16, 16)).maps
    assert -0.2785 < float(features.detach().min()) < 0
    assert float(features.detach().max()) > 1


def test_all_parameters_of_encoder_and_adapter_learn() -> None:
    trunk, head = encoder(**SMALL), adapter()
    posterior = head(trunk(torch.randn(1, 3, 16, 16)))
    assert posterior.logvar is not None
    (posterior.mean.square().sum() + posterior.logvar.square().sum()).backward()
    assert all(p.grad is not None for part in (trunk, head) for p in part.parameters())


def test_mean_comes_first_and_the_variance_is_limited() -> None:
    """Without features only the biases speak: first d of the mean, then d of the log-variance, within [-30, 20]."""
    head = adapter(quant_conv=False)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0, -50.0, -29.0, 19.0, 21.0])
    head.load_state_dict({"conv_out.weight": torch.zeros(8, 64, 3, 3), "conv_out.bias": bias})
    posterior = head(Features(maps=(torch.randn(1, 64, 2, 3),)))
    assert posterior.mean[0, :, 1, 2].tolist() == [1, 2, 3, 4]
    assert posterior.logvar is not None
    assert posterior.logvar[0, :, 0, 1].tolist() == [-30, -29, 19, 20]


def test_quant_conv_mixes_mean_and_variance() -> None:
    head = adapter()
    swap = torch.eye(8).roll(4, dims=0).view(8, 8, 1, 1)
    features = Features(maps=(torch.randn(1, 64, 2, 3),))
    state = {**head.state_dict(), "quant_conv.weight": swap, "quant_conv.bias": torch.zeros(8)}
    head.load_state_dict(state)
    plain = adapter(quant_conv=False)
    plain.load_state_dict({key: value for key, value in state.items() if key.startswith("conv_out")})
    swapped, direct = head(features), plain(features)
    torch.testing.assert_close(swapped.mean, direct.logvar)
    torch.testing.assert_close(swapped.logvar, direct.mean)


def test_maps_are_joined_and_must_share_a_grid() -> None:
    head = adapter((3, 5))
    assert head(Features(maps=(torch.zeros(1, 3, 2, 2), torch.zeros(1, 5, 2, 2)))).mean.shape == (1, 4, 2, 2)
    with pytest.raises(DataError, match="4×4, 2×2"):
        head(Features(maps=(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 2, 2))))


def test_last_layer_is_the_convolution_to_the_moments() -> None:
    head = adapter()
    last = head.last_layer()
    assert last is not None
    assert last.shape == (8, 64, 3, 3)
    assert any(last is p for p in head.parameters())


def test_groups_can_be_fixed() -> None:
    norms = [m for m in encoder(**SMALL, groups=16).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {16}
    assert {m.num_groups for m in encoder(**SMALL).modules() if isinstance(m, nn.GroupNorm)} == {8, 16}


def test_encoder_adapter_and_decoder_make_a_tokenizer() -> None:
    trunk = encoder(**SMALL)
    decoder = underpaint.create("decoder", "ldm/decoder", latent_channels=4, stride=4, base=32, blocks=1)
    tokenizer = Tokenizer(trunk, adapter(), decoder)
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    assert tokenizer.encode(images).shape == (1, 4, 4, 6)
    assert tokenizer.reconstruct(images).shape == images.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 50}, "50 × 1 = 50 channels does not divide into 12"),
        ({"base": 36, "multipliers": (32,), "groups": 32}, "36 × 1 = 36 channels does not divide into 32"),
        ({"base": 32, "multipliers": (1, 2), "groups": 24}, "make the product a multiple of 24"),
        ({"multipliers": ()}, "give at least one"),
        ({"multipliers": (1, 0)}, "all 1 or more"),
        ({"blocks": 0}, "blocks"),
        ({"stride": 16}, "stride"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(**options)
