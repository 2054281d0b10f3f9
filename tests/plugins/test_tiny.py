"""The small vision transformer."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import underpaint
from underpaint import ConfigError, DataError, NotFoundError, testing


@testing.parametrize(plugin="tiny")
def test_conformance(case: testing.Case) -> None:
    case()


def make(name: str = "tiny/vit", **options: Any) -> Any:
    return underpaint.create("encoder", name, **options).eval()


def smooth_pictures(count: int, seed: int) -> Tensor:
    """Images with the 1/f spectrum of photographs, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft2(torch.randn(count, 3, 64, 64, generator=generator))
    radius = (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.rfftfreq(64)[None] ** 2).sqrt()
    images = torch.fft.irfft2(spectrum / radius.clamp_min(1 / 64), s=(64, 64))
    return (images / (2.5 * images.std())).clamp(-1, 1)


def test_parameters_as_counted_by_hand() -> None:
    width = 256
    stem = sum(16 * a * b + b for a, b in ((3, 64), (64, 128), (128, 256))) + 2 * (64 + 128)
    attention = 3 * (width * width + width) + width * width + width
    mlp = 2 * 4 * width * width + 4 * width + width
    norms = 2 * 2 * width
    wanted = stem + 6 * (attention + mlp + norms) + 2 * width
    assert sum(p.numel() for p in make().parameters()) == wanted


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (128, 128), (64, 96), (40, 8)])
def test_grid(size: tuple[int, int]) -> None:
    encoder = make(layers=(0, -1))
    features = encoder(torch.zeros(2, 3, *size))
    assert [m.shape for m in features.maps] == [(2, 256, size[0] // 8, size[1] // 8)] * 2
    assert features.pooled.shape == (2, 256)
    assert encoder.info.layers == (0, 5)


def test_block_equals_torchs_own_encoder_layer() -> None:
    block = make().blocks[2]
    layer = torch.nn.TransformerEncoderLayer(
        256, 4, 1024, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "attention_in.",
        "self_attn.out_proj.": "attention_out.",
        "linear1.": "mlp_in.",
        "linear2.": "mlp_out.",
        "norm1.": "attention_norm.",
        "norm2.": "mlp_norm.",
    }
    state = block.state_dict()
    layer.load_state_dict(
        {theirs + end: state[ours + end] for theirs, ours in names.items() for end in ("weight", "bias")}
    )
    tokens = torch.randn(2, 15, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(tokens), layer(tokens), rtol=1e-4, atol=1e-5)


def test_positions_mean_the_same_at_every_resolution() -> None:
    from underpaint_tiny.encoder import _positions

    device = torch.device("cpu")
    table = _positions(4, 6, 8, device).view(4, 6, 8)
    # Lowest frequency of the rows: sin(2π · row/4 · 1/2) at the cell's centre.
    assert table[1, 3, 0].item() == pytest.approx(math.sin(math.pi * 1.5 / 4), rel=1e-5)
    assert table[1, 3, 6].item() == pytest.approx(math.cos(math.pi * 3.5 / 6), rel=1e-5)
    # The centre of a cell of a 3×3 grid is the centre of the middle one of its 3×3 parts in a 9×9 grid.
    coarse, fine = _positions(3, 3, 8, device).view(3, 3, 8), _positions(9, 9, 8, device).view(9, 9, 8)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)


def test_random_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(1)
    first = make("tiny/vit@random")
    torch.manual_seed(2)
    second = make("tiny/vit@random")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.info.source == second.info.source
    assert "seed" in first.info.source


def test_blocks_after_the_deepest_layer_are_not_built() -> None:
    whole, cut = make(layers=(2, 5)), make(layers=(2,))
    assert len(cut.blocks) == 3
    images = smooth_pictures(2, 0)
    with torch.no_grad():
        assert torch.equal(cut(images).maps[0], whole(images).maps[0])


def test_shipped_weights_are_those_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from underpaint_tiny import shipped

    path = Path(shipped.__file__).with_name("weights") / "tiny-vit.safetensors"
    assert path.stat().st_size <= 12 * 2**20
    assert all(tensor.dtype == torch.bfloat16 for tensor in underpaint.load_weights(str(path)).values())
    assert shipped.CARD.source in make().info.source
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / path.name).write_bytes(damaged)
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path)
    shipped.read_shipped.cache_clear()
    with pytest.raises(DataError, match="damaged: their hash is"):
        make()
    shipped.read_shipped.cache_clear()


def test_shipped_weights_fit_their_own_sizes_only() -> None:
    with pytest.raises(DataError, match="tiny/vit@random"):
        make(width=128, heads=2)


def test_file_round_trip_and_wrong_files(tmp_path: Path) -> None:
    encoder = make("tiny/vit@random", depth=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    save_file(encoder.state_dict(), tmp_path / "a.safetensors")
    name = f"tiny/vit@file:{tmp_path / 'a.safetensors'}"
    again = make(name, depth=2)
    images = smooth_pictures(1, 0)
    assert torch.equal(again(images).maps[0], encoder(images).maps[0])
    assert again.info.source == f"file:{tmp_path / 'a.safetensors'}"
    with pytest.raises(DataError, match=r"blocks\.2"):
        make(name, depth=3)
    with pytest.raises(DataError, match=r"blocks\.1"):
        make(name, depth=1)
    with pytest.raises(DataError, match=r"stem\."):
        make(name, depth=2, patch=16)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        make(f"tiny/vit@file:{tmp_path / 'broken.safetensors'}")


def test_wrong_names_and_options() -> None:
    with pytest.raises(NotFoundError, match="tiny/vit@random"):
        make("tiny/vit@pretrained")
    with pytest.raises(ConfigError, match="use 0 to 5"):
        make(layers=(6,))
    with pytest.raises(ConfigError, match="none twice"):
        make(layers=(5, -1))
    with pytest.raises(ConfigError, match="multiple"):
        make(width=100, heads=3)
    with pytest.raises(ConfigError, match="power of 2"):
        make("tiny/vit@random", patch=6)


def test_config_imports_no_torch() -> None:
    program = """
import sys, underpaint
underpaint.registry().config("encoder", "tiny/vit", {"depth": 2})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
