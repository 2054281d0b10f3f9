"""Exported folders: complete, checked, replaced as a whole."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import underpaint
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.structure import structure
from underpaint.errors import DataError, NotFoundError, PluginError
from underpaint.models.build import build_generator_parts
from underpaint.models.folders import save_generator, save_tokenizer
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import LatentStatistics, Tokenizer


def make_tokenizer(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    encoder = underpaint.create("encoder", "tiny/vit@random", width=32, depth=1, heads=2)
    adapter = underpaint.create("adapter", "aligntok/mlp", in_channels=encoder.info.channels, latent_channels=4)
    decoder = underpaint.create(
        "decoder", "ldm/decoder", latent_channels=4, stride=8, base=8, blocks=1, multipliers=[1, 1, 1, 2]
    )
    statistics = LatentStatistics(mean=(0.1,) * 4, std=(2.0,) * 4, count=7, data="abc")
    return Tokenizer(encoder, adapter, decoder, statistics, {"title": "a test", "size": [32, 32]}).eval()


def make_generator() -> Generator:
    tokenizer = make_tokenizer()
    config = structure(
        {"backbone": {"name": "sit/S-1", "width": 32, "depth": 1, "heads": 2}, "conditioner": "labels", "steps": 1},
        DiffusionConfig,
        "diffusion",
    )
    backbone, conditioner = build_generator_parts(config, tokenizer, grid=(4, 6), classes=3, has_text=False, seed=0)
    return Generator(tokenizer, backbone, conditioner, grid=(4, 6), classes=("a", "b", "c")).eval()


def test_tokenizer_comes_back_whole(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save_tokenizer(tokenizer, tmp_path / "t")
    loaded = underpaint.load(tmp_path / "t")
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(tokenizer.reconstruct(images), loaded.reconstruct(images))
    assert loaded.statistics == tokenizer.statistics
    assert loaded.about == tokenizer.about
    assert loaded.encoder.info == tokenizer.encoder.info
    assert not loaded.training
    assert {p.name for p in (tmp_path / "t").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_statistics_of_each_position_come_back_from_beside_the_weights(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    values = tuple(0.1 * (1 + i) for i in range(4 * 2 * 3))
    tokenizer.statistics = LatentStatistics(mean=values, std=values[::-1], count=7, data="abc", grid=(2, 3))
    save_tokenizer(tokenizer, tmp_path / "t")
    plain = json.loads((tmp_path / "t" / "config.json").read_text())["latent"]["statistics"]
    assert plain == {"count": 7, "data": "abc", "grid": [2, 3]}
    loaded = underpaint.load(tmp_path / "t")
    assert loaded.statistics == tokenizer.statistics
    latents = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    expected = (latents - torch.tensor(values).view(4, 2, 3)) / torch.tensor(values[::-1]).view(4, 2, 3)
    torch.testing.assert_close(loaded.standardise(latents), expected)
    torch.testing.assert_close(loaded.restore(expected), latents)
    with pytest.raises(DataError, match="2×3 grid, and the latents are 3×2"):
        loaded.standardise(latents.mT)
    tensors = load_file(tmp_path / "t" / "model.safetensors")
    del tensors["statistics.std"]
    save_file(tensors, tmp_path / "t" / "model.safetensors")
    with pytest.raises(DataError, match="lacks the latent statistics"):
        underpaint.load(tmp_path / "t")


def test_generator_comes_back_whole(tmp_path: Path) -> None:
    generator = make_generator()
    with torch.no_grad():
        for parameter in generator.backbone.parameters():
            parameter.add_(0.02)
    save_generator(generator, tmp_path / "g")
    loaded = underpaint.load(tmp_path / "g")
    labels = torch.tensor([0, 2])
    assert torch.equal(generator.sample(labels), loaded.sample(labels))
    assert loaded.sample(labels).shape == (2, 3, 32, 48)
    assert loaded.classes == ("a", "b", "c")


def test_run_folder_loads_its_generator_or_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(), tmp_path / "tokenizer")
    assert isinstance(underpaint.load(tmp_path), Tokenizer)
    save_generator(make_generator(), tmp_path / "generator")
    assert isinstance(underpaint.load(tmp_path), Generator)


@pytest.mark.parametrize("text", ["[", "3", "", "stages: 3", "stages: [1]", "stages: [{}]", b"\xff\xfe"])
def test_a_damaged_recipe_of_an_unfinished_run_is_one_sentence(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"config\.yaml' is damaged and names no stages; name the tokenizer itself"):
        underpaint.load(tmp_path)


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(0), tmp_path / "t")
    save_tokenizer(make_tokenizer(1), tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert underpaint.load(tmp_path / "t").fingerprint() == make_tokenizer(1).fingerprint()


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(0), tmp_path / "t")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write on, as on a full disk. safetensors has an error of its own for that.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors") as caught:
            save_tokenizer(make_tokenizer(1), tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert underpaint.load(tmp_path / "t").fingerprint() == make_tokenizer(0).fingerprint()


def test_fingerprint_follows_what_decides_the_latents() -> None:
    one, other = make_tokenizer(0), make_tokenizer(0)
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1.0)
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        next(other.adapter.parameters()).add_(1e-3)
    assert one.fingerprint() != other.fingerprint()


def test_standardise_and_restore_undo_each_other() -> None:
    tokenizer = make_tokenizer()
    latents = torch.randn(2, 4, 3, 5)
    standard = tokenizer.standardise(latents)
    torch.testing.assert_close(standard, (latents - 0.1) / 2.0)
    torch.testing.assert_close(tokenizer.restore(standard), latents)
    tokenizer.statistics = None
    with pytest.raises(DataError, match="underpaint encode"):
        tokenizer.standardise(latents)


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        underpaint.load(tmp_path / "none")
    with pytest.raises(NotFoundError, match="has no config.json"):
        underpaint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="layout 99"):
        underpaint.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        underpaint.load(tmp_path)


def test_weights_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(), tmp_path / "t")
    path = tmp_path / "t" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("adapter"))

    save_file({**tensors, name: tensors[name] + 1.0}, path)
    with pytest.raises(DataError, match="fingerprint"):
        underpaint.load(tmp_path / "t")
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(DataError, match=f"'{name}'.*missing"):
        underpaint.load(tmp_path / "t")
    save_file({**tensors, "decoder.more": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"1 tensors, the first 'decoder\.more': none wanted, \(2,\) in the file"):
        underpaint.load(tmp_path / "t")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged"):
        underpaint.load(tmp_path / "t")
    path.unlink()
    with pytest.raises(DataError, match="incomplete"):
        underpaint.load(tmp_path / "t")


def test_a_missing_plugin_is_named_with_what_to_install(tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(), tmp_path / "t")
    path = tmp_path / "t" / "config.json"
    config = json.loads(path.read_text())
    config["components"]["encoder"] |= {
        "name": "gone/vit",
        "plugin": "gone",
        "distribution": "underpaint-gone 0.3.0",
    }
    path.write_text(json.dumps(config))
    with pytest.raises(PluginError, match=r"pip install '?underpaint-gone"):
        underpaint.load(tmp_path / "t")


def test_card_names_parts_and_licence(tmp_path: Path) -> None:
    save_tokenizer(make_tokenizer(), tmp_path / "t")
    card = (tmp_path / "t" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "`aligntok/mlp`" in card
    assert "Apache-2.0" in card
