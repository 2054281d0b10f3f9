"""The importer of RAE's decoders against numbers of the original.

Every tensor is filled by `formula` from its name, so that both sides have the same weights. The numbers were made by
the original code at commit a4d18c4 in float32 with torch 2.14 and transformers 4.56.2: its ``RAE.decode``, a decoder of
64 latent channels, width 32, 2 layers, 4 heads, MLP width 48, patch 16 and 3×3 positions, and ImageNet's colours.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import underpaint
from underpaint import ConfigError, DataError, Tokenizer

WIDTH, DEPTH, HEADS, HIDDEN, LATENT, PATCH, SIDE = 32, 2, 4, 48, 64, 16, 3
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])

# Every 1201st value of the images in [0, 1], and their mean and standard deviation.
PLAIN = [
    0.3248978, 0.4776276, 0.7870275, 0.6305158, 0.2984055, 0.1745875,
    0.4444852, 0.7834644, 0.4522945, 0.3586044, 0.1920526, 0.3822133,
]  # fmt: skip
PLAIN_MOMENTS = (0.45067211477564545, 0.22137210115977202)
# With latents standardised by a mean and a variance of each channel.
PER_CHANNEL = [
    0.3328024, 0.4565312, 0.7020227, 0.6958538, 0.4320116, 0.2458383,
    0.5924035, 0.7068703, 0.612972, 0.4634627, 0.2209683, 0.2626446,
]  # fmt: skip
PER_CHANNEL_MOMENTS = (0.45213835682995895, 0.22343729579529803)
# By a mean and a variance of each position, and by a variance alone, as in the released files.
PER_POSITION = [
    0.2778868, 0.4511214, 0.6708897, 0.6325405, 0.2514012, 0.1142087,
    0.4120438, 0.8428594, 0.3991908, 0.3212758, 0.0720851, 0.3397503,
]  # fmt: skip
PER_POSITION_MOMENTS = (0.44969271085789875, 0.22131956409828757)
VARIANCE_ALONE = [
    0.3632609, 0.4994074, 0.6693169, 0.6774334, 0.2701204, 0.1895078,
    0.4588909, 0.810967, 0.3994244, 0.3706864, 0.1885842, 0.3686068,
]  # fmt: skip
VARIANCE_ALONE_MOMENTS = (0.44909744816875363, 0.2195337427002662)


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in a fixed order from the name alone: biases small, norms about 1, matrices of unit gain."""
    index = np.arange(math.prod(shape), dtype=np.float64)
    share = np.abs(np.sin(index * 12.9898 + zlib.crc32(name.encode()) % 1009) * 43758.5453) % 1.0
    values = (2.0 * share - 1.0).reshape(shape)
    if name.endswith("bias"):
        values = 0.1 * values
    elif "norm" in name:
        values = 1.0 + 0.2 * values
    elif len(shape) == 2:
        values = values * math.sqrt(3.0 / shape[1])
    return torch.from_numpy(values).float()


def positions(side: int = SIDE, width: int = WIDTH) -> Tensor:
    omega = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    rows = [np.zeros(width)]
    for y in range(side):
        for x in range(side):
            rows.append(np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]))
    return torch.from_numpy(np.stack(rows)[None]).float()


def published() -> dict[str, Tensor]:
    """A decoder file in the original's layout."""
    shapes: dict[str, tuple[int, ...]] = {"trainable_cls_token": (1, 1, WIDTH)}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)})

    linear("decoder_embed", LATENT, WIDTH)
    for i in range(DEPTH):
        layer = f"decoder_layers.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.attention.{name}", WIDTH, WIDTH)
        linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        linear(f"{layer}.intermediate.dense", WIDTH, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, WIDTH)
        norm(f"{layer}.layernorm_before")
        norm(f"{layer}.layernorm_after")
    norm("decoder_norm")
    linear("decoder_pred", WIDTH, PATCH * PATCH * 3)
    return {"decoder_pos_embed": positions(), **{name: formula(name, shape) for name, shape in shapes.items()}}


