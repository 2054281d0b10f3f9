"""``underpaint import``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tests.plugins.test_ldm_import import filled as filled_ldm
from tests.plugins.test_ldm_import import ldm_keys
from tests.plugins.test_sit_import import filled, layout

import underpaint
from underpaint import ConfigError, DataError, NotFoundError
from underpaint.cli.importing import import_
from underpaint.cli.models import sample
from underpaint.models.denoiser import Denoiser
from underpaint.models.folders import save_denoiser
from underpaint.models.generator import Generator
from underpaint.models.tokenizer import Tokenizer


def call(*arguments: object) -> Result:
    return CliRunner().invoke(import_, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.save(filled_ldm(ldm_keys(widths=(32, 64), blocks=1)), tmp_path / "vae.pt")
    torch.save(filled(layout()), tmp_path / "sit.pt")
    return tmp_path


def test_tokenizer_and_diffusion_model_become_a_generator(files: Path) -> None:
    done = call("ldm", files / "vae.pt", files / "vae", "scale=0.5")
    assert done.exit_code == 0, done.output
    assert "tokenizer, 4 channels at stride 2" in done.output
    tokenizer = underpaint.load(files / "vae")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.statistics is not None
    assert tokenizer.statistics.std == (2.0,) * 4

    done = call("sit", files / "sit.pt", files / "sit", "heads=4")
    assert done.exit_code == 0, done.output
    alone = underpaint.load(files / "sit")
    assert isinstance(alone, Denoiser)
    assert alone.about["title"] == "Imported from sit"
    assert "  Read from 'sit.pt'." in done.output.splitlines()
    assert alone.guided_channels == 3

    done = call("sit", files / "sit.pt", files / "both", "heads=4", "--tokenizer", files / "vae")
    assert done.exit_code == 0, done.output
    generator = underpaint.load(files / "both")
    assert isinstance(generator, Generator)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.3])
    with torch.no_grad():
        condition = generator.conditioner(torch.tensor([2]))
        assert torch.equal(
            generator.backbone(x, t, condition).velocity,
            alone.backbone(x, t, alone.conditioner(torch.tensor([2]))).velocity,
        )
    assert generator.sample(torch.tensor([1]), seeds=[0]).shape == (1, 3, 16, 16)


def test_an_imported_generator_knows_its_labels_and_guides_as_its_authors_do(files: Path) -> None:
    assert call("ldm", files / "vae.pt", files / "vae", "scale=0.5").exit_code == 0
    done = call("sit", files / "sit.pt", files / "both", "heads=4", "--tokenizer", files / "vae")
    assert done.exit_code == 0, done.output
    generator = underpaint.load(files / "both")
    assert isinstance(generator, Generator)
    # The file has a table of 5 labels and the null label, and no names for them.
    assert (generator.labels, generator.classes) == (5, ())
    assert torch.cat([labels for labels, _ in generator.batches(10, 4, "balanced", 0)]).bincount().tolist() == [2] * 5
    assert torch.cat([labels for labels, _ in generator.batches(100, 50, "random", 0)]).unique().tolist() == [*range(5)]
    with pytest.raises(DataError, match="labels are 0 to 4"):
        generator.latents(torch.tensor([5]), seeds=[0])
    # SiT's sampler guides the first three channels (peers.md); the scale is for whoever samples.
    assert (generator.settings.guidance.channels, generator.settings.guidance.scale) == (3, 1.0)

    def drawn(*arguments: str) -> list[int]:
        command = [files / "both", "--out", files / "out", "--steps", "1", "--device", "cpu", *arguments]
        done = CliRunner().invoke(sample, [str(argument) for argument in command])
        assert done.exit_code == 0, done.output
        labels: list[int] = np.load(files / "out" / "samples.npz")["arr_1"].tolist()
        return labels

    assert drawn("--count", "7") == [0, 1, 2, 3, 4, 0, 1]
    assert drawn("--count", "3", "--labels", "4,2", "--guidance", "2") == [4, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("sit", "sit.pt", "vae.pt"), ConfigError, "exists already"),
        (("sitt", "sit.pt", "new"), NotFoundError, "Did you mean 'sit'"),
        (("sit", "absent.pt", "new"), DataError, "absent.pt"),
        (("sit", "vae.pt", "new", "heads=4"), DataError, "vae.pt"),
        (("sit", "sit.pt", "new", "head=4"), ConfigError, "heads"),
        (("ldm", "vae.pt", "new", "--tokenizer", "vae.pt"), ConfigError, "reads tokenizers"),
        (("sit", "sit.pt", "new", "heads=4", "--tokenizer", "absent"), NotFoundError, "absent"),
    ],
)
def test_mistakes_leave_nothing_behind(
    files: Path, arguments: tuple[str, ...], error: type[Exception], message: str
) -> None:
    before = sorted(files.iterdir())
    places = [files / a if a.endswith(".pt") or a in ("new", "absent") else a for a in arguments]
    done = call(*places)
    assert isinstance(done.exception, error), done.output
    assert message in str(done.exception)
    assert sorted(files.iterdir()) == before


def test_tokenizer_must_be_the_models_own(files: Path) -> None:
    torch.save(filled_ldm(ldm_keys(d=6, widths=(32, 64), blocks=1)), files / "six.pt")
    assert call("ldm", files / "six.pt", files / "six", "scale=0.5").exit_code == 0
    done = call("sit", files / "sit.pt", files / "both", "heads=4", "--tokenizer", files / "six")
    assert isinstance(done.exception, DataError)
    assert "takes latents of 4 channels" in str(done.exception)
    assert call("ldm", files / "vae.pt", files / "bare").exit_code == 0
    done = call("sit", files / "sit.pt", files / "both", "heads=4", "--tokenizer", files / "bare")
    assert "has no latent statistics" in str(done.exception)


def test_denoiser_without_conditioner_is_saved_and_is_no_generator(files: Path) -> None:
    backbone = underpaint.create(
        "backbone", "sit/S-2", width=32, depth=1, heads=2, latent_channels=4, grid=(4, 4), pooled_dim=32, token_dim=0
    )
    save_denoiser(Denoiser(backbone), files / "plain")
    again = underpaint.load(files / "plain")
    assert again.conditioner is None
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), backbone.parameters(), strict=True))
    with pytest.raises(DataError, match="without a tokenizer"):
        from underpaint.models.build import load_tokenizer

        load_tokenizer(str(files / "plain"))
