"""Checks of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from underpaint.errors import DataError
from underpaint.interfaces.encoder import Encoder, Features
from underpaint.testing.kit import Subject, check, expect
from underpaint.testing.modules import PROBES, disturb, generator

__all__: list[str] = []


def _sizes(subject: Subject, encoder: Encoder) -> list[tuple[int, int]]:
    """Three image sizes, the last one oblong where the encoder allows it."""
    stride = encoder.info.stride
    height, width = subject.size or (2 * stride, 2 * stride)
    last = (height, width + stride) if encoder.info.non_square else (height + stride, width + stride)
    return [(height, width), (2 * height, 2 * width), last]


def _images(size: tuple[int, int], batch: int, seed: int = 0) -> Tensor:
    return torch.rand((batch, 3, *size), generator=generator(seed)) * 2 - 1


def _probe(subject: Subject, component: Encoder, batch: int) -> tuple[Any, ...]:
    return (_images(_sizes(subject, component)[0], batch),)


PROBES["encoder"] = _probe


@check("encoder")
def output_as_declared(subject: Subject) -> None:
    """Maps have the declared number, channels and grid at three image sizes, and no token too many."""
    encoder = subject.make()
    info = encoder.info
    expect(len(info.channels) == len(info.layers), f"info declares channels {info.channels} for layers {info.layers}")
    for size in _sizes(subject, encoder):
        with torch.no_grad():
            features = encoder(_images(size, 2))
        expect(isinstance(features, Features), f"forward returned {type(features).__name__}, not Features")
        grid = encoder.grid(*size)
        cells = (size[0] // info.stride, size[1] // info.stride)
        expect(grid == cells, f"grid{size} is {grid}; a stride of {info.stride} gives {cells}")
        shapes = [tuple(item.shape) for item in features.maps]
        wanted = [(2, channels, *grid) for channels in info.channels]
        expect(shapes == wanted, f"images of {size[0]}×{size[1]} px gave maps of {shapes}; info declares {wanted}")
        pooled = features.pooled
        expect(pooled is None or (pooled.ndim == 2 and len(pooled) == 2), "pooled is not of shape B×C")
        if features.class_tokens is not None:
            tokens = [tuple(item.shape) for item in features.class_tokens]
            beside = [(2, channels) for channels in info.channels]
            expect(tokens == beside, f"class_tokens have the shapes {tokens}; one for each map would have {beside}")


@check("encoder")
def refuses_other_sizes(subject: Subject) -> None:
    """An image that does not divide into cells is refused with a DataError by ``grid``."""
    encoder = subject.make()
    stride = encoder.info.stride
    if stride == 1:
        return
    try:
        encoder.grid(2 * stride + 1, 2 * stride)
    except DataError:
        return
    raise AssertionError(f"grid accepted a height that is no multiple of the stride {stride}")


@check("encoder")
def cells_in_place(subject: Subject) -> None:
    """A change within one cell of the image moves that cell of the map most: no flip, shift or class token."""
    # At initialisation and in the shallowest map a cell depends on its own pixels more than on any others.
    encoder = subject.make()
    stride = encoder.info.stride
    size = (3 * stride, 4 * stride) if encoder.info.non_square else (4 * stride, 4 * stride)
    rows, columns = encoder.grid(*size)
    images = _images(size, 1) * 0.1
    with torch.no_grad():
        before = encoder(images).maps[0]
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (1, 2)):
            changed = images.clone()
            area = changed[:, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
            area.copy_(_images((stride, stride), 1, seed=7))
            moved = (encoder(changed).maps[0] - before).square().sum(1)[0]
            place = divmod(int(moved.argmax()), columns)
            expect(
                place == (row, column),
                f"the pixels of cell {(row, column)} were changed, and cell {place} of the map moved most",
            )


@check("encoder")
def normalises_once(subject: Subject) -> None:
    """The network sees (image − mean) / std with the declared constants, applied exactly once."""
    # An image of one colour stays one after any resize, crop or cutting into patches: whatever receives its
    # pixels receives three numbers and no others. The last module that does, before the first that receives
    # features, has the pixels as the network computes with them.
    encoder = subject.make()
    size = _sizes(subject, encoder)[0]
    for colour in ((0.2, 0.5, 0.9), (0.7, 0.1, 0.4)):
        wanted = [(c - m) / s for c, m, s in zip(colour, encoder.info.mean, encoder.info.std, strict=True)]
        image = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, *size) * 2 - 1
        seen = _pixels_seen(encoder, image)
        expect(
            seen is not None,
            "no module with parameters receives the pixels of the image, so this cannot be checked; "
            "declare the failure with the reason",
        )
        assert seen is not None
        gap = max(abs(a - b) for a, b in zip(sorted(seen), sorted(wanted), strict=True))
        expect(
            gap < 1e-3,
            f"the colour {colour} reaches the network as {[round(v, 3) for v in seen]}; the declared mean and std, "
            f"applied once, give {[round(v, 3) for v in sorted(wanted)]}",
        )


def _pixels_seen(encoder: nn.Module, image: Tensor) -> list[float] | None:
    calls: list[list[float] | None] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        given = [item for item in arguments if isinstance(item, Tensor)]
        calls.append(_three_values(given[0]) if given else None)

    hooks = [
        module.register_forward_pre_hook(note)
        for module in encoder.modules()
        if module is not encoder and any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            encoder(image)
    finally:
        for hook in hooks:
            hook.remove()
    last = None
    for values in calls:
        if values is None and last is not None:
            break
        last = values or last
    return last


def _three_values(tensor: Tensor) -> list[float] | None:
    """Return the three numbers that a tensor consists of, in equal shares, or None."""
    flat = tensor.detach().double().flatten().sort().values
    if len(flat) % 3:
        return None
    thirds: Sequence[Tensor] = flat.chunk(3)
    if any(float(part[-1] - part[0]) > 1e-4 for part in thirds):
        return None
    return [float(part.mean()) for part in thirds]


@check("encoder")
def images_reach_gradients(subject: Subject) -> None:
    """A frozen encoder still carries gradients from its features to the image, as perceptual losses need."""
    encoder = subject.make().requires_grad_(False)
    images = _probe(subject, encoder, 1)[0].requires_grad_(True)
    total = sum(item.square().sum() for item in encoder(images).maps)
    expect(isinstance(total, Tensor) and total.requires_grad, "the features have no gradient to the image")
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    expect(images.grad is not None and bool(images.grad.abs().sum() > 0), "the gradient to the image is zero")


@check("encoder")
def declares_licence_and_source(subject: Subject) -> None:
    """The licence of the weights and where they come from are stated."""
    info = subject.make().info
    expect(bool(info.licence.strip()), "info.licence is empty")
    expect(bool(info.source.strip()), "info.source is empty")


@check("encoder")
def weights_matter(subject: Subject) -> None:
    """Two seeds give two networks, and the features depend on the image."""
    first, second = subject.make(0), subject.make(1)
    if not list(first.parameters()):
        return
    disturb(first)
    images = _probe(subject, first, 2)[0]
    with torch.no_grad():
        one, other = first(images).maps[-1], second(images).maps[-1]
    expect(not torch.allclose(one, other), "two networks of different weights give the same features")
    expect(not torch.allclose(one[0], one[1]), "two images give the same features")
