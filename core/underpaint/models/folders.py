"""Saves and loads models as folders: ``config.json``, ``model.safetensors``, ``README.md``."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
import yaml
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from underpaint.config.component import ComponentConfig
from underpaint.config.structure import structure, unstructure
from underpaint.errors import DataError, NotFoundError
from underpaint.interfaces.component import ComponentSpec
from underpaint.interfaces.encoder import Encoder
from underpaint.models.denoiser import Denoiser
from underpaint.models.generator import Generator, SamplingSettings
from underpaint.models.tokenizer import LatentStatistics, Tokenizer
from underpaint.registration.manager import manager
from underpaint.weights import save_tensors

__all__ = [
    "FORMAT",
    "copy_generator",
    "copy_tokenizer",
    "load_folder",
    "save_denoiser",
    "save_generator",
    "save_tokenizer",
]

FORMAT = 1
"""Version of the folder layout."""

_MOMENTS = ("mean", "std")


# ---------------------------------------------------------------------------------------------- saving


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer to a folder, replacing what was there as a whole."""
    statistics, moments = _plain_statistics(tokenizer.statistics)
    config = {
        "format": FORMAT,
        "type": "tokenizer",
        "components": {name: _spec(getattr(tokenizer, name)) for name in ("encoder", "adapter", "decoder")},
        "latent": {
            "channels": tokenizer.latent_channels,
            "stride": tokenizer.stride,
            "fingerprint": tokenizer.fingerprint(),
            "statistics": statistics,
        },
        "about": tokenizer.about,
    }
    with _Replace(folder) as target:
        _write(target, config, {**tokenizer.state_dict(), **moments}, _card(config))


def save_generator(generator: Generator, folder: Path) -> None:
    """Write a generator, its tokenizer inside, to a folder, replacing what was there as a whole."""
    config = {
        "format": FORMAT,
        "type": "generator",
        "components": {name: _spec(getattr(generator, name)) for name in ("backbone", "conditioner")},
        "grid": list(generator.grid),
        "classes": list(generator.classes),
        "path": generator.path,
        "predicts": generator.predicts,
        "sampling": {
            "sampler": {"name": generator.settings.sampler.name, **generator.settings.sampler.options},
            "guidance": unstructure(generator.settings.guidance),
        },
        "about": generator.about,
    }
    own = {
        f"{part}.{name}": tensor
        for part in ("backbone", "conditioner")
        for name, tensor in getattr(generator, part).state_dict().items()
    }
    with _Replace(folder) as target:
        save_tokenizer(generator.tokenizer, target / "tokenizer")
        _write(target, config, own, _card(config))


