"""What DeepSpeed sees of the outputs of modules, which in this framework are attrs objects as often as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import attrs
from torch import Tensor, nn

__all__ = ["Box", "Boxed", "close_outputs", "open_outputs"]


@attrs.frozen(eq=False)
class Box:
    """Hides the output of a forward from DeepSpeed."""

    content: Any


class Boxed(nn.Module):
    """The module as DeepSpeed gets it.

    DeepSpeed hooks every tensor that its own forward returns, and then takes any backward pass through one for a
    training step, also that of ``torch.autograd.grad`` for an adaptive loss weight; so it is given a box.

    Args:
        module: What is trained.
        context: Gives the context of each forward.
    """

    def __init__(self, module: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.module = module
        self._context = context

    def forward(self, *args: Any, **kwargs: Any) -> Box:
        """Call the module and box what it returns."""
        with self._context():
            return Box(self.module(*args, **kwargs))


class _Fields(dict[str, Any]):
    """The fields of an attrs object, as a mapping that DeepSpeed looks into and changes in place."""

    def __init__(self, kind: type, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.kind = kind


def _opened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if attrs.has(type(value)):
        names = (field.name for field in attrs.fields(type(value)))
        return _Fields(type(value), {name: _opened(getattr(value, name)) for name in names})
    if type(value) in (tuple, list):
        return type(value)(_opened(item) for item in value)
    if type(value) is dict:
        return {key: _opened(item) for key, item in value.items()}
    return value


def _closed(value: Any) -> Any:
    if isinstance(value, _Fields):
        made: Any = object.__new__(value.kind)
        for name, item in value.items():
            # Past validators and frozenness: these are the values that the object had.
            object.__setattr__(made, name, _closed(item))
        return made
    if type(value) in (tuple, list):
        return type(value)(_closed(item) for item in value)
    if type(value) is dict:
        return {key: _closed(item) for key, item in value.items()}
    return value


def _open_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
    return None if isinstance(output, Tensor) else _opened(output)


def _close_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
    return None if isinstance(output, Tensor) else _closed(output)


def open_outputs(modules: Iterable[nn.Module]) -> None:
    """Open attrs outputs for the forward hooks that are registered between this call and `close_outputs`.

    ZeRO 3 finds out from the tensors in a module's output when its weights are needed again in the backward pass.
    It does not find those in attrs objects, and fails on objects with slots.
    """
    for module in modules:
        module.register_forward_hook(_open_hook)


def close_outputs(modules: Iterable[nn.Module]) -> None:
    """Make attrs objects again of what `open_outputs` opened."""
    for module in modules:
        module.register_forward_hook(_close_hook)
