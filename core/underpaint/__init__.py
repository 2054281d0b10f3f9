"""underpaint: pretrained vision encoders as image tokenizers for latent diffusion.

Everything public is a name of this module, or of `underpaint.testing`. Names are imported when they are
first used, so that ``import underpaint`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from underpaint.api import create, load, plugins, registry
    from underpaint.data.images import decode_image, short_side
    from underpaint.diffusion.times import ddpm_fractions
    from underpaint.errors import (
        BrokenImageError,
        ConfigError,
        DataError,
        NotFoundError,
        PluginError,
        UnderpaintError,
        UnreachableError,
        suggest,
    )
    from underpaint.hookspecs import API_VERSION, hookimpl
    from underpaint.hub import hub_file
    from underpaint.interfaces.adapter import Adapter, Posterior
    from underpaint.interfaces.backbone import Backbone, Prediction
    from underpaint.interfaces.component import Component, ComponentSpec
    from underpaint.interfaces.conditioner import Condition, Conditioner
    from underpaint.interfaces.dataset import Dataset, Sample
    from underpaint.interfaces.decoder import Decoder, Reconstruction
    from underpaint.interfaces.encoder import Encoder, EncoderInfo, Features
    from underpaint.interfaces.importer import Importer
    from underpaint.interfaces.loss import AdversarialLoss, Loss, StepSizes, StepTensors
    from underpaint.interfaces.metric import Metric
    from underpaint.interfaces.sampler import FreshNoise, Sampler, VarianceField, VelocityField
    from underpaint.interfaces.tracker import Tracker
    from underpaint.models.denoiser import Denoiser
    from underpaint.models.e4m3 import swiglu_linear
    from underpaint.models.norms import GroupNorm
    from underpaint.models.tokenizer import LatentStatistics, Tokenizer
    from underpaint.registration.registrar import RecipeRegistrar, Registrar
    from underpaint.weights import check_fit, is_location, load_weights, tensor_hash

_HOME = {
    "API_VERSION": "hookspecs",
    "Adapter": "interfaces.adapter",
    "AdversarialLoss": "interfaces.loss",
    "Backbone": "interfaces.backbone",
    "BrokenImageError": "errors",
    "Component": "interfaces.component",
    "ComponentSpec": "interfaces.component",
    "Condition": "interfaces.conditioner",
    "Conditioner": "interfaces.conditioner",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dataset": "interfaces.dataset",
    "Decoder": "interfaces.decoder",
    "Denoiser": "models.denoiser",
    "Encoder": "interfaces.encoder",
    "EncoderInfo": "interfaces.encoder",
    "Features": "interfaces.encoder",
    "FreshNoise": "interfaces.sampler",
    "GroupNorm": "models.norms",
    "Importer": "interfaces.importer",
    "LatentStatistics": "models.tokenizer",
    "Loss": "interfaces.loss",
    "Metric": "interfaces.metric",
    "NotFoundError": "errors",
    "PluginError": "errors",
    "Posterior": "interfaces.adapter",
    "Prediction": "interfaces.backbone",
    "RecipeRegistrar": "registration.registrar",
    "Reconstruction": "interfaces.decoder",
    "Registrar": "registration.registrar",
    "Sample": "interfaces.dataset",
    "Sampler": "interfaces.sampler",
    "StepSizes": "interfaces.loss",
    "StepTensors": "interfaces.loss",
    "Tokenizer": "models.tokenizer",
    "Tracker": "interfaces.tracker",
    "UnderpaintError": "errors",
    "UnreachableError": "errors",
    "VarianceField": "interfaces.sampler",
    "VelocityField": "interfaces.sampler",
    "check_fit": "weights",
    "create": "api",
    "ddpm_fractions": "diffusion.times",
    "decode_image": "data.images",
    "hookimpl": "hookspecs",
    "hub_file": "hub",
    "is_location": "weights",
    "load": "api",
    "load_weights": "weights",
    "plugins": "api",
    "registry": "api",
    "short_side": "data.images",
    "suggest": "errors",
    "swiglu_linear": "models.e4m3",
    "tensor_hash": "weights",
}

__all__ = [
    "API_VERSION",
    "Adapter",
    "AdversarialLoss",
    "Backbone",
    "BrokenImageError",
    "Component",
    "ComponentSpec",
    "Condition",
    "Conditioner",
    "ConfigError",
    "DataError",
    "Dataset",
    "Decoder",
    "Denoiser",
    "Encoder",
    "EncoderInfo",
    "Features",
    "FreshNoise",
    "GroupNorm",
    "Importer",
    "LatentStatistics",
    "Loss",
    "Metric",
    "NotFoundError",
    "PluginError",
    "Posterior",
    "Prediction",
    "RecipeRegistrar",
    "Reconstruction",
    "Registrar",
    "Sample",
    "Sampler",
    "StepSizes",
    "StepTensors",
    "Tokenizer",
    "Tracker",
    "UnderpaintError",
    "UnreachableError",
    "VarianceField",
    "VelocityField",
    "check_fit",
    "create",
    "ddpm_fractions",
    "decode_image",
    "hookimpl",
    "hub_file",
    "is_location",
    "load",
    "load_weights",
    "plugins",
    "registry",
    "short_side",
    "suggest",
    "swiglu_linear",
    "tensor_hash",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'underpaint' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"underpaint.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
