"""The functions of the public surface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from underpaint.registration.catalogue import Catalogue
from underpaint.registration.manager import PluginRecord, manager

if TYPE_CHECKING:
    from underpaint.interfaces.adapter import Adapter
    from underpaint.interfaces.backbone import Backbone
    from underpaint.interfaces.component import Component
    from underpaint.interfaces.conditioner import Conditioner
    from underpaint.interfaces.dataset import Dataset
    from underpaint.interfaces.decoder import Decoder
    from underpaint.interfaces.encoder import Encoder
    from underpaint.interfaces.loss import Loss
    from underpaint.interfaces.metric import Metric
    from underpaint.interfaces.sampler import Sampler
    from underpaint.interfaces.tracker import Tracker

__all__ = ["create", "load", "plugins", "registry"]


@overload
def create(kind: Literal["encoder"], name: str, /, **options: Any) -> Encoder: ...
@overload
def create(kind: Literal["adapter"], name: str, /, **options: Any) -> Adapter: ...
@overload
def create(kind: Literal["decoder"], name: str, /, **options: Any) -> Decoder: ...
@overload
def create(kind: Literal["backbone"], name: str, /, **options: Any) -> Backbone: ...
@overload
def create(kind: Literal["conditioner"], name: str, /, **options: Any) -> Conditioner: ...
@overload
def create(kind: Literal["loss"], name: str, /, **options: Any) -> Loss: ...
@overload
def create(kind: Literal["metric"], name: str, /, **options: Any) -> Metric: ...
@overload
def create(kind: Literal["dataset"], name: str, /, **options: Any) -> Dataset: ...
@overload
def create(kind: Literal["sampler"], name: str, /, **options: Any) -> Sampler: ...
@overload
def create(kind: Literal["tracker"], name: str, /, **options: Any) -> Tracker: ...
@overload
def create(kind: str, name: str, /, **options: Any) -> Component: ...


def create(kind: str, name: str, /, **options: Any) -> Any:
    """Make a component from its registered name.

    Args:
        kind: encoder, adapter, decoder, backbone, conditioner, loss, metric, dataset, sampler or tracker.
        name: ``family/model[@weights]`` or an alias; ``underpaint plugins list KIND`` shows them.
        **options: Options of the component, and the context keywords of its kind (an adapter's
            ``in_channels`` and ``latent_channels``, a decoder's ``latent_channels`` and ``stride``, …).

    Raises:
        UnderpaintError: The name or an option is wrong, or what it needs is not installed.
    """
    return manager().create(kind, name, **options)


def registry() -> Catalogue:
    """Return the catalogue of everything that the installed plugins registered."""
    return manager().catalogue


def plugins() -> list[PluginRecord]:
    """Return what became of every plugin found: active, failed with its error, or off."""
    return list(manager().records)


def load(location: str | Path) -> Any:
    """Load an exported folder.

    Args:
        location: Folder (or fsspec URL of one) with ``config.json`` and ``model.safetensors``; a run folder
            gives its generator, or its tokenizer while it has no generator, or that of its last finished stage.

    Returns:
        A `Tokenizer`, a `Generator`, or a `Denoiser` for a diffusion model without tokenizer, in evaluation mode on the
        CPU.

    Raises:
        UnderpaintError: The folder is missing, damaged, or needs a plugin that is not installed.
    """
    from underpaint.models.folders import load_folder

    return load_folder(location)
