"""Adaptive loss weights from gradient norms (Esser et al. 2021, VQGAN, eq. 7), with one backward pass of the model.

The losses that judge images are differentiated once, down to the images. From there to the decoder's last layer the way
is short, so the norms that the weights are made of cost next to nothing, and the weighted image gradients go through
the rest of the model in the ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from underpaint.config.losses import AdaptiveConfig
from underpaint.interfaces.decoder import Reconstruction

__all__ = ["Share", "balanced", "detached"]


@attrs.frozen(eq=False)
class Share:
    """What one loss adds to the total.

    Attributes:
        key: Name of the loss.
        value: Sum of its terms.
        weight: Its fixed weight.
        adaptive: Its adaptive weight, or None.
        judges_images: Whether `value` was computed from the detached reconstruction, and from nothing else that learns.
        is_reference: Whether adaptive weights compare with it.
    """

    key: str
    value: Tensor
    weight: float
    adaptive: AdaptiveConfig | None
    judges_images: bool
    is_reference: bool


def detached(reconstruction: Reconstruction | None) -> Reconstruction:
    """Return the images as the start of a new graph."""
    assert reconstruction is not None
    return Reconstruction(_start(reconstruction.image), tuple(_start(image) for image in reconstruction.pyramid))


def _start(image: Tensor) -> Tensor:
    # A view of the leaf: the FLOP counter hooks what modules are given, and autograd.grad refuses hooks on leaves.
    return image.detach().requires_grad_(True).view_as(image)


def balanced(
    shares: Sequence[Share],
    live: Reconstruction,
    copied: Reconstruction,
    layers: Mapping[str, nn.Parameter],
    average: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh the losses of a step.

    Args:
        shares: The losses.
        live: The reconstruction as the model made it.
        copied: Its copy, by `detached`, that image losses were computed from.
        layers: The weight that each part is measured at.
        average: Averages a gradient over the ranks, so that all of them use the same factor.

    Returns:
        The total, whose gradient is that of the weighted sum, and the factors by loss.
    """
    outputs = (live.image, *live.pyramid)
    inputs = (copied.image, *copied.pyramid)
    pictures = {share.key: _image_gradients(share.value, inputs) for share in shares if share.judges_images}
    reference = _sum([_scaled(pictures[share.key], share.weight) for share in shares if share.is_reference])

    def norm(gradient: Tensor) -> Tensor:
        result: Tensor = torch.linalg.vector_norm(average(gradient.detach().float()))
        return result

    def at_layer(gradients: Sequence[Tensor | None], layer: nn.Parameter) -> Tensor:
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        (found,) = torch.autograd.grad(
            [o for o, _ in pairs], layer, [g.to(o.dtype) for o, g in pairs], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(layer) if found is None else found

    # Losses outside their window are measured nowhere.
    places = dict.fromkeys(share.adaptive.at for share in shares if share.adaptive is not None)
    references = {at: norm(at_layer(reference, layers[at])) for at in places}
    factors: dict[str, Tensor] = {}
    total = live.image.new_zeros((), dtype=torch.float32)
    onward: list[Sequence[Tensor | None]] = []
    surrogate = total
    for share in shares:
        weight: Tensor | float = share.weight
        if share.adaptive is not None:
            layer = layers[share.adaptive.at]
            if share.judges_images:
                own = norm(at_layer(pictures[share.key], layer))
            else:
                own = norm(torch.autograd.grad(share.value, layer, retain_graph=True)[0])
            factor = (references[share.adaptive.at] / (own + share.adaptive.eps)).clamp(max=share.adaptive.limit)
            factors[share.key] = factor
            if share.adaptive.apply:
                weight = factor * share.weight
        total = total + weight * share.value.detach()
        if share.judges_images:
            onward.append(_scaled(pictures[share.key], weight))
        else:
            surrogate = surrogate + weight * share.value
    for output, gradient in zip(outputs, _sum(onward), strict=True):
        if gradient is not None:
            surrogate = surrogate + (output.float() * gradient.float()).sum()
    # The value of the total, with the gradient of the surrogate.
    return total + (surrogate - surrogate.detach()), factors


def _image_gradients(value: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(value, list(inputs), allow_unused=True)


def _scaled(gradients: Sequence[Tensor | None], weight: Tensor | float) -> Sequence[Tensor | None]:
    return [None if gradient is None else weight * gradient for gradient in gradients]


def _sum(groups: Sequence[Sequence[Tensor | None]]) -> Sequence[Tensor | None]:
    result = list(groups[0])
    for group in groups[1:]:
        result = [b if a is None else a if b is None else a + b for a, b in zip(result, group, strict=True)]
    return result
