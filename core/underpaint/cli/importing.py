"""``underpaint import``: published weights of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from underpaint.errors import ConfigError, DataError, PluginError

if TYPE_CHECKING:
    from underpaint.models.denoiser import Denoiser
    from underpaint.models.generator import Generator

__all__ = ["import_"]


@click.command("import")
@click.argument("format_", metavar="FORMAT")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--tokenizer", metavar="FOLDER", help="Tokenizer that the latents come from: makes a diffusion model a generator."
)
def import_(format_: str, source: str, destination: Path, options: tuple[str, ...], tokenizer: str | None) -> None:
    """Read published weights and write them as a folder that underpaint loads.

    FORMAT is one of 'underpaint plugins list importer'; SOURCE a file, folder or URL in that project's layout;
    KEY=VALUE pairs are options of the importer. Every tensor of the source is mapped, or left out for a stated reason;
    time, sign and scale follow our conventions from then on.
    """
    if destination.exists():
        raise ConfigError(f"'{destination}' exists already; choose another place, or delete it first.")
    from underpaint.config.recipe import apply_overrides
    from underpaint.interfaces.importer import Importer
    from underpaint.models.denoiser import Denoiser
    from underpaint.models.folders import save_denoiser, save_generator, save_tokenizer
    from underpaint.models.tokenizer import Tokenizer
    from underpaint.registration.manager import manager

    importer = manager().create("importer", format_, **apply_overrides({}, options))
    assert isinstance(importer, Importer)
    model = importer.read(source)
    if isinstance(model, Denoiser) and not model.about:
        model.about = {"title": f"Imported from {format_}", "facts": [f"Read from '{Path(source).name}'."]}
    destination.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Tokenizer):
        if tokenizer is not None:
            raise ConfigError(f"'{format_}' reads tokenizers; leave --tokenizer out.")
        save_tokenizer(model, destination)
        what = f"tokenizer, {model.latent_channels} channels at stride {model.stride}"
    elif isinstance(model, Denoiser):
        if tokenizer is None:
            save_denoiser(model, destination)
            what = "diffusion model; with --tokenizer FOLDER it becomes a generator"
        else:
            save_generator(_joined(model, tokenizer, format_), destination)
            what = "generator"
    else:
        raise PluginError(
            f"The importer '{format_}' made a {type(model).__name__}; it must be a Tokenizer or a Denoiser."
        )
    click.echo(f"{destination}: {what} ({sum(p.numel() for p in model.parameters()):,} parameters)")
    for fact in model.about.get("facts", ()):
        click.echo(f"  {fact}")


def _joined(model: Denoiser, location: str, format_: str) -> Generator:
    from underpaint.config.diffusion import GuidanceConfig
    from underpaint.models.build import load_tokenizer
    from underpaint.models.generator import Generator, SamplingSettings

    tokenizer = load_tokenizer(location)
    context = model.backbone.spec.context
    if model.conditioner is None:
        raise ConfigError(
            f"'{format_}' reads a diffusion model without its text encoders, so it cannot become a generator here; "
            "leave --tokenizer out."
        )
    if context["latent_channels"] != tokenizer.latent_channels:
        raise DataError(
            f"The diffusion model takes latents of {context['latent_channels']} channels, and '{location}' gives "
            f"{tokenizer.latent_channels}; name the tokenizer that it was trained on."
        )
    if tokenizer.statistics is None:
        raise DataError(
            f"The tokenizer '{location}' has no latent statistics, which the diffusion model was trained with; "
            "'underpaint encode' computes them, or the importer has an option for them."
        )
    rows, columns = context["grid"]
    guided = model.guided_channels and min(model.guided_channels, tokenizer.latent_channels)
    return Generator(
        tokenizer,
        model.backbone,
        model.conditioner,
        grid=(rows, columns),
        settings=SamplingSettings(guidance=GuidanceConfig(channels=guided)),
        about=model.about,
    )
