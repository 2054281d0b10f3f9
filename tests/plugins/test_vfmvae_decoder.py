"""VFM-VAE's decoder and pyramid loss: size, shapes, closed forms of the parts, and the recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import underpaint
import underpaint_vfmvae
from underpaint import ConfigError, Decoder, Loss, Reconstruction, StepTensors
from underpaint.config.recipe import read_yaml, recipe_from_plain
from underpaint.models.build import build_tokenizer
from underpaint.run.recipes import load_recipe
from underpaint.training.compilation import units_of
from underpaint_vfmvae import layers

TINY: dict[str, Any] = {"width": 32, "base": 16, "depths": (2, 1), "heads": 4}
RECIPES = Path(underpaint_vfmvae.__file__).with_name("recipes")


def make(latent: int = 4, stride: int = 16, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return underpaint.create("decoder", "vfmvae/decoder", latent_channels=latent, stride=stride, **{**TINY, **options})


def published(**options: Any) -> Decoder:
    with torch.device("meta"):
        return underpaint.create("decoder", "vfmvae/decoder", latent_channels=32, stride=16, **options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def latents(channels: int, rows: int, columns: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, rows, columns, generator=torch.Generator().manual_seed(seed))


def disturb(module: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


# ---------------------------------------------------------------------------------------------------- size


def test_parameters_are_those_published() -> None:
    decoder = published(noise="learned")
    blocks = [count(block) for block in decoder.get_submodule("blocks").children()]
    fusion = [count(part) for part in decoder.get_submodule("fusion").children()]
    assert blocks == [28_462_090, 30_043_402, 29_865_866, 23_565_194, 6_120_200, 2_142_600]
    assert fusion == [4_532_224, 609_280, 87_040, 284_416]
    assert sum(blocks) + sum(fusion) == 125_712_312
    assert count(decoder.get_submodule("mapping")) == 525_312
    # Stage 2 trains 128.14 M: blocks, fusion, mapping and expansion.
    assert count(decoder) == 125_712_312 + 525_312 + 1_907_328


def test_parameters_of_the_whole_tokenizer() -> None:
    with torch.device("meta"):
        adapter = underpaint.create("adapter", "vfmvae/adapter", in_channels=(1024,) * 3, latent_channels=32)
    vf_head = 32 * 1024  # belongs to the VF loss here
    assert count(adapter) + count(published(noise="learned")) + vf_head == 139_770_680
    assert count(adapter) + count(published()) == 139_737_874
    assert count(adapter) + count(published(noise="fixed")) == 139_737_874


def test_layers_that_the_style_code_modulates() -> None:
    kinds = [type(module) for module in published().modules()]
    assert kinds.count(layers.ConvNeXt) == 38
    assert kinds.count(layers.ToRgb) == 6
    assert kinds.count(layers.SelfAttention) == 6


def test_kernels_and_blurs() -> None:
    blocks = list(published().get_submodule("blocks").children())
    kernels = [{layer.depthwise.kernel_size for layer in block.layers} for block in blocks]
    assert kernels == [{(5, 5)}] * 2 + [{(7, 7)}] * 4
    blurs = [{m.kernel.shape[0] for m in block.modules() if isinstance(m, layers.Upsample)} for block in blocks]
    assert blurs == [{3}] * 3 + [{5}] * 3


def test_names_of_the_stages_parts() -> None:
    """What stage 2 and stage 3 train: all but the frozen encoder and the adapter; the blocks above 32 px."""
    decoder = published()
    coarse = [decoder.get_submodule(f"blocks.{i}") for i in range(3)]
    fine = [decoder.get_submodule(f"blocks.{i}") for i in range(3, 6)]
    assert [len(block.attention) for block in coarse] == [2, 2, 2]
    assert [len(block.attention) for block in fine] == [0, 0, 0]
    assert decoder.get_submodule("mapping").hidden.weight.shape == (512, 512)


# -------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (12, 12), (16, 16), (32, 32), (16, 24), (32, 20)])
def test_published_shapes(grid: tuple[int, int]) -> None:
    """64, 128, 192, 256 and 512 px, and oblong images; the same weights."""
    result = published()(torch.empty(1, 32, *grid, device="meta"))
    sizes = [tuple(image.shape) for image in (*result.pyramid, result.image)]
    assert sizes == [(1, 3, grid[0] * 2**i // 2, grid[1] * 2**i // 2) for i in range(6)]


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (5, 6), (2, 7)])
def test_every_stride_and_every_grid(stride: int, grid: tuple[int, int]) -> None:
    result = make(4, stride, depths=(1, 1))(latents(4, *grid))
    assert result.image.shape == (1, 3, grid[0] * stride, grid[1] * stride)
    halves = [i for i in range(stride.bit_length()) if grid[0] * 2**i % 2 == grid[1] * 2**i % 2 == 0]
    sizes = [tuple(image.shape[-2:]) for image in result.pyramid]
    assert sizes == [(grid[0] * 2**i // 2, grid[1] * 2**i // 2) for i in halves]


def test_a_grid_that_does_not_divide_is_repeated_at_its_end() -> None:
    """Without the parts that see the whole image, it is the image of the latent repeated by hand, cut."""
    decoder = make(4, 8).double()
    z = latents(4, 5, 6).double()
    repeated = F.pad(z, (0, 2, 0, 3), mode="replicate")
    whole = z.new_zeros(1, 32)
    decoder.get_submodule("mapping").forward = lambda code: whole  # type: ignore[method-assign]
    nn.init.zeros_(decoder.get_submodule("expand.attention.out").weight)
    got, expected = decoder(z), decoder(repeated)
    torch.testing.assert_close(got.image, expected.image[..., :40, :48])
    assert [tuple(i.shape[-2:]) for i in got.pyramid] == [(5, 6), (10, 12), (20, 24)]
    torch.testing.assert_close(got.pyramid[0], expected.pyramid[1][..., :5, :6])


def test_pixels_stand_where_their_cells_do() -> None:
    decoder = make(8, 8, width=64, base=32)
    generator = torch.Generator().manual_seed(5)
    z = latents(8, 16, 16)
    whole = z.new_zeros(1, 64)  # in place of w, which carries every change everywhere
    decoder.get_submodule("mapping").forward = lambda code: whole  # type: ignore[method-assign]
    with torch.no_grad():
        before = decoder(z).image
        for row, column in ((0, 0), (0, 15), (15, 0), (15, 15), (2, 9)):
            changed = z.clone()
            changed[:, :, row, column] = 2 * torch.randn(8, generator=generator)
            moved = (decoder(changed).image - before).square().sum(1)[0]
            cells = moved.unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3))
            near = cells[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4].mean()
            mirrored = cells.flip(0, 1)[max(0, row - 3) : row + 4, max(0, column - 3) : column + 4].mean()
            assert float(near) > 4 * float(mirrored)


@pytest.mark.parametrize(
    ("stride", "options", "message"),
    [
        (14, {}, "together give a stride of 14 px, where 2, 4, 8, 16 or 32 would do; set tokenizer.stride"),
        (1, {}, "give a stride of 1 px"),
        (8, {"heads": 5}, "heads is 5, and a block with attention has 32 channels"),
        (8, {"width": 40}, "multiple of 16"),
        (8, {"width": 96}, "A map of the decoder has 144 channels, which do not divide into 32"),
        (8, {"width": 512, "base": 36}, "A map of the decoder has 144 channels"),
        (8, {"width": 512, "base": 20}, "A map of the decoder has 208 channels"),
        (8, {"width": 256, "base": 20}, "A map of the decoder has 144 channels"),
        (8, {"base": 64}, "base is 64, above width"),
        (8, {"depths": (1, 0)}, "both must be 1 or more"),
        (8, {"noise": "some"}, "noise"),
    ],
)
def test_what_cannot_be_made_is_refused(stride: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(4, stride, **options)


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
def test_widths_as_the_error_advises_can_be_made(stride: int) -> None:
    wide = [(width, base) for width in (128, 256, 384, 512) for base in (32, 64, 96)]
    narrow = [(width, base) for width in (16, 32, 48, 64) for base in range(4, width + 1, 4)]
    for width, base in wide + narrow:
        with torch.device("meta"):
            make(4, stride, width=width, base=base, heads=1, depths=(1, 1))


def test_latents_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="from 5 to 32 channels"):
        make(5, 8)


# -------------------------------------------------------------------------------------------- closed forms


def test_mapping() -> None:
    """Second-moment normalisation, then two layers of stored weights times 0.01/√C and biases times 0.01."""
    mapping = layers.Mapping(6).double()
    disturb(mapping, 20.0)
    code = np.random.default_rng(0).normal(size=(3, 6))
    w = {name: p.detach().numpy() for name, p in mapping.named_parameters()}
    unit = code / np.sqrt((code**2).mean(1, keepdims=True) + 1e-8)
    hidden = unit @ (w["hidden.weight"] * 0.01 / math.sqrt(6)).T + 0.01 * w["hidden.bias"]
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    expected = hidden @ (w["out.weight"] * 0.01 / math.sqrt(6)).T + 0.01 * w["out.bias"]
    got = mapping(torch.from_numpy(code)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_mapping_begins_with_unit_weights_whatever_its_rate() -> None:
    torch.manual_seed(0)
    weight = layers.Mapping(256).hidden.weight.detach()
    assert float(weight.std()) == pytest.approx(100, rel=0.02)


def group_norm(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    groups = min(32, x.shape[1] // 4)
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * w["norm.weight"][:, None, None] + w["norm.bias"][:, None, None]


def style(code: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    a, b, c = np.split(code @ w["style.weight"].T / np.sqrt(code.shape[1]) + w["style.bias"], 3, axis=1)
    return a * b + c


@pytest.mark.parametrize("noise", ["none", "learned", "fixed"])
def test_modulated_layer(noise: Any) -> None:
    """Weights are multiplied and divided for each sample by itself, as the formula is written."""
    layer = layers.ConvNeXt(8, 6, 5, noise, 4).double()
    disturb(layer)
    generator = torch.Generator().manual_seed(6)
    x, code = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 8, 4, 4), (2, 6)))
    w = {name: p.detach().numpy() for name, p in layer.state_dict().items()}
    y = F.conv2d(x, layer.depthwise.weight, layer.depthwise.bias, padding=2, groups=8).detach().numpy()
    if noise != "none":
        y = y + w["noise.map"] * w.get("noise.strength", 1.0)
    y = group_norm(y, w)
    for sample, factors in enumerate(style(code.numpy(), w)):
        rows = w["widen.weight"][:, :, 0, 0] * factors
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True) + 1e-8)
        np.testing.assert_allclose((rows**2).sum(1), 1, atol=1e-6)
        wide = np.einsum("oi,ihw->ohw", rows, y[sample]) + w["widen.bias"][:, None, None]
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        narrow = np.einsum("oi,ihw->ohw", w["narrow.weight"][:, :, 0, 0], wide) + w["narrow.bias"][:, None, None]
        expected = x[sample].numpy() + w["gamma"] * narrow
        np.testing.assert_allclose(layer(x, code)[sample].detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_demodulation_forgets_the_scale_of_the_style() -> None:
    layer = layers.ConvNeXt(8, 6, 5, "none", 4).double()
    disturb(layer)
    with torch.no_grad():
        layer.style.weight.zero_()
        layer.style.bias[:16] = 0.0  # a and b; c alone is the style
        x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        code = torch.ones(1, 6, dtype=torch.float64)
        before = layer(x, code)
        layer.style.bias.mul_(50.0)
        torch.testing.assert_close(layer(x, code), before, rtol=1e-6, atol=1e-8)
        layer.style.bias[20] = 0.0
        assert not torch.allclose(layer(x, code), before, atol=1e-3)


def test_colours() -> None:
    """Modulated, not demodulated, the style divided by √C; additive bias, linear output."""
    head = layers.ToRgb(8, 6).double()
    disturb(head)
    generator = torch.Generator().manual_seed(8)
    x, code = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 8, 3, 2), (2, 6)))
    w = {name: p.detach().numpy() for name, p in head.named_parameters()}
    rows = w["weight"][None, :, :, 0, 0] * (style(code.numpy(), w) / math.sqrt(8))[:, None, :]
    expected = np.einsum("boi,bihw->bohw", rows, x.numpy()) + w["bias"][:, None, None]
    np.testing.assert_allclose(head(x, code).detach().numpy(), expected, rtol=1e-10)


def test_attention() -> None:
    layer = layers.SelfAttention(8, 2).double()
    disturb(layer)
    x = torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in layer.named_parameters()}

    def norm(values: np.ndarray, gain: str) -> np.ndarray:
        return values / np.linalg.norm(values, axis=-1, keepdims=True) * math.sqrt(8) * w[gain].reshape(-1)

    for sample in range(2):
        cells = x[sample].flatten(1).T.numpy()
        normed = norm(cells, "norm.gain")
        q, k, v = (normed @ w[f"{name}.weight"][:, :, 0, 0].T for name in ("query", "key", "value"))
        heads = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            keys, values = (np.vstack((w["null"][i, head], given[:, part])) for i, given in enumerate((k, v)))
            scores = np.exp(q[:, part] @ keys.T / 2)
            heads.append(scores / scores.sum(1, keepdims=True) @ values)
        y = cells + np.concatenate(heads, axis=1) @ w["out.weight"][:, :, 0, 0].T
        inner = norm(y, "mlp_norm.gain") @ w["mlp_in.weight"][:, :, 0, 0].T + w["mlp_in.bias"]
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        y = y + inner @ w["mlp_out.weight"][:, :, 0, 0].T + w["mlp_out.bias"]
        got = layer(x)[sample].detach().numpy()
        np.testing.assert_allclose(got, y.T.reshape(8, 2, 3), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("blur", "row"), [(3, [1, 2, 1]), (5, [1, 4, 6, 4, 1])])
@pytest.mark.parametrize("last", [False, True])
def test_upsampling(blur: int, row: list[int], last: bool) -> None:
    unit = layers.Upsample(8, 4, blur=blur, norm_last=last).double()
    disturb(unit)
    assert float(unit.kernel.sum()) == 1.0
    x = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in unit.named_parameters()}
    y = x if last else torch.from_numpy(group_norm(x.numpy(), w))
    y = F.conv2d(F.conv2d(y, unit.depthwise.weight, padding=1, groups=8), unit.pointwise.weight).detach()
    shuffled = np.zeros((2, 4, 6, 8))
    for channel in range(4):
        for i in range(2):
            for j in range(2):
                shuffled[:, channel, i::2, j::2] = y[:, 4 * channel + 2 * i + j]
    if last:
        shuffled = group_norm(shuffled, w)
    padded = np.pad(shuffled, ((0, 0), (0, 0), (blur // 2,) * 2, (blur // 2,) * 2), mode="edge")
    weights = np.outer(row, row) / np.sum(row) ** 2
    windows = np.lib.stride_tricks.sliding_window_view(padded, (blur, blur), axis=(2, 3))
    expected = np.einsum("bchwij,ij->bchw", windows, weights)
    np.testing.assert_allclose(unit(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_upsampling_has_the_gradient_of_a_repeated_border(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = layers.Upsample(8, 4, blur=5).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(unit(x).square().sum(), x)
        return found

    own = gradient()
    monkeypatch.setattr(
        layers,
        "repeat_border",
        lambda y, dim, *by: F.pad(y, (0, 0, *by) if dim == 2 else (*by, 0, 0), mode="replicate"),
    )
    torch.testing.assert_close(own, gradient(), rtol=1e-12, atol=1e-12)


def test_noise_maps_are_made_for_256_px_and_resized_between_pixel_centres() -> None:
    decoder = make(4, 16, noise="fixed")
    sides = [block.layers[0].noise.map.shape[0] for block in decoder.get_submodule("blocks").children()]
    assert sides == [8, 16, 32, 64, 128, 256]
    noise = decoder.get_submodule("blocks.0.layers.0.noise")
    made = noise.map.numpy()
    # Half as many cells: each lies between two of the map's. No antialiasing, which would take more of them in.
    np.testing.assert_allclose(noise(4, 8)[0, 0].numpy(), (made[0::2] + made[1::2]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        noise(2, 8)[0, 0].numpy(), (made[1::4] + made[2::4]) / 2, rtol=1e-5, atol=1e-6
    )  # a quarter


def test_images_are_made_from_the_sum_of_all_coarser_blocks() -> None:
    """With upsampling units that repeat pixels, silenced layers and w fixed, the image is the sum of the maps."""
    decoder = make(4, 8)
    seen: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for block in decoder.get_submodule("blocks").children():
        block.register_forward_hook(lambda _, given, made: seen.append((made[0], given[1], made[1])))
    with torch.no_grad():
        decoder(latents(4, 4, 4))
        blocks = list(decoder.get_submodule("blocks").children())
        assert seen[0][1] is None
        assert torch.equal(seen[0][0], seen[0][2])
        for index in range(1, len(blocks)):
            assert seen[index][1] is seen[index - 1][2]
            expected = seen[index][0] + blocks[index].rgb_upsample(seen[index - 1][2])
            torch.testing.assert_close(seen[index][2], expected)


def test_colours_come_from_the_last_layer() -> None:
    decoder = make(4, 8)
    last = decoder.last_layer()
    assert last is decoder.get_submodule("blocks.4").rgb.weight
    (gradient,) = torch.autograd.grad(decoder(latents(4, 4, 4)).image.square().sum(), last)
    assert float(gradient.abs().sum()) > 0


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("noise", ["none", "learned"])
def test_gradients_reach_everything(noise: str) -> None:
    decoder = make(4, 16, noise=noise)
    disturb(decoder)
    result = decoder(latents(4, 4, 4, batch=2))
    total = sum(image.square().mean() for image in (*result.pyramid, result.image))
    assert isinstance(total, Tensor)
    total.backward()
    idle = [n for n, p in decoder.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not idle


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_recomputation_changes_memory_only(backend: str | None) -> None:
    plain, again = make(4, 8, depths=(3, 3)), make(4, 8, depths=(3, 3), recompute=True)
    disturb(plain)
    again.load_state_dict(plain.state_dict())
    kept, gradients = [], []
    for decoder in (plain, again):
        if backend is not None:
            for unit in units_of(decoder, decoder.last_layer()):
                unit.compile(backend=backend, dynamic=False)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: (s.append(x.numel()), x)[1], lambda x: x):
            image = decoder(latents(4, 4, 4, batch=2)).image
        # Twice, as for an adaptive weight.
        style = decoder.get_parameter("mapping.out.weight")
        (first,) = torch.autograd.grad(image.sum(), style, retain_graph=True)
        image.square().sum().backward()
        kept.append(sum(saved))
        gradients.append({"first": first} | {name: p.grad for name, p in decoder.named_parameters()})
    assert kept[1] < kept[0] / 3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    with torch.no_grad():
        assert torch.equal(plain(latents(4, 4, 4)).image, again(latents(4, 4, 4)).image)


def test_bfloat16() -> None:
    decoder = make(4, 8)
    disturb(decoder, 0.02)
    z = latents(4, 4, 8)
    with torch.no_grad():
        expected = decoder(z).image
        got = decoder.bfloat16()(z)
    assert all(image.dtype == torch.bfloat16 for image in (*got.pyramid, got.image))
    assert float((got.image.float() - expected).abs().mean()) < 0.1 * float(expected.std())


# -------------------------------------------------------------------------------------------- pyramid loss


def pyramid(**options: Any) -> Loss:
    return underpaint.create("loss", "vfmvae/pyramid", **options)


def test_pyramid_sums_the_errors_of_all_sizes() -> None:
    target = torch.full((2, 3, 16, 24), 0.5)
    coarse = tuple(torch.full((2, 3, 4 * k, 6 * k), value) for k, value in ((1, 0.0), (2, 1.5)))
    step = StepTensors(step=0, images=target, reconstruction=Reconstruction(target, coarse))
    for interpolation in ("bilinear", "bicubic"):
        assert float(pyramid(interpolation=interpolation)(step)["pyramid"]) == pytest.approx(0.5 + 1.0, rel=1e-5)


def test_pyramid_shrinks_the_target_with_antialiasing() -> None:
    """Bilinear with antialiasing is a triangle filter of twice the scale's reach: here over four pixels."""
    row = np.random.default_rng(0).uniform(-1, 1, 16)
    target = torch.from_numpy(row).float().expand(1, 3, 16, 16)
    expected = []
    for cell in range(8):
        centres = np.arange(16) + 0.5
        triangle = np.clip(1 - np.abs(centres - (2 * cell + 1)) / 2, 0, None)
        expected.append((triangle * row).sum() / triangle.sum())
    zero = torch.zeros(1, 3, 8, 8)
    step = StepTensors(step=0, images=target, reconstruction=Reconstruction(target, (zero,)))
    assert float(pyramid()(step)["pyramid"]) == pytest.approx(np.abs(expected).mean(), rel=1e-5)


