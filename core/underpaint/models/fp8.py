"""Matrix products in 8 bits, by torchao."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from underpaint.errors import ConfigError

__all__ = ["check_fp8", "use_fp8"]

_MULTIPLE = 16
"""What the kernels want each side of a product to be a multiple of."""


@torch.no_grad()
def use_fp8(modules: Iterable[nn.Module], run: Callable[[], object], *, emulate: bool = False) -> int:
    """Let linear layers multiply in 8 bits, forward and backward; the modules change in place, the weights do not.

    Inputs, weights and gradients are rounded to float8 (e4m3), each row with a scale of its own that is found anew
    every time (formats: Micikevicius et al. 2022). A layer is converted where sizes allow it for any batch: its inputs,
    its outputs, and the rows that one sample gives it are multiples of 16. So layers that see one vector a sample, such
    as those that make modulations, stay in bf16.

    Args:
        modules: Where to look for layers, such as the blocks of a backbone.
        run: Runs the network they belong to on one sample.
        emulate: Round to float8 and multiply in bf16, for tests where there are no such products.

    Returns:
        How many layers multiply in 8 bits.

    Raises:
        ConfigError: The device has no such products, torchao is not installed, or no layer fits.
    """
    chosen = list(modules)
    layers = [layer for module in chosen for layer in module.modules() if type(layer) is nn.Linear]
    if not emulate:
        check_fp8(layers[0].weight.device if layers else torch.device("cpu"))
    _check_library()
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    fitting = _fitting(layers, run)
    if not fitting:
        raise ConfigError(
            f"fp8 was asked for, and none of the {len(layers)} linear layers fits: channels and tokens have to be "
            f"multiples of {_MULTIPLE}; use bf16."
        )
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    for module in chosen:
        convert_to_float8_training(module, config=config, module_filter_fn=lambda layer, _: layer in fitting)
    return len(fitting)


def check_fp8(device: torch.device) -> None:
    """Refuse a device without matrix products in 8 bits.

    Raises:
        ConfigError: It has none, or torchao is not installed.
    """
    _check_library()
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ConfigError(f"fp8 was asked for, and {name} has no matrix products in 8 bits; use bf16.")


def _check_library() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "fp8 was asked for, and torchao is not installed; install it with: pip install 'underpaint[fp8]'."
        )


def _fitting(layers: list[nn.Linear], run: Callable[[], object]) -> set[nn.Linear]:
    rows: dict[nn.Linear, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        rows[layer] = inputs[0].numel() // layer.in_features

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer
        for layer, count in rows.items()
        if not any(size % _MULTIPLE for size in (count, layer.in_features, layer.out_features))
    }
