"""Which modules of a stage are compiled, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["compile_modules", "units_around"]

# Of one function, by the shapes and modes that it meets: the blocks of a decoder share it at every resolution.
_VARIANTS = 64


def compile_modules(modules: Iterable[nn.Module], *, differentiated_again: bool) -> None:
    """Compile modules in place; each becomes a graph of its own.

    Args:
        modules: None of them part of another.
        differentiated_again: Whether a graph goes backward more than once a step, as adaptive weights make it; its
            buffers must then outlive the first time.
    """
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    if differentiated_again:
        # Left alone otherwise, since it costs memory. It holds for the process: a run with one such stage keeps it.
        torch._functorch.config.donated_buffer = False
    for module in modules:
        # Sizes are few and fixed; dynamic shapes cost speed, and some kernels do not compile with them.
        module.compile(dynamic=False)


def units_around(part: nn.Module, layer: nn.Parameter | None) -> list[nn.Module]:
    """Return what of a part to compile so that the way from its output back to `layer` stays short.

    A compiled graph goes backward as a whole. With the layer inside of one, a gradient at the layer would cost that of
    the part. So this returns the largest submodules that do not hold the layer and are more than one operation; the
    part itself where there is no layer to spare.
    """
    return [part] if layer is None else list(_apart(part, layer))


def _apart(module: nn.Module, layer: nn.Parameter) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(p is layer for p in child.parameters()):
            yield from _apart(child, layer)
        elif next(child.children(), None) is not None:
            yield child