def test_pyramid_of_a_decoder_without_one_is_refused() -> None:
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="the decoder gives none"):
        pyramid()(StepTensors(step=0, images=image, reconstruction=Reconstruction(image)))


# ------------------------------------------------------------------------------------------------- recipes


def test_paper_scale_recipe_says_what_the_paper_says() -> None:
    recipe = recipe_from_plain(read_yaml(RECIPES / "vfm-vae.yaml"))
    ends = np.cumsum([stage.steps * stage.batch for stage in recipe.stages]) / 1e6
    np.testing.assert_allclose(ends, [20, 40, 41, 44], atol=512 / 1e6)
    assert [stage.optimizer.lr for stage in recipe.stages] == [1e-4, 1e-4, 5e-5, 5e-5]
    assert {(*stage.optimizer.betas, stage.optimizer.clip, stage.batch) for stage in recipe.stages} == {
        (0.0, 0.99, None, 512)
    }
    assert all(stage.ema == pytest.approx(0.5 ** (512 / 160_000), abs=1e-5) for stage in recipe.stages)
    weights = [{loss.name: loss.weight for loss in stage.losses} for stage in recipe.stages]
    assert [w.get("l1", 0) for w in weights] == [1, 1, 1, 0]
    assert [w.get("lpips", 0) for w in weights] == [10, 10, 2, 0]
    assert [w.get("ssim", 0) for w in weights] == [0, 0, 1, 0]
    assert [w.get("vf", 0) for w in weights] == [5, 1, 0, 0]
    assert [w.get("kl", 0) for w in weights] == [1e-6, 1e-6, 0, 0]
    assert [w.get("critics/vfm-vae", 0) for w in weights] == [1, 1, 1, 1]
    assert [w.get("critics/multiscale", 0) for w in weights] == [0, 0, 0, 1]
    assert [w.get("vfmvae/pyramid", 0) for w in weights] == [0.1, 0, 0, 0]
    (window,) = (loss.end for loss in recipe.stages[0].losses if loss.name == "vfmvae/pyramid")
    assert window is not None
    assert window * 512 / 1e6 == pytest.approx(5, abs=512 / 1e6)
    assert [stage.equivariance is not None for stage in recipe.stages] == [True, True, True, False]