def read(source: Path | str, **options: Any) -> Tokenizer:
    encoder = {"width": LATENT, "depth": 1, "heads": 2, "patch": PATCH}
    options = {"encoder": "tiny/vit@random", "encoder_options": encoder, "heads": HEADS, **options}
    return underpaint.create("importer", "rae", **options).read(str(source))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "model.pt", published())


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def unit_images(tokenizer: Tokenizer, latents: Tensor) -> np.ndarray:
    """What the original returns: in [0, 1] and in ImageNet's colours, where the tiny encoder's mean and std are 0.5."""
    with torch.no_grad():
        image = tokenizer.decoder(latents).image.double().numpy()
    return image * IMAGENET[1].reshape(3, 1, 1) + IMAGENET[0].reshape(3, 1, 1)


def compare(images: np.ndarray, values: list[float], moments: tuple[float, float]) -> None:
    np.testing.assert_allclose(images.flatten()[::1201], values, rtol=0, atol=1e-5)
    np.testing.assert_allclose((images.mean(), images.std()), moments, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- numbers


def test_images_are_the_originals(file: Path) -> None:
    tokenizer = read(file)
    latents = 2.0 * formula("latents", (2, LATENT, SIDE, SIDE))
    compare(unit_images(tokenizer, latents), PLAIN, PLAIN_MOMENTS)
    assert not tokenizer.training
    assert tokenizer.statistics is None
    assert (tokenizer.latent_channels, tokenizer.stride) == (LATENT, PATCH)


@pytest.mark.parametrize(
    ("side", "with_mean", "values", "moments"),
    [
        (1, True, PER_CHANNEL, PER_CHANNEL_MOMENTS),
        (SIDE, True, PER_POSITION, PER_POSITION_MOMENTS),
        (SIDE, False, VARIANCE_ALONE, VARIANCE_ALONE_MOMENTS),
    ],
)
def test_latents_are_restored_with_the_originals_statistics(
    tmp_path: Path, file: Path, side: int, with_mean: bool, values: list[float], moments: tuple[float, float]
) -> None:
    shape = (LATENT, side, side)
    statistics = {"var": formula("var", shape) + 1.5, **({"mean": formula("mean", shape)} if with_mean else {})}
    tokenizer = read(file, statistics=str(saved(tmp_path / "stat.pt", statistics)))
    assert tokenizer.statistics is not None
    assert tokenizer.statistics.grid == (None if side == 1 else (SIDE, SIDE))
    restored = tokenizer.restore(2.0 * formula("latents", (2, LATENT, SIDE, SIDE)))
    compare(unit_images(tokenizer, restored), values, moments)


def test_the_encoder_decides_the_colours_and_the_adapter_adds_nothing(file: Path) -> None:
    tokenizer = read(file)
    assert tokenizer.decoder.spec.options["mean"] == list(tokenizer.encoder.info.mean)
    assert tokenizer.decoder.spec.options["std"] == list(tokenizer.encoder.info.std)
    images = formula("images", (1, 3, 48, 48))
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(images), tokenizer.encoder(images).maps[-1])


def test_every_tensor_of_the_file_decides_the_result(file: Path) -> None:
    """No tensor is dropped or mixed up: each of them, changed, changes the weights, or is refused."""
    base = read(file).decoder.state_dict()
    for name in published():
        changed = published()
        changed[name] = changed[name] + 0.5
        path = saved(file.with_name("changed.pt"), changed)
        if name == "decoder_pos_embed":
            with pytest.raises(DataError, match="not RAE's fixed sines and cosines"):
                read(path)
            continue
        other = read(path).decoder.state_dict()
        assert any(not torch.equal(base[key], other[key]) for key in base), name


@pytest.mark.parametrize(
    ("wrap", "exact"),
    [
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, True),
        (lambda state: {"step": 3, "model": {}, "ema": training(state), "optimizer": {"lr": 0.1}}, True),
        (lambda state: {name: tensor.bfloat16() for name, tensor in state.items()}, False),
    ],
    ids=["prefixed", "training", "bfloat16"],
)
def test_other_forms_of_the_file_give_the_same_decoder(
    file: Path, wrap: Callable[[dict[str, Tensor]], Any], exact: bool
) -> None:
    first, second = read(file).decoder, read(saved(file.with_name("other.pt"), wrap(published()))).decoder
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.0 if exact else 2**-8, atol=0.0, msg=name)


