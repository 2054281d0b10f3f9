"""Checks of decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from underpaint.interfaces.decoder import Decoder, Reconstruction
from underpaint.testing.kit import NotApplicable, Subject, check, expect
from underpaint.testing.modules import PROBES, disturb, generator

__all__: list[str] = []


def _latents(subject: Subject, batch: int, grid: tuple[int, int] = (4, 4), seed: int = 0) -> Tensor:
    return torch.randn((batch, subject.context["latent_channels"], *grid), generator=generator(seed))


def _probe(subject: Subject, component: Decoder, batch: int) -> tuple[Any, ...]:
    return (_latents(subject, batch),)


PROBES["decoder"] = _probe


@check("decoder")
def image_as_declared(subject: Subject) -> None:
    """Images are stride times as large as the latents, also when these are not square."""
    decoder = subject.make()
    stride = subject.context["stride"]
    for rows, columns in ((4, 4), (4, 8), (8, 4)):
        with torch.no_grad():
            result = decoder(_latents(subject, 2, (rows, columns)))
        expect(isinstance(result, Reconstruction), f"forward returned {type(result).__name__}, not Reconstruction")
        shape, got = (2, 3, rows * stride, columns * stride), tuple(result.image.shape)
        expect(got == shape, f"latents of {rows}×{columns} at stride {stride} gave an image of {got}, not {shape}")


@check("decoder")
def pyramid_ascends(subject: Subject) -> None:
    """Coarser images have three channels, the image's proportions, and ascend in size below it."""
    decoder = subject.make()
    with torch.no_grad():
        result = decoder(_latents(subject, 2, (4, 8)))
    sizes = [tuple(item.shape) for item in (*result.pyramid, result.image)]
    expect(all(shape[:2] == (2, 3) for shape in sizes), f"the pyramid has shapes {sizes}, not all 2×3×h×w")
    expect(all(shape[3] == 2 * shape[2] for shape in sizes), f"the pyramid {sizes} changes the proportions")
    heights = [shape[2] for shape in sizes]
    expect(heights == sorted(set(heights)), f"the heights of the pyramid and the image are {heights}, not ascending")


@check("decoder")
def pixels_in_place(subject: Subject) -> None:
    """A change of one latent cell moves the pixels of that cell more than those of the opposite corner."""
    decoder = subject.make()
    disturb(decoder)
    stride = subject.context["stride"]
    latents = _latents(subject, 1)
    with torch.no_grad():
        before = decoder(latents).image
        for row, column in ((0, 0), (0, 3), (3, 0), (3, 3)):
            changed = latents.clone()
            changed[:, :, row, column] += 2.0
            moved = (decoder(changed).image - before).square().sum(1)[0]
            cells = moved.unfold(0, stride, stride).unfold(1, stride, stride).sum((2, 3))
            expect(
                bool(cells[row, column] > cells[3 - row, 3 - column]),
                f"latent cell {(row, column)} was changed, and the pixels of the opposite corner moved more",
            )


@check("decoder")
def last_layer_is_own(subject: Subject) -> None:
    """The weight for gradient ratios is a parameter of the decoder that the image depends on."""
    decoder = subject.make()
    last = decoder.last_layer()
    if last is None:
        raise NotApplicable("It declares no last layer.")
    expect(any(last is parameter for parameter in decoder.parameters()), "last_layer() is no parameter of it")
    disturb(decoder)
    (gradient,) = torch.autograd.grad(decoder(_latents(subject, 1)).image.square().sum(), last)
    expect(bool(gradient.abs().sum() > 0), "the image does not depend on last_layer()")