@pytest.mark.parametrize("name", ["vfm-vae", "vfm-vae-small"])
def test_stages_train_parts_that_exist(name: str) -> None:
    """The last stage trains the blocks above 32 px of 256, or above 8 px of 64."""
    recipe = recipe_from_plain(read_yaml(RECIPES / f"{name}.yaml"))
    assert recipe.tokenizer.decoder is not None
    stride = recipe.tokenizer.stride
    assert stride == {"vfm-vae": 16, "vfm-vae-small": 8}[name]
    with torch.device("meta"):
        decoder = underpaint.create(
            "decoder",
            "vfmvae/decoder",
            latent_channels=recipe.tokenizer.latent_channels,
            stride=stride,
            **recipe.tokenizer.decoder.options,
        )
    parts = [part.removeprefix("decoder.") for part in recipe.stages[3].trains]
    assert all(count(decoder.get_submodule(part)) > 0 for part in parts)
    side = recipe.data.height // stride
    sizes = [
        image.shape[-1]
        for image in decoder(torch.empty(1, recipe.tokenizer.latent_channels, side, side, device="meta")).pyramid
    ]
    above = [f"blocks.{i}" for i, size in enumerate([*sizes, recipe.data.height]) if size > recipe.data.height // 8]
    assert parts == above


def test_small_recipe_builds_and_learns_a_step() -> None:
    overrides = ["tokenizer.encoder.name=tiny/vit@random", "diffusion=null", "evaluation.reconstruction=[psnr]"]
    overrides += [f"stages.{stage}.losses=[l1]" for stage in ("weak", "ssim", "patchgan")]
    recipe = load_recipe("recipe:vfm-vae-small", [*overrides, "stages.strong.losses=[l1,vfmvae/pyramid,kl]"])
    tokenizer = build_tokenizer(recipe.tokenizer, recipe.seed)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(11)) * 2 - 1
    posterior = tokenizer.posterior(images)
    assert posterior.mean.shape == (2, 16, *tokenizer.grid(64, 64))
    result = tokenizer.decoder(posterior.sample())
    step = StepTensors(step=0, images=images, posterior=posterior, reconstruction=result)
    terms: dict[str, Tensor] = {}
    for loss in recipe.stages[0].losses:
        terms |= underpaint.create("loss", loss.name, **loss.options)(step)
    assert sorted(terms) == ["kl", "l1", "pyramid"]
    torch.stack([terms["l1"], terms["pyramid"], 1e-6 * terms["kl"]]).sum().backward()
    for part in (tokenizer.adapter, tokenizer.decoder):
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in part.parameters())