def training(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder.encoder.layernorm": torch.ones(2), **{f"decoder.{n}": tensor for n, tensor in state.items()}}


def test_published_sizes_need_no_heads(tmp_path: Path) -> None:
    state = published()
    with pytest.raises(ConfigError, match="width 32, depth 2 and MLP width 48.*set the option 'heads'"):
        read(saved(tmp_path / "model.pt", state), heads=None)


# --------------------------------------------------------------------------------------------------- refusals


def change(**tensors: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = {**published(), **{name.replace("__", "."): t for name, t in tensors.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (change(decoder_norm__bias=None), r"1 tensors are missing \(decoder_norm.bias\)"),
        (change(decoder_layers__1__output__dense__bias=None), r"missing \(decoder_layers.1.output.dense.bias\)"),
        (change(surplus=torch.ones(1)), r"1 tensors are unknown \(surplus\)"),
        (change(mask_token=torch.ones(1)), "looks like weights of MAE pre-training"),
        ({"mean": torch.ones(1), "var": torch.ones(1)}, "give it with the option 'statistics'"),
        ({"blocks.0.attn.qkv.weight": torch.ones(1)}, "looks like a diffusion model"),
        (change(decoder_pred__weight=torch.ones(700, WIDTH)), r"shape of decoder_pred.weight \(700, 32\)"),
        (change(decoder_pos_embed=torch.zeros(1, 9, WIDTH)), r"shape of decoder_pos_embed \(1, 9, 32\)"),
        (change(decoder_pos_embed=torch.full((1, 10, WIDTH), math.nan)), "not RAE's fixed sines"),
        (change(decoder_norm__bias=torch.ones(31)), r"decoder_norm.bias \(31,\) for \(32,\)"),
        (
            change(decoder_layers__1__attention__attention__key__weight=torch.ones(WIDTH, 33)),
            r"attention.key.weight \(32, 33\) for \(32, 32\)",
        ),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(saved(tmp_path / "model.pt", state))


@pytest.mark.parametrize("encoder", [{"width": 32, "patch": PATCH}, {"width": LATENT, "patch": 8}])
def test_an_encoder_that_does_not_fit_is_refused(file: Path, encoder: dict[str, int]) -> None:
    found = f"{encoder['width']} at stride {encoder['patch']}"
    with pytest.raises(DataError, match=rf"64 channels at stride 16.*{found}.*option 'encoder'"):
        read(file, encoder_options={"depth": 1, "heads": 2, **encoder})


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"var": torch.ones(LATENT, 4, 4)}, r"var \(64, 4, 4\), and the decoder is for 64×3×3"),
        ({"variance": torch.ones(LATENT, 1, 1)}, "hold variance where 'var'"),
        ({"var": -torch.ones(LATENT, 1, 1)}, "no means and variances"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    tmp_path: Path, file: Path, statistics: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=re.compile(message)):
        read(file, statistics=str(saved(tmp_path / "stat.pt", statistics)))


def test_without_a_mean_it_is_zero(tmp_path: Path, file: Path) -> None:
    tokenizer = read(file, statistics=str(saved(tmp_path / "stat.pt", {"var": torch.full((LATENT, 1, 1), 4.0)})))
    assert tokenizer.statistics is not None
    assert tokenizer.statistics.mean == (0.0,) * LATENT
    assert tokenizer.statistics.std == pytest.approx((math.sqrt(4.0 + 1e-5),) * LATENT, rel=1e-12)


def test_the_default_encoder_is_the_papers() -> None:
    importer = underpaint.create("importer", "rae")
    assert importer.spec.options["encoder"] == "timm/vit_base_patch14_reg4_dinov2@lvd142m"
    assert importer.spec.options["encoder_options"] == {"norm": "plain", "antialias": False}
