"""``underpaint encode``, ``reconstruct``, ``sample``, ``evaluate`` and ``report``: the single steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
import yaml
from click.core import ParameterSource

from underpaint.cli.output import print_json, print_table
from underpaint.config.component import ComponentConfig
from underpaint.config.data import DataConfig, LatentsConfig
from underpaint.config.evaluation import EvaluationConfig
from underpaint.config.structure import structure
from underpaint.errors import ConfigError, DataError, UnderpaintError

if TYPE_CHECKING:
    import torch

    from underpaint.config.engine import Precision
    from underpaint.data.latents import LatentCache
    from underpaint.models.generator import Generator, SamplingSettings
    from underpaint.models.tokenizer import Tokenizer
    from underpaint.run.data import RunData

__all__ = ["encode", "evaluate", "reconstruct", "report", "sample"]

_data = click.option("--data", required=True, metavar="PATH", help="Images: a folder, Parquet or tar files.")
_size = click.option("--size", type=int, metavar="PX", help="Side of the square crop.  [default: as trained]")
_workers = click.option(
    "--workers",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Processes that read the images, if these are more than 1,000.",
)
_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_steps = click.option("--steps", type=click.IntRange(1), help="Solver steps for samples.  [default: the generator's]")
_guidance = click.option("--guidance", type=float, help="Guidance scale for samples.  [default: the generator's]")
_precision = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8"]),
    default="fp32",
    show_default=True,
    help="What the backbone computes in.",
)
_compile = click.option("--compile", "compiled", is_flag=True, help="Compile the backbone, for many samples.")
_batch = click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at once.")


_SHOWN = 64
"""Samples in the grid."""


def _given(*names: str) -> dict[str, str]:
    """Return those of the parameters that the command line sets, with the options that set them."""
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    return {name: options[name] for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _pick(device: str) -> torch.device:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for, but torch sees no GPU here; use 'auto' or 'cpu'.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _load_tokenizer(model: str) -> Tokenizer:
    from underpaint.models.build import load_tokenizer

    return load_tokenizer(model)


def _load_generator(model: str) -> Generator:
    from underpaint.models.folders import load_folder
    from underpaint.models.generator import Generator

    found = load_folder(model)
    if not isinstance(found, Generator):
        raise DataError(
            f"'{model}' holds a tokenizer, and samples need a generator; train one with 'underpaint train'."
        )
    return found


def _open(data: str, tokenizer: Tokenizer, size: int | None, workers: int = 0) -> RunData:
    from underpaint.data.sources import guess_dataset
    from underpaint.run.data import open_run_data

    trained = tokenizer.about.get("size")
    if size is None and trained is None:
        raise ConfigError("The tokenizer does not say at which size it was trained; give --size.")
    height, width = (size, size) if size is not None else tuple(trained or ())
    tokenizer.grid(height, width)
    guessed = guess_dataset(data)
    validation = guessed.validation or guessed.train
    config = DataConfig(train=guessed.train, validation=validation, size=(height, width), workers=workers)
    return open_run_data(config)


@click.command()
@click.argument("model")
@click.option("--data", metavar="PATH", help="Images: a folder, Parquet or tar files. Not needed to --check.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the latent cache.")
@_size
@click.option("--flip", is_flag=True, help="Store the latents of the flipped images too.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--store",
    type=click.Choice(["mode", "posterior", "sample"]),
    default="mode",
    show_default=True,
    help="What to store of an image's posterior.",
)
@click.option("--shard", type=click.IntRange(1), default=4096, show_default=True, help="Samples per shard.")
@_batch
@_workers
@click.option("--check", is_flag=True, help="Encode nothing: read the cache and say what is wrong with it.")
@click.option("--rebuild", is_flag=True, help="Delete the cache that is in --out first.")
@_device
@_json
def encode(
    model: str,
    data: str | None,
    out: Path,
    size: int | None,
    flip: bool,
    dtype: Any,
    store: Any,
    shard: int,
    batch: int,
    workers: int,
    check: bool,
    rebuild: bool,
    device: Any,
    as_json: bool,
) -> None:
    """Encode a data set into a latent cache, with exact statistics of each channel and each position.

    MODEL is a tokenizer, generator or run folder. Goes on where an interrupted call stopped; runs under torchrun too.
    """
    from underpaint.run.data import build_cache
    from underpaint.training.ranks import Ranks

    if check and (written := _given("shard", "batch", "rebuild")):
        raise ConfigError(f"--check encodes nothing; leave out {', '.join(written.values())}.")
    tokenizer = _load_tokenizer(model)
    images = None if data is None else _open(data, tokenizer, size, workers)
    if check:
        asked = {"flip": flip, "dtype": dtype, "store": store}
        wanted = {name: asked[name] for name in _given(*asked)}
        if size is not None:
            wanted |= {"height": size, "width": size}
        cache = _checked(out, tokenizer, images, wanted, as_json)
    elif images is None:
        raise ConfigError("There is nothing to encode; give the images with --data.")
    else:
        config = LatentsConfig(flip=flip, dtype=dtype, store=store, shard=shard, batch=batch)
        with Ranks(device) as ranks:
            cache = build_cache(out, tokenizer.to(ranks.device), images, config, ranks, rebuild=rebuild)
            if not ranks.is_main:
                return
    facts = {
        "folder": str(out),
        "samples": len(cache),
        "shape": list(cache.identity.shape),
        "tokenizer": cache.identity.tokenizer,
        "hash": cache.fingerprint,
        "mean": cache.mean.flatten().tolist(),
        "std": cache.std.flatten().tolist(),
        "verified": check,
    }
    if as_json:
        print_json(facts)
    else:
        shape = "×".join(map(str, cache.identity.shape))
        sound = "; files, identity, values and statistics are as they should be." if check else "."
        click.echo(f"{len(cache)} latents of {shape} in '{out}', hash {cache.fingerprint[:16]}{sound}")


def _checked(
    out: Path, tokenizer: Tokenizer, images: RunData | None, wanted: dict[str, Any], as_json: bool
) -> LatentCache:
    """Check a cache; exit with 1 if it is not of this tokenizer, of these images if there are any, and as `wanted`."""
    from underpaint.data.latent_check import check_cache
    from underpaint.data.latents import LatentCache

    wanted = {**wanted, "tokenizer": tokenizer.fingerprint()}
    if images is not None:
        height, width = images.config.height, images.config.width
        count = len(images.train_indices)
        wanted |= {"data": images.fingerprint(), "height": height, "width": width, "count": count}
    try:
        return check_cache(out, attrs.evolve(LatentCache(out).identity, **wanted))
    except DataError as error:
        if as_json:
            print_json({"folder": str(out), "verified": False, "problem": str(error)})
        else:
            click.echo(str(error), err=True)
        raise click.exceptions.Exit(1) from None


@click.command()
@click.argument("model")
@_data
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="PNG file: originals above reconstructions."
)
@click.option("--count", type=click.IntRange(1), default=16, show_default=True, help="Images.")
@_size
@_device
@_json
def reconstruct(model: str, data: str, out: Path, count: int, size: int | None, device: str, as_json: bool) -> None:
    """Encode and decode images, and write them beside their originals."""
    import numpy as np

    from underpaint.config.recipe import write_atomically
    from underpaint.report.pictures import contact_sheet

    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError(f"--out is '{out}'; the pictures become one PNG file, so name one, such as 'pictures.png'.")
    tokenizer = _load_tokenizer(model).to(_pick(device))
    numbers, shown = _reconstruction(tokenizer, _open(data, tokenizer, size), count, 32, count)
    columns = min(len(shown.images), 8)
    rows = []
    for start in range(0, len(shown.images), columns):
        for block in (shown.originals, shown.images):
            assert block is not None
            part = block[start : start + columns]
            rows.append(np.concatenate([part, np.full((columns - len(part), *part.shape[1:]), 255, np.uint8)]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, contact_sheet(np.concatenate(rows), columns))
    _show(numbers, as_json)
    click.echo(f"Originals above, reconstructions below: {out}", err=True)


def _reconstruction(tokenizer: Tokenizer, data: RunData, count: int, batch: int, show: int) -> Any:
    from underpaint.evaluation.measure import make_metrics, measure_reconstruction

    device = next(tokenizer.parameters()).device
    config = EvaluationConfig()
    images = data.validation_pass(count, batch)
    facts = {
        "data": data.validation.spec.name,
        "data_hash": data.fingerprint("validation"),
        "image_size": [data.config.height, data.config.width],
        "crop": "short side resized, centre",
    }
    return measure_reconstruction(
        tokenizer, images, make_metrics(config.reconstruction, device), facts=facts, show=show
    )


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for grid.png and samples.npz.")
@click.option("--count", type=click.IntRange(1), default=16, show_default=True, help="Images.")
@click.option("--labels", metavar="LIST", help="Class indices separated by commas, repeated as needed.")
@click.option("--text", multiple=True, help="Captions, for generators that take text.")
@_steps
@_guidance
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    help="Seed of the first image; the next counts on.",
)
@_batch
@_precision
@_compile
@_device
def sample(
    model: str,
    out: Path,
    count: int,
    labels: str | None,
    text: tuple[str, ...],
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch: int,
    precision: Precision,
    compiled: bool,
    device: str,
) -> None:
    """Draw images from a generator: a grid to look at, and all of them in one .npz (arr_0: N×H×W×3 uint8)."""
    import numpy as np
    import torch

    from underpaint.config.recipe import write_atomically
    from underpaint.data.transforms import to_uint8
    from underpaint.evaluation.sample_file import SampleFile
    from underpaint.report.pictures import contact_sheet

    _check_samples(out)
    generator = _load_generator(model).to(_pick(device))
    settings = _settings(generator, steps, guidance)
    inputs = _sample_inputs(generator, labels, text, count)
    generator.prepare(precision=precision, compile=compiled)
    out.mkdir(parents=True, exist_ok=True)
    shown: list[Any] = []
    with SampleFile(out / "samples.npz", count, inputs.numpy() if isinstance(inputs, torch.Tensor) else None) as file:
        for start in range(0, count, batch):
            end = min(start + batch, count)
            drawn = generator.sample(inputs[start:end], seeds=range(seed + start, seed + end), settings=settings)
            pixels = to_uint8(drawn)
            file.add(pixels)
            if start < _SHOWN:
                shown.append(pixels[: _SHOWN - start].cpu().numpy())
    write_atomically(out / "grid.png", contact_sheet(np.concatenate(shown), min(8, count)))
    click.echo(f"{count} images: {out / 'grid.png'} and {out / 'samples.npz'}")


def _check_samples(out: Path) -> None:
    """Refuse a place in which samples would replace something else than earlier samples.

    Raises:
        ConfigError: They would, or it is a file.
    """
    from underpaint.evaluation.sample_file import holds_samples

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is '{out}', a file; samples become two files, so name a folder.")
    grid, samples = out / "grid.png", out / "samples.npz"
    if samples.exists() and not holds_samples(samples):
        raise ConfigError(f"'{samples}' exists and was not written by 'underpaint sample'; choose another --out.")
    # A picture does not say where it comes from; the images beside it do.
    if grid.exists() and not samples.exists():
        raise ConfigError(
            f"'{grid}' exists without the samples.npz that 'underpaint sample' writes with it; choose another --out."
        )


def _settings(generator: Generator, steps: int | None, guidance: float | None) -> SamplingSettings:
    """Return the generator's own settings with what was asked for in their place."""
    settings = generator.settings
    if steps is not None:
        options = {**settings.sampler.options, "steps": steps}
        settings = attrs.evolve(settings, sampler=attrs.evolve(settings.sampler, options=options))
    if guidance is not None:
        if not 0.0 <= guidance < math.inf:
            raise ConfigError(f"--guidance is {guidance:g}; give a scale of 0 or more, 1 for no guidance.")
        settings = attrs.evolve(settings, guidance=attrs.evolve(settings.guidance, scale=guidance))
    return settings


