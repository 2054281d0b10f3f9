"""VFM-VAE's adapter: its size, its shapes, its posterior, its parts in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
from underpaint import Adapter, ConfigError, DataError, Features, Posterior

VF_HEAD = 32 * 1024
"""Weights of the VF loss's own projection, which the authors count as part of their adapter."""


def make(in_channels: tuple[int, ...] = (24, 40), latent: int = 8, width: int = 8, **options: Any) -> Adapter:
    torch.manual_seed(0)
    return underpaint.create(
        "adapter", "vfmvae/adapter", in_channels=in_channels, latent_channels=latent, width=width, **options
    )


def published() -> tuple[Adapter, nn.Module]:
    """The published adapter, and the expansion that we keep in the decoder, on the meta device."""
    with torch.device("meta"):
        adapter = make((1024, 1024, 1024), 32, 64)
        decoder = underpaint.create("decoder", "vfmvae/decoder", latent_channels=32, stride=16)
    return adapter, decoder.get_submodule("expand")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def maps(channels: tuple[int, ...], rows: int, columns: int, batch: int = 2) -> Features:
    generator = torch.Generator().manual_seed(1)
    return Features(tuple(torch.randn(batch, c, rows, columns, generator=generator) for c in channels))


def disturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))


# ---------------------------------------------------------------------------------------------------- size


def test_parameters_are_those_published() -> None:
    adapter, expand = published()
    assert count(adapter.get_submodule("maps")) == 9_740_352
    assert count(adapter.get_submodule("final")) == 1_852_608
    assert count(expand) == 1_907_328
    assert count(adapter) + count(expand) + VF_HEAD == 13_533_056


def test_heads_are_as_wide_as_the_output() -> None:
    adapter, expand = published()
    heads = [adapter.get_submodule(f"maps.{i}.attention").heads for i in range(3)]
    assert heads == [16, 16, 16]
    assert adapter.get_submodule("final.attention").heads == 12
    assert expand.get_submodule("attention").heads == 16


def test_last_layer_is_the_output_matrix_of_the_final_gated_mlp() -> None:
    adapter, _ = published()
    last = adapter.last_layer()
    assert isinstance(last, nn.Parameter)
    assert last.shape == (64, 128)
    assert [name for name, p in adapter.named_parameters() if p is last] == ["final.mlp.out.weight"]


# -------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 64), (32, 48), (8, 8)])
def test_published_shapes(rows: int, columns: int) -> None:
    """256 px, 512 px, an oblong image, and a quarter of 256 px as the equivariance regularisation gives."""
    adapter, _ = published()
    features = Features(tuple(torch.empty(2, 1024, rows, columns, device="meta") for _ in range(3)))
    posterior = adapter(features)
    assert posterior.mean.shape == (2, 32, rows // 2, columns // 2)
    assert posterior.logvar is not None
    assert posterior.logvar.shape == posterior.mean.shape


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_stride_merges_cells(stride: int) -> None:
    adapter = make(stride=stride, latent=4)
    assert adapter.stride == stride
    assert adapter(maps((24, 40), 6, 12)).mean.shape == (2, 4, 6 // stride, 12 // stride)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny/vit@random", {"width": 48, "depth": 2, "heads": 2, "layers": (0, 1)}),
        ("timm/vit_tiny_patch16_224@random", {"layers": (3, 11), "stride": 8}),
        ("timm/vit_small_patch14_reg4_dinov2@random", {"layers": (3, 11), "stride": 8}),
    ],
)
def test_any_encoder_will_do(name: str, options: dict[str, Any]) -> None:
    encoder = underpaint.create("encoder", name, **options)
    adapter = make(encoder.info.channels, 4)
    assert adapter(encoder(torch.zeros(1, 3, 32, 64))).mean.shape == (1, 4, 2, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 40 to 24 channels, because neither divides"):
        make(width=24)
    with pytest.raises(DataError, match="gives 4×4, 2×2"):
        make()(Features((torch.zeros(1, 24, 4, 4), torch.zeros(1, 40, 2, 2))))
    with pytest.raises(DataError, match="merges 2×2 cells, and the encoder gives maps of 3×4"):
        make()(maps((24, 40), 3, 4))


# ----------------------------------------------------------------------------------------------- posterior


def test_mode_is_the_mean_and_samples_spread_around_it() -> None:
    adapter = make((8,), 4, stride=1)
    disturb(adapter)
    with torch.no_grad():
        posterior = adapter(maps((8,), 2, 3, batch=1))
    assert torch.equal(posterior.mode(), posterior.mean)
    many = Posterior(posterior.mean.expand(20_000, -1, -1, -1), posterior.logvar.expand(20_000, -1, -1, -1))
    drawn = many.sample(torch.Generator().manual_seed(0))
    deviation = (0.5 * posterior.logvar[0]).exp()
    assert float(((drawn.mean(0) - posterior.mean[0]) / deviation).abs().max()) < 0.05
    assert float((drawn.std(0) / deviation - 1).abs().max()) < 0.03


def test_kl_is_that_of_two_normal_distributions() -> None:
    adapter = make().double()
    disturb(adapter)
    posterior = adapter(Features(tuple(m.double() for m in maps((24, 40), 4, 6).maps)))
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    unit = torch.distributions.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    expected = torch.distributions.kl_divergence(normal, unit).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), expected)


