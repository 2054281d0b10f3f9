"""Which models and weight tags of open_clip are served, and what a name after '@' means."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import open_clip
import timm

from underpaint import ConfigError, NotFoundError, is_location, suggest

__all__ = ["Weights", "names", "preprocessing", "resolve", "tags"]

# timm's modules whose models take any image size through `dynamic_img_size`.
_MODULES = ("vision_transformer", "deit", "eva")


@attrs.frozen
class Weights:
    """What to load.

    Attributes:
        kind: From the hub, from the user's file, or nothing.
        tag: open_clip's tag that describes them, or None where open_clip has none for the model.
        location: The user's file or URL; empty for the other kinds.
    """

    kind: Literal["hub", "file", "random"]
    tag: str | None
    location: str = ""


def names() -> list[str]:
    """Return the models of open_clip whose image tower is a vision transformer for any image size, sorted."""
    trunks = {model for module in _MODULES for model in timm.list_models(module=module)}
    return sorted(model for model in open_clip.list_models() if _is_served(model, trunks))


def _is_served(model: str, trunks: set[str]) -> bool:
    vision = open_clip.get_model_config(model)["vision_cfg"]
    if trunk := vision.get("timm_model_name"):
        return trunk in trunks
    return isinstance(vision.get("layers", 12), int)  # residual networks give one number per stage


def tags(model: str) -> list[str]:
    """Return the tags of a model's weights that open_clip knows on the hub."""
    known = open_clip.list_pretrained_tags_by_model(model)
    return [tag for tag in known if open_clip.get_pretrained_cfg(model, tag).get("hf_hub")]


def preprocessing(model: str, tag: str | None) -> dict[str, Any]:
    """Return mean, std and interpolation of a tag, of the model's first tag, or open_clip's defaults."""
    default = open_clip.transform.PreprocessCfg()
    tag = tag or next(iter(tags(model)), None)
    cfg = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    return {key: cfg.get(key, getattr(default, key)) for key in ("mean", "std", "interpolation")}


def resolve(model: str, weights: str | None, tag: str | None) -> Weights:
    """Say what a model name, the text after its '@' and the option `tag` mean together.

    Raises:
        NotFoundError: open_clip has no such model, or no such tag of it.
        ConfigError: It is unclear which weights are meant, or how a file's images were normalised.
    """
    if model not in (served := names()):
        if model in open_clip.list_models():
            raise NotFoundError(
                f"The image tower of open_clip's '{model}' is not a plain vision transformer, so it cannot be an "
                f"encoder here; the family serves {len(served)} others, such as 'open_clip/ViT-L-14@openai'."
            )
        raise NotFoundError(f"open_clip has no model '{model}'. {suggest(model, served)}")
    known = tags(model)
    for given in (weights, tag):
        if given is None or given == "random" or is_location(given) or given in known:
            continue
        raise NotFoundError(
            f"open_clip has no weights '{given}' for '{model}'. {suggest(given, known) or 'It has none.'} "
            "'@random' and '@file:PATH' work for every model."
        )
    if weights == "random":
        return Weights("random", tag or next(iter(known), None))
    if weights is not None and is_location(weights):
        if tag is None and len({str(preprocessing(model, one)) for one in known}) > 1:
            raise ConfigError(
                f"open_clip's weights of '{model}' were trained with different image means, so a file needs the "
                f"option 'tag' to say which it is like; tags: {', '.join(known)}."
            )
        # Without the user's word the model's own activation holds, as in open_clip; a tag might change it.
        return Weights("file", tag, weights)
    if weights is None and len(known) != 1:
        choices = ", ".join(f"'@{one}'" for one in [*known, "random", "file:PATH"])
        raise ConfigError(f"Which weights of 'open_clip/{model}' are meant? Add one of {choices}.")
    chosen = weights or known[0]
    if tag is not None and tag != chosen:
        raise ConfigError(
            f"The option 'tag' is '{tag}' but the weights are '{chosen}'; remove it: it is for '@file:PATH' and "
            "'@random'."
        )
    return Weights("hub", chosen)