def _sample_inputs(generator: Generator, labels: str | None, text: tuple[str, ...], count: int) -> Any:
    import torch

    if generator.conditioner.accepts == "text":
        if not text:
            raise ConfigError("This generator takes captions; give at least one with --text.")
        if labels is not None:
            raise ConfigError("This generator takes captions, not class labels; leave out --labels.")
        return [text[i % len(text)] for i in range(count)]
    if text:
        raise ConfigError("This generator takes class labels, not captions; use --labels.")
    classes = max(generator.labels, 1)
    if labels is None:
        return torch.arange(count) % classes
    try:
        chosen = [int(part) for part in labels.split(",")]
    except ValueError:
        raise ConfigError(f"--labels is '{labels}'; write class indices such as '1,7,23'.") from None
    wrong = [label for label in chosen if not 0 <= label < classes]
    if wrong:
        raise ConfigError(f"--labels has {wrong[0]}, and the generator's classes are 0 to {classes - 1}.")
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])


@click.command()
@click.argument("model")
@_data
@click.option("--count", type=click.IntRange(2), default=1000, show_default=True, help="Images per number.")
@click.option(
    "--metric",
    multiple=True,
    help="Distance between sets for samples, as in a recipe: '{name: frechet, encoder: tiny/vit}'; repeatable.",
)
@_steps
@_guidance
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True)
@_size
@_batch
@_workers
@_precision
@_compile
@_device
@click.option("--save", type=click.Path(path_type=Path), help="Write the numbers with their protocols to this file.")
@click.option("--compare", type=click.Path(path_type=Path, exists=True), help="Numbers of an earlier --save.")
@click.option("--force", is_flag=True, help="Compare numbers of different protocols all the same.")
@_json
def evaluate(
    model: str,
    data: str,
    count: int,
    metric: tuple[str, ...],
    steps: int | None,
    guidance: float | None,
    seed: int,
    size: int | None,
    batch: int,
    workers: int,
    precision: Precision,
    compiled: bool,
    device: str,
    save: Path | None,
    compare: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure a tokenizer's reconstructions, and a generator's samples, on held-out images."""
    from underpaint.evaluation.measure import make_metrics, measure_generation
    from underpaint.evaluation.protocol import read_numbers, write_numbers
    from underpaint.models.denoiser import Denoiser
    from underpaint.models.folders import load_folder
    from underpaint.models.generator import Generator

    if force and compare is None:
        raise ConfigError("--force is for --compare, which is not given; add it with a file, or leave out --force.")
    if save is not None and save.exists():
        try:
            read_numbers(save)
        except DataError:
            raise ConfigError(
                f"--save is '{save}', which exists and holds no numbers of an earlier --save; choose another file."
            ) from None
    earlier = None if compare is None else read_numbers(compare)
    metrics = make_metrics([structure(_parsed(text), ComponentConfig, "--metric") for text in metric], _pick(device))
    paired = next((metric.spec.name for metric in metrics if metric.paired), None)
    if paired is not None:
        raise ConfigError(
            f"--metric is '{paired}', which compares image by image and cannot measure samples; give a distance "
            "between sets, such as '{name: frechet, encoder: tiny/vit}'."
        )
    found = load_folder(model).to(_pick(device))
    if isinstance(found, Denoiser):
        raise DataError(
            f"'{model}' holds a diffusion model without its tokenizer; import it again with --tokenizer, and evaluate "
            "that."
        )
    generator = found if isinstance(found, Generator) else None
    _check_sampled(model, generator is not None)
    if generator is not None:
        generator.prepare(precision=precision, compile=compiled)
    tokenizer = found.tokenizer if isinstance(found, Generator) else found
    images = _open(data, tokenizer, size, workers)
    numbers, _ = _reconstruction(tokenizer, images, count, batch, 1)
    if generator is not None and metric:
        settings = _settings(generator, steps, guidance)
        config = EvaluationConfig(
            images=count, batch=batch, sampler=settings.sampler, guidance=settings.guidance, seed=seed
        )
        references = images.validation_pass(count, batch)
        facts = {"data": images.validation.spec.name, "data_hash": images.fingerprint("validation")}
        if generator.conditioner.accepts == "text":
            count = min(count, len(images.validation_indices))  # a sample for each caption
        more, _ = measure_generation(generator, references, metrics, config, count=count, facts=facts)
        numbers += more
    if save is not None:
        write_numbers(save, numbers)
    _show(numbers, as_json)
    if earlier is not None:
        _compare(numbers, earlier, force, as_json)


def _check_sampled(model: str, generates: bool) -> None:
    """Refuse options for samples where none are measured; say so where a generator's are not.

    Raises:
        ConfigError: There are such options.
    """
    given = _given("metric", "steps", "guidance", "seed", "precision", "compiled")
    options = ", ".join(given.values())
    if options and not generates:
        raise ConfigError(f"'{model}' holds a tokenizer, which draws no samples; leave out {options}.")
    if options and "metric" not in given:
        raise ConfigError(
            f"No distance between samples and images was asked for, which {options} would change; add one, such as "
            "--metric '{name: frechet, encoder: tiny/vit}'."
        )
    if generates and not options:
        click.echo("The generator's samples are not measured without a --metric.", err=True)


def _parsed(text: str) -> Any:
    """Read a component as recipes write it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"--metric is '{text}'; write a name, or name and options as '{{name: frechet, encoder: tiny/vit}}'."
        ) from None


def _compare(numbers: list[Any], earlier: list[Any], force: bool, as_json: bool) -> None:
    from underpaint.evaluation.protocol import compare as compared

    before = {number.name: number for number in earlier}
    shared = [number for number in numbers if number.name in before]
    if not shared:
        raise UnderpaintError("The file given to --compare holds no number of the same name.")
    rows = []
    for number in shared:
        old = before[number.name]
        difference = compared(number, old, force=force)
        rows.append([number.name, f"{old.value:.4f}", f"{number.value:.4f}", f"{difference:+.4f}"])
    # The JSON is all that stdout holds.
    print_table(rows, ["number", "before", "now", "difference"], err=as_json)


def _show(numbers: list[Any], as_json: bool) -> None:
    from underpaint.evaluation.protocol import format_table

    if as_json:
        print_json([{"name": n.name, "value": n.value, "id": n.id, "protocol": n.protocol} for n in numbers])
    else:
        click.echo(format_table(numbers))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write the report of a run folder again."""
    from underpaint.report.page import write_report
    from underpaint.run.folder import RunFolder

    RunFolder(run).require()
    click.echo(str(write_report(run)))
