"""Which modules of a stage are compiled, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["compile_modules", "units_of"]

# Of one function, by the shapes and modes that it meets: the blocks of a decoder share it at every resolution.
_VARIANTS = 64

# Blocks in a row from which on they are compiled one by one.
_ALIKE = 3


class _Conv2d(nn.Conv2d):
    """A convolution that no graph holds."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class _Linear(nn.Linear):
    """A linear layer that no graph holds."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


_OUTSIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _Conv2d, nn.Linear: _Linear}


def compile_modules(
    modules: Iterable[nn.Module], *, differentiated_again: bool, passed: Iterable[nn.Module] = ()
) -> None:
    """Compile modules in place; each becomes a graph of its own.

    Args:
        modules: None of them part of another.
        differentiated_again: Whether a graph goes backward more than once a step, as adaptive weights make it; its
            buffers must then outlive the first time.
        passed: Parts that a gradient goes through on its way to a layer before them, as an adaptive weight's at the
            adapter goes through the decoder. A graph would make the gradients of its own weights each time, which is
            half of the work; autograd makes those that are asked for. So their convolutions and linear layers are left
            out of the graphs.
    """
    for part in passed:
        for layer in part.modules():
            # Another class rather than another method: blocks that are alike still share their graphs.
            layer.__class__ = _OUTSIDE.get(type(layer), type(layer))
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    if differentiated_again:
        # Left alone otherwise, since it costs memory. It holds for the process: a run with one such stage keeps it.
        torch._functorch.config.donated_buffer = False
    for module in modules:
        # Sizes are few and fixed; dynamic shapes cost speed, and some kernels do not compile with them.
        module.compile(dynamic=False)


def units_of(part: nn.Module, apart: nn.Parameter | None = None) -> list[nn.Module]:
    """Return what of a part to compile.

    Blocks that are alike are units of their own: one graph serves them all, where a graph of the whole part takes as
    many times longer to make as there are blocks. The rest is in the largest submodules that are more than one
    operation.

    Args:
        part: Such as an encoder or a decoder.
        apart: A parameter that no unit may hold. A compiled graph goes backward as a whole: a gradient at a parameter
            inside of it, as adaptive weights take one of the last layer, would cost that of the whole unit.
    """
    units = list(_units(part, apart))
    return units if units or apart is not None else [part]


def _units(module: nn.Module, apart: nn.Parameter | None) -> Iterator[nn.Module]:
    holds = any(p is apart for p in module.parameters())
    if _blocks(module) and not holds:
        yield from module.children()
    # Lists are not called.
    elif holds or isinstance(module, nn.ModuleList | nn.ModuleDict) or any(map(_blocks, module.modules())):
        for child in module.children():
            yield from _units(child, apart)
    elif next(module.children(), None) is not None:
        yield module


def _blocks(module: nn.Module) -> bool:
    """Tell whether a module is a row of blocks of one class and shape, each of more than one operation."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < _ALIKE:
        return False
    kinds = {(type(child), *(p.shape for p in child.parameters())) for child in module}
    return len(kinds) == 1 and next(module[0].children(), None) is not None
