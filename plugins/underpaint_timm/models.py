"""Which models and weight tags of timm are served, and what a name after '@' means."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import timm

from underpaint import ConfigError, NotFoundError, is_location, suggest

__all__ = ["Weights", "names", "resolve", "tags"]

# timm's modules whose models take any image size through `dynamic_img_size` and have `forward_intermediates`.
# Left out by nature: BEiT, relative-position and SAM models are bound to one grid, hybrids have no patches.
_MODULES = ("vision_transformer", "deit", "eva")


@attrs.frozen
class Weights:
    """What to load.

    Attributes:
        kind: From timm's hub, from the user's file, or nothing.
        tag: timm's tag that describes them, or None where timm has none for the model.
        location: The user's file or URL; empty for the other kinds.
    """

    kind: Literal["hub", "file", "random"]
    tag: str | None
    location: str = ""


def names() -> list[str]:
    """Return the models of timm that this family serves, sorted."""
    return sorted(model for module in _MODULES for model in timm.list_models(module=module))


def tags(model: str) -> list[str]:
    """Return the tags of a model's weights that timm has on the hub, its default first."""
    published = [name for name in timm.list_pretrained(f"{model}.*") if timm.get_pretrained_cfg(name).hf_hub_id]
    found = [name.partition(".")[2] for name in published]
    default = getattr(timm.get_pretrained_cfg(model), "tag", None)
    return sorted(found, key=lambda tag: tag != default)


def resolve(model: str, weights: str | None, tag: str | None) -> Weights:
    """Say what a model name, the text after its '@' and the option `tag` mean together.

    Raises:
        NotFoundError: timm has no such model, or no such tag of it.
        ConfigError: timm publishes no weights for the model, or it is unclear how a file's images were normalised.
    """
    if model not in (served := names()):
        raise NotFoundError(_no_model(model, served))
    known = tags(model)
    _check_tag(model, tag, known)
    if weights is not None and (weights == "random" or is_location(weights)):
        if weights == "random":
            return Weights("random", tag or next(iter(known), None))
        if tag is None and len({_normalisation(model, known_tag) for known_tag in known}) > 1:
            raise ConfigError(
                f"timm's weights of '{model}' were trained with different image means, so a file needs the option "
                f"'tag' to say which it is like; tags: {', '.join(known)}."
            )
        return Weights("file", tag or next(iter(known), None), weights)
    if not known:
        raise ConfigError(
            f"timm has no weights for '{model}' on the hub; write 'timm/{model}@random' or 'timm/{model}@file:PATH'."
        )
    _check_tag(model, weights, known)
    chosen = weights or known[0]
    if tag is not None and tag != chosen:
        raise ConfigError(
            f"The option 'tag' is '{tag}' but the weights are '{chosen}'; remove it: it is for '@file:PATH' and "
            "'@random'."
        )
    return Weights("hub", chosen)


def _check_tag(model: str, tag: str | None, known: list[str]) -> None:
    if tag is not None and tag not in known:
        raise NotFoundError(
            f"timm has no weights '{tag}' for '{model}'. {suggest(tag, known)} "
            f"'@random' and '@file:PATH' work for every model."
        )


def _normalisation(model: str, tag: str) -> tuple[Any, Any]:
    cfg = timm.get_pretrained_cfg(f"{model}.{tag}")
    return cfg.mean, cfg.std


def _no_model(model: str, served: list[str]) -> str:
    base, dot, tag = model.partition(".")
    if dot and base in served:
        return f"'{model}' is a model with its tag in timm's own spelling; write 'timm/{base}@{tag}'."
    if timm.is_model(model):
        return (
            f"timm's '{model}' is not a plain vision transformer for any image size, so it cannot be an encoder here; "
            f"the family serves {len(served)} others, such as 'timm/vit_base_patch14_dinov2'."
        )
    return f"timm has no model '{model}'. {suggest(model, served)}"