def _plain_statistics(statistics: LatentStatistics | None) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return what ``config.json`` says of the statistics, and what goes beside the weights."""
    if statistics is None:
        return None, {}
    plain = dict(unstructure(statistics))
    if statistics.grid is None:
        return plain, {}
    # Hundreds of thousands of numbers would make the config unreadable.
    moments = {name: torch.tensor(plain.pop(name), dtype=torch.float64) for name in _MOMENTS}
    return plain, {f"statistics.{name}": tensor.view(-1, *statistics.grid) for name, tensor in moments.items()}


def save_denoiser(denoiser: Denoiser, folder: Path) -> None:
    """Write a diffusion model without tokenizer to a folder, replacing what was there as a whole."""
    parts = {"backbone": denoiser.backbone, "conditioner": denoiser.conditioner}
    config = {
        "format": FORMAT,
        "type": "denoiser",
        "components": {name: _spec(part) for name, part in parts.items() if part is not None},
        "guided_channels": denoiser.guided_channels,
        "about": denoiser.about,
    }
    with _Replace(folder) as target:
        _write(target, config, denoiser.state_dict(), _card(config))


class _Replace:
    """A folder written beside its place, then renamed into it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> Path:
        self._new.mkdir(parents=True)
        return self._new

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._new, ignore_errors=True)
            return
        old = self._folder.with_name(f".{self._folder.name}.{uuid.uuid4().hex}.old")
        if self._folder.exists():
            self._folder.rename(old)
        self._new.rename(self._folder)
        shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_tensors(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _spec(component: Any) -> dict[str, Any]:
    plain = dict(unstructure(component.spec))
    if isinstance(component, Encoder):
        plain["licence"] = component.info.licence
        plain["source"] = component.info.source
    return plain


def _card(config: Mapping[str, Any]) -> str:
    parts = config["components"]
    licences = sorted({part["licence"] for part in parts.values() if part.get("licence")})
    lines = ["---", "library_name: underpaint", f"tags: [{config['type']}, image]"]
    lines += ["---", "", f"# {config['about'].get('title', 'An underpaint ' + config['type'])}", ""]
    lines += [f"{line}\n" for line in config["about"].get("facts", ())]
    lines += ["| part | name | from |", "|---|---|---|"]
    lines += [f"| {kind} | `{part['name']}` | {part['distribution']} |" for kind, part in parts.items()]
    if licences:
        lines += ["", f"Licence of the encoder's weights: {'; '.join(licences)}."]
    lines += ["", "```python", "import underpaint", "", "model = underpaint.load('PATH_OF_THIS_FOLDER')", "```", ""]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- loading


def load_folder(location: str | Path) -> Tokenizer | Generator | Denoiser:
    """Load a tokenizer, generator or denoiser; see `underpaint.load`."""
    place = _Place(str(location))
    if not place.has("config.json"):
        for inner in ("generator", "tokenizer", *_stages(place)):
            if place.has(f"{inner}/config.json"):
                return load_folder(place.join(inner))
        what = "has no config.json" if place.exists() else "does not exist"
        raise NotFoundError(
            f"'{location}' {what}; give an exported tokenizer or generator folder, or a run folder that holds one."
        )
    config = place.read_json("config.json")
    if config.get("format") != FORMAT:
        raise DataError(
            f"'{location}' has layout {config.get('format')!r}, and this underpaint reads {FORMAT}; load it with the "
            "version that wrote it, or export it again from its run, if underpaint wrote it at all."
        )
    tensors = place.read_tensors("model.safetensors")
    if config.get("type") == "tokenizer":
        return _tokenizer(config, tensors, str(location))
    if config.get("type") == "generator":
        tokenizer = load_folder(place.join("tokenizer"))
        assert isinstance(tokenizer, Tokenizer)
        return _generator(config, tensors, tokenizer, str(location))
    if config.get("type") == "denoiser":
        parts = {name: _build(plain) for name, plain in config["components"].items()}
        denoiser = Denoiser(**parts, about=config["about"], guided_channels=config.get("guided_channels"))
        _load_state(denoiser, tensors, str(location))
        return denoiser.eval()
    raise DataError(
        f"'{location}' holds a {config.get('type')!r}, which is neither a tokenizer, a generator nor a denoiser."
    )


def _stages(place: _Place) -> list[str]:
    """Return where the stages of an unfinished run put their tokenizers, the last first."""
    if not place.has("config.yaml"):
        return []
    try:
        recipe = yaml.safe_load(place.read_bytes("config.yaml"))
        names = [stage["name"] for stage in recipe.get("stages", [])]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise DataError(
            f"'{place.join('config.yaml')}' is damaged and names no stages; name the tokenizer itself, such as "
            f"'{place.join('stages/NAME/tokenizer')}'."
        ) from None
    return [f"stages/{name}/tokenizer" for name in reversed(names)]


class _Place:
    """A local folder or an fsspec URL of one."""

    def __init__(self, location: str) -> None:
        self._location = location.rstrip("/")
        self._system, self._path = fsspec.core.url_to_fs(self._location)

    def join(self, inner: str) -> str:
        return f"{self._location}/{inner}"

    def exists(self) -> bool:
        return bool(self._system.exists(self._path))

    def has(self, inner: str) -> bool:
        return bool(self._system.isfile(f"{self._path}/{inner}"))

    def read_bytes(self, inner: str) -> bytes:
        try:
            data = self._system.cat_file(f"{self._path}/{inner}")
        except FileNotFoundError:
            raise DataError(f"'{self._location}' lacks {inner}; the folder is incomplete.") from None
        except OSError as error:
            raise DataError(f"'{self.join(inner)}' cannot be read: {error}.") from error
        assert isinstance(data, bytes)
        return data

    def read_json(self, inner: str) -> dict[str, Any]:
        try:
            value = json.loads(self.read_bytes(inner))
        except ValueError as error:
            raise DataError(f"'{self.join(inner)}' is damaged: {error}.") from error
        if not isinstance(value, dict):
            raise DataError(f"'{self.join(inner)}' is damaged: it holds no mapping.")
        return value

    def read_tensors(self, inner: str) -> dict[str, Tensor]:
        try:
            return dict(load_tensors(self.read_bytes(inner)))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"'{self.join(inner)}' is damaged: {error}.") from error