def test_log_variance_is_kept_within_bounds() -> None:
    adapter = make()
    with torch.no_grad():
        adapter.get_submodule("final.skip").bias.copy_(torch.tensor([100.0, -100.0] * 8))
    posterior = adapter(maps((24, 40), 2, 2))
    assert posterior.logvar.flatten().unique().tolist() == [-30.0, 20.0]
    assert float(posterior.mean.detach().abs().max()) > 90


# -------------------------------------------------------------------------------------------- closed forms


def layer_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, eps: float) -> np.ndarray:
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return unit * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def project(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """The specification's attention projection of one sample, N×a to N×b, head by head."""
    a, b = x.shape[-1], w["skip.bias"].size
    heads, inner = max(a, b) // min(a, b), max(a, b)
    normed = layer_norm(x, w, "attention_norm", 1e-5)
    q, k, v = (normed @ w["attention.qkv.weight"][i * inner : (i + 1) * inner].T for i in range(3))
    q, v = q + w["attention.query_bias"], v + w["attention.value_bias"]
    outputs = []
    for head in range(heads):
        part = slice(head * inner // heads, (head + 1) * inner // heads)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(inner // heads))
        outputs.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
    mixed = np.mean(outputs, axis=0) if a > b else np.concatenate(outputs, axis=1)
    y = linear(layer_norm(x, w, "skip_norm", 1e-5), w, "skip") + linear(mixed, w, "attention.out")
    inside = layer_norm(layer_norm(y, w, "mlp_norm", 1e-5), w, "mlp.norm", 1e-6)
    gate = linear(inside, w, "mlp.gate")
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return y + linear(gelu * linear(inside, w, "mlp.value"), w, "mlp.out")


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 8), (8, 24), (8, 8)])
def test_projection_in_float64(inputs: int, outputs: int) -> None:
    decoder = underpaint.create("decoder", "vfmvae/decoder", latent_channels=4, stride=8, width=32, base=16, heads=4)
    kind = type(decoder.get_submodule("expand"))
    module = kind(inputs, outputs).double()
    disturb(module)
    x = torch.randn(2, 5, inputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = module(x).detach().numpy()
    for sample in range(2):
        np.testing.assert_allclose(got[sample], project(x[sample].numpy(), weights(module)), rtol=1e-9, atol=1e-11)


def test_cells_are_merged_where_they_stand_and_maps_keep_their_order() -> None:
    """Whole adapter of one sample: projections, cells of 2×2 side by side per channel, the final projection."""
    adapter = make((24, 40), 4).double()
    disturb(adapter)
    features = Features(tuple(m.double() for m in maps((24, 40), 4, 6, batch=1).maps))
    merged = []
    for index, given in enumerate(features.maps):
        tokens = given[0].flatten(1).T.numpy()
        grid = project(tokens, weights(adapter.get_submodule(f"maps.{index}"))).reshape(4, 6, 8)
        cells = grid.reshape(2, 2, 3, 2, 8).transpose(0, 2, 4, 1, 3)  # row, column, channel, row and column within
        merged.append(cells.reshape(6, 32))
    moments = project(np.concatenate(merged, axis=1), weights(adapter.get_submodule("final")))
    posterior = adapter(features)
    expected = moments.T.reshape(8, 2, 3)
    np.testing.assert_allclose(posterior.mean[0].detach().numpy(), expected[:4], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(posterior.logvar[0].detach().numpy(), expected[4:], rtol=1e-9, atol=1e-11)


def test_initial_weights() -> None:
    """Truncated normal of deviation 0.02; biases zero."""
    adapter = make((256,), 32, 64)
    for name, module in adapter.named_modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < float(module.weight.detach().std()) < 0.025, name
            assert module.bias is None or not module.bias.any()


# ------------------------------------------------------------------------------------------------ training


def test_gradients_reach_everything() -> None:
    adapter = make()
    disturb(adapter)
    posterior = adapter(maps((24, 40), 4, 4))
    generator = torch.Generator().manual_seed(4)
    target: Tensor = torch.randn(posterior.mean.shape, generator=generator)
    (F.mse_loss(posterior.sample(generator), target) + posterior.kl().mean()).backward()
    idle = [n for n, p in adapter.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not idle


def test_bfloat16() -> None:
    adapter = make()
    disturb(adapter)
    features = maps((24, 40), 4, 6)
    expected = adapter(features)
    got = adapter.bfloat16()(features)
    assert got.mean.dtype == got.logvar.dtype == torch.bfloat16
    assert float((got.mean.float() - expected.mean).detach().abs().mean()) < 0.05 * float(expected.mean.detach().std())
