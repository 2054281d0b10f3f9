"""The text tower of a CLIP model of open_clip."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from underpaint import (
    Condition,
    ConfigError,
    DataError,
    NotFoundError,
    check_fit,
    hub_file,
    is_location,
    load_weights,
    suggest,
)
from underpaint_text.config import OpenClipTextConfig
from underpaint_text.frozen import Encode, FrozenText

__all__ = ["OpenClipText"]


class OpenClipText(FrozenText):
    """Tokens and pooled vector of a text tower of open_clip.

    The pooled vector is in the space that the towers share, not normalised. Texts longer than the tower's context
    (77 tokens for most, with start and end) are cut.

    Raises:
        NotFoundError: open_clip has no such model or tag.
        ConfigError: The text tower is no CLIP tower.
    """

    name = "text/open_clip"
    config: OpenClipTextConfig

    def __init__(self, config: OpenClipTextConfig, *, width: int, classes: int) -> None:
        super().__init__(config, config.model)
        cfg = _served(config.model)
        known = open_clip.list_pretrained_tags_by_model(config.model)
        if config.weights != "random" and not is_location(config.weights) and config.weights not in known:
            raise NotFoundError(
                f"open_clip has no weights '{config.weights}' for '{config.model}'. {suggest(config.weights, known)} "
                "'random' and 'file:PATH' work for every model."
            )
        self.token_dim = int(cfg["text_cfg"].get("width", 512))
        self.pooled_dim = int(cfg["embed_dim"])

    def open(self, device: torch.device) -> Encode:
        """Build the tower, read its weights, and return what encodes with it."""
        config = self.config
        tower = _tower(config).to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        text_cfg = _served(config.model)["text_cfg"]
        length = int(text_cfg.get("context_length", 77))
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **text_cfg.get("tokenizer_kwargs", {}))
        layer = tower.transformer.layers - (1 if config.layer == "last" else 2)

        def encode(texts: list[str]) -> tuple[Condition, list[int]]:
            ids: Tensor = tokenizer(texts)
            # The end token has the highest id, and padding comes after it.
            mask = torch.arange(length) <= ids.argmax(dim=1, keepdim=True)
            out = tower.forward_intermediates(
                ids.to(device), indices=[layer], normalize_intermediates=config.layer == "last", output_fmt="NLC"
            )
            lost = [max(len(tokenizer.encode(text)) + 2 - length, 0) for text in texts]
            (tokens,) = out["text_intermediates"]
            return Condition(tokens, mask if config.mask else None, out["text_features"]), lost

        return encode


def _served(model: str) -> dict[str, Any]:
    """Return open_clip's description of a model whose text tower is its own and reads CLIP's tokens."""
    cfg = open_clip.get_model_config(model)
    if cfg is None:
        raise NotFoundError(f"open_clip has no model '{model}'. {suggest(model, open_clip.list_models())}")
    text = cfg["text_cfg"]
    if "hf_model_name" in text or "hf_tokenizer_name" in text or "multimodal_cfg" in cfg or "siglip" in model.lower():
        raise ConfigError(
            f"The text tower of open_clip's '{model}' does not read CLIP's tokens; use another model, such as "
            "'ViT-L-14', or 'text/hf' with a folder of the encoder."
        )
    return dict(cfg)


def _tower(config: OpenClipTextConfig) -> Any:
    """Return the tower in evaluation mode, on the CPU."""
    cfg = _served(config.model)
    tag = {} if is_location(config.weights) else open_clip.get_pretrained_cfg(config.model, config.weights)
    quick_gelu = bool(cfg.get("quick_gelu") or (tag or {}).get("quick_gelu"))
    with torch.random.fork_rng(devices=[]):
        # Random weights are no part of a saved model either, so they have to be the same every time.
        torch.manual_seed(0)
        tower = open_clip.model._build_text_tower(cfg["embed_dim"], cfg["text_cfg"], quick_gelu)
    if config.weights != "random":
        at = config.weights if is_location(config.weights) else f"file:{_download(config.model, config.weights)}"
        _fill(tower, load_weights(at), config.model, at)
    return tower.eval().requires_grad_(False)


def _fill(tower: nn.Module, state: dict[str, Tensor], model: str, location: str) -> None:
    """Load the text tower out of a file of both towers; the image tower and the logits' scale are left out."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    inside = {key.removeprefix("text."): tensor for key, tensor in state.items() if key.startswith("text.")}
    found = inside or {
        key: tensor for key, tensor in state.items() if not key.startswith(("visual.", "logit_", "input_resolution"))
    }
    wanted = tower.state_dict()
    for key in {"context_length", "vocab_size", "attn_mask"} - wanted.keys():
        found.pop(key, None)
    check_fit(wanted, found, what=f"the text tower of open_clip's '{model}'", location=location)
    tower.load_state_dict(found)


def _download(model: str, tag: str) -> str:
    """Return the path of a tag's file in the local cache, fetched when it is not there."""
    repository, name = os.path.split(open_clip.get_pretrained_cfg(model, tag).get("hf_hub") or "")
    if not repository:
        raise DataError(f"The weights '{tag}' of open_clip's '{model}' are not on the hub; give 'file:PATH'.")
    name = str(Path(name).with_suffix(".safetensors")) if name else "open_clip_model.safetensors"
    return hub_file(
        repository,
        [name],
        what=f"The weights '{tag}' of open_clip's '{model}'",
        instead="set the conditioner's weights to 'file:PATH' or 'random'",
    )