def _build(plain: Mapping[str, Any]) -> Any:
    """Make a component again from its saved spec, without its initial weights."""
    fields = {key: value for key, value in plain.items() if key not in ("licence", "source")}
    return manager().create_from_spec(structure(fields, ComponentSpec, "components"))


def _tokenizer(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Tokenizer:
    parts = {name: _build(config["components"][name]) for name in ("encoder", "adapter", "decoder")}
    latent = config["latent"]
    state, plain = dict(tensors), latent["statistics"]
    if plain and plain.get("grid"):
        beside = {name: state.pop(f"statistics.{name}", None) for name in _MOMENTS}
        if None in beside.values():
            raise DataError(f"'{where}' lacks the latent statistics that its config.json speaks of; it is incomplete.")
        plain = {**plain, **{name: tensor.flatten().tolist() for name, tensor in beside.items() if tensor is not None}}
    statistics = plain and structure(plain, LatentStatistics, "latent.statistics")
    tokenizer = Tokenizer(**parts, statistics=statistics, about=config["about"])
    _load_state(tokenizer, state, where)
    if tokenizer.fingerprint() != latent["fingerprint"]:
        raise DataError(
            f"The weights in '{where}' do not give the fingerprint {latent['fingerprint']} of its config.json; "
            "the files do not belong together."
        )
    return tokenizer.eval()


def _generator(config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer, where: str) -> Generator:
    sampling = config["sampling"]
    generator = Generator(
        tokenizer,
        _build(config["components"]["backbone"]),
        _build(config["components"]["conditioner"]),
        grid=(config["grid"][0], config["grid"][1]),
        classes=config["classes"],
        path=config.get("path", "linear"),
        predicts=config.get("predicts", "velocity"),
        settings=SamplingSettings(
            sampler=structure(sampling["sampler"], ComponentConfig, "sampling.sampler"),
            guidance=structure(sampling["guidance"], type(SamplingSettings().guidance), "sampling.guidance"),
        ),
        about=config["about"],
    )
    own = nn.ModuleDict({"backbone": generator.backbone, "conditioner": generator.conditioner})
    _load_state(own, tensors, where)
    return generator.eval()


def copy_tokenizer(tokenizer: Tokenizer, state: Mapping[str, Tensor]) -> Tokenizer:
    """Return a second tokenizer of the same make on the CPU, with these weights.

    Args:
        tokenizer: What to copy; its own weights are not used.
        state: All tensors of ``tokenizer.state_dict()``.
    """
    parts = {name: _build(_spec(getattr(tokenizer, name))) for name in ("encoder", "adapter", "decoder")}
    copy = Tokenizer(**parts, statistics=tokenizer.statistics, about=tokenizer.about)
    _load_state(copy, state, "the engine")
    return copy.eval()


def copy_generator(generator: Generator, state: Mapping[str, Tensor]) -> Generator:
    """Return a second generator on the CPU that shares the tokenizer, with these weights.

    Args:
        generator: What to copy; the weights of its backbone and conditioner are not used.
        state: Tensors ``backbone.*`` and ``conditioner.*``.
    """
    copy = Generator(
        generator.tokenizer,
        _build(_spec(generator.backbone)),
        _build(_spec(generator.conditioner)),
        grid=generator.grid,
        classes=generator.classes,
        path=generator.path,
        predicts=generator.predicts,
        settings=generator.settings,
        about=generator.about,
    )
    _load_state(nn.ModuleDict({"backbone": copy.backbone, "conditioner": copy.conditioner}), state, "the engine")
    return copy.eval()


def _load_state(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        wrong = [name for name in sorted(wanted.keys() | given.keys()) if wanted.get(name) != given.get(name)]
        first = wrong[0]
        raise DataError(
            f"The weights in '{where}' do not fit its components in {len(wrong)} tensors, the first '{first}': "
            f"{wanted.get(first, 'none')} wanted, {given.get(first, 'missing')} in the file."
        )
    with torch.no_grad():
        module.load_state_dict(dict(tensors))
