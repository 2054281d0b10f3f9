"""Matrix products in 8 bits: by torchao where weights train, by frozen layers of our own where they do not."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from underpaint.errors import ConfigError
from underpaint.models.e4m3 import Fp8Linear

__all__ = ["check_fp8", "find_fp8", "freeze_fp8", "train_fp8"]

_MULTIPLE = 16
"""What the kernels want each side of a product to be a multiple of."""


@torch.no_grad()
def find_fp8(modules: Iterable[nn.Module], run: Callable[[], object], *, train: bool = False) -> set[nn.Linear]:
    """Return the linear layers whose sizes allow products in 8 bits for any batch.

    Their inputs and their outputs are multiples of 16, and a sample gives them more rows than one: layers that see one
    vector a sample, such as those that make modulations, stay in bf16.

    Args:
        modules: Where to look for layers, such as the blocks of a backbone.
        run: Runs the network they belong to on one sample.
        train: For training, whose gradients are sums over rows: these are multiples of 16 then too.

    Raises:
        ConfigError: No layer fits.
    """
    layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]
    fitting = {
        layer
        for layer, rows in _rows(layers, run).items()
        if layer.in_features % _MULTIPLE == 0
        and layer.out_features % _MULTIPLE == 0
        and (rows % _MULTIPLE == 0 if train else rows > 1)
    }
    if not fitting:
        sizes = "channels and tokens" if train else "channels"
        raise ConfigError(
            f"fp8 was asked for, and none of the {len(layers)} linear layers fits: {sizes} have to be multiples of "
            f"{_MULTIPLE}; use bf16."
        )
    return fitting


def freeze_fp8(modules: Iterable[nn.Module], layers: Collection[nn.Linear]) -> None:
    """Put layers that multiply in 8 bits in the place of `layers`; they cannot be trained, or made as they were."""
    made = {layer: Fp8Linear(layer) for layer in layers}
    for module in modules:
        for name, layer in list(module.named_modules(remove_duplicate=False)):
            if isinstance(layer, nn.Linear) and layer in made:
                module.set_submodule(name, made[layer])


def train_fp8(modules: Iterable[nn.Module], layers: Collection[nn.Linear], *, emulate: bool = False) -> None:
    """Let `layers` multiply in 8 bits, forward and backward; the modules change in place, the weights do not.

    Inputs, weights and gradients are rounded to float8 (e4m3), each row with a scale of its own that is found anew
    every time (formats: Micikevicius et al. 2022).

    Args:
        modules: Hold the layers.
        layers: From `find_fp8`.
        emulate: Round to float8 and multiply in bf16, for tests where there are no such products.

    Raises:
        ConfigError: torchao is not installed.
    """
    _check_library()
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    for module in modules:
        convert_to_float8_training(module, config=config, module_filter_fn=lambda layer, _: layer in layers)


def check_fp8(device: torch.device, *, train: bool = False) -> None:
    """Refuse a device without matrix products in 8 bits.

    Args:
        device: Where they are wanted.
        train: Whether it is for training.

    Raises:
        ConfigError: It has none; or torchao, which training needs, is not installed.
    """
    if train:
        _check_library()
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ConfigError(f"fp8 was asked for, and {name} has no matrix products in 8 bits; use bf16.")


def _check_library() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "Training in fp8 was asked for, and torchao is not installed; install it with: "
            "pip install 'underpaint[fp8]'."
        )


def _rows(layers: Iterable[nn.Linear], run: Callable[[], object]) -> dict[nn.Linear, int]:
    """Return how many rows each layer is given."""
    found: dict[nn.Linear, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        found[layer] = inputs[0].numel() // layer.in_features

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found
