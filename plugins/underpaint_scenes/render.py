"""A scene as pixels: every edge antialiased by its distance, every object lit from the scene's light."""

from __future__ import annotations

import colorsys
import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from underpaint_scenes.scene import Ground, Scene, Thing
from underpaint_scenes.shapes import SHAPES, Field

__all__ = ["render"]


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side in pixels.

    Returns:
        size×size×3 uint8.
    """
    x, y = _grid(size)
    towards = math.cos(scene.light), -math.sin(scene.light)
    canvas = _ground(scene.ground, x, y, size)
    # The ground is brighter on the light's side, and the corners fall off as in a photograph.
    canvas *= (1 + 0.12 * (x * towards[0] + y * towards[1]) - 0.09 * (x * x + y * y))[..., None]
    for thing in scene.things:
        _put(canvas, thing, towards, size)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Field, Field]:
    """Return x and y of the pixels' centres, −1 to 1, y down."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size)) - 1
    return np.broadcast_to(line, (size, size)).copy(), np.broadcast_to(line[:, None], (size, size)).copy()


def _rgb(hsv: tuple[float, float, float]) -> Field:
    return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32)


def _mix(first: Field, second: Field, share: Field) -> Field:
    return first + (second - first) * share[..., None]


def _bands(phase: Field, period: float, pixel: float) -> Field:
    """Return bands of equal width, 0 and 1, their edges one pixel wide. One period is a phase of 1."""
    wave = np.abs((phase % 1) - 0.5) - 0.25
    bands: Field = np.clip(wave * (period / pixel) + 0.5, 0, 1)
    return bands


# ---------------------------------------------------------------------------------------------- ground


def _ground(ground: Ground, x: Field, y: Field, size: int) -> Field:
    first, second = _rgb(ground.hsv), _rgb(ground.hsv2)
    cos, sin = math.cos(ground.angle), math.sin(ground.angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    period, pixel = 2 / ground.scale, 2 / size
    share: Field
    if ground.kind == "gradient":
        share = 0.5 + 0.42 * u
    elif ground.kind == "glow":
        share = np.clip(np.hypot(x - 0.4 * cos, y - 0.4 * sin) * 0.75, 0, 1) ** 1.5
    elif ground.kind == "stripes":
        share = 0.75 * _bands(u / period, period, pixel)
    elif ground.kind == "tiles":
        across, along = (
            _bands(u / period, period, pixel),
            _bands(v / period, period, pixel),
        )
        share = 0.75 * (across + along - 2 * across * along)
    elif ground.kind == "clouds":
        share = _clouds(ground.noise, size)
    else:
        assert ground.kind == "table"
        edge = 0.25 * cos + 0.05
        front = np.clip((y - edge) / pixel + 0.5, 0, 1)
        share = front * (0.95 - 0.45 * (y - edge)) + (1 - front) * 0.25 * (y + 1)
    return _mix(first, second, share)


def _clouds(seed: int, size: int) -> Field:
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size), dtype=np.float32)
    for cells, weight in ((3, 0.6), (6, 0.3), (12, 0.15)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    share: Field = np.clip((total - 0.25) * 1.8, 0, 1)
    return share


# ---------------------------------------------------------------------------------------------- objects


def _put(canvas: Field, thing: Thing, towards: tuple[float, float], size: int) -> None:
    pixel = 2 / size
    shift = tuple(round(-0.22 * thing.radius * part / pixel) for part in towards)  # the shadow's, in pixels
    blur = 0.30 * thing.radius
    margin = max(abs(part) for part in shift)
    # Only the part of the picture that the object or its shadow touches is computed.
    reach = 1.08 * thing.radius + blur
    left, right = _range(thing.x, reach, size)
    top, bottom = _range(thing.y, reach, size)
    columns = np.arange(left - margin, right + margin, dtype=np.float32)
    rows = np.arange(top - margin, bottom + margin, dtype=np.float32)
    dx = (columns + 0.5) * pixel - (1 + thing.x)
    dy = ((rows + 0.5) * pixel - (1 + thing.y))[:, None]
    cos, sin = math.cos(thing.rotation) / thing.radius, math.sin(thing.rotation) / thing.radius
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    distance = SHAPES[thing.shape](u, v) * thing.radius

    height, width = bottom - top, right - left
    here = (slice(margin, margin + height), slice(margin, margin + width))
    there = tuple(
        slice(margin - part, margin - part + length) for part, length in zip(shift[::-1], (height, width), strict=True)
    )
    patch = canvas[top:bottom, left:right]

    fade = np.clip(0.5 - distance[there] / blur, 0, 1)
    patch *= 1 - 0.55 * (fade * fade * (3 - 2 * fade))[..., None]

    coverage = np.clip(0.5 - distance[here] / pixel, 0, 1)
    surface = _surface(thing, u[here], v[here], pixel)
    surface = _lit(surface, distance, here, thing.radius, towards, pixel)
    patch += (surface - patch) * coverage[..., None]


def _range(centre: float, reach: float, size: int) -> tuple[int, int]:
    low = math.floor((centre - reach + 1) * size / 2)
    high = math.ceil((centre + reach + 1) * size / 2)
    return max(low, 0), min(high, size)


def _surface(thing: Thing, u: Field, v: Field, pixel: float) -> Field:
    first, second = _rgb(thing.hsv), _rgb(thing.hsv2)
    if thing.texture == "plain":
        return np.broadcast_to(first, (*u.shape, 3))
    period, pixel = 1 / thing.scale, pixel / thing.radius
    across = u * thing.scale
    if thing.texture == "striped":
        share = _bands(across, period, pixel)
    elif thing.texture == "checkered":
        one, two = _bands(across, period, pixel), _bands(v * thing.scale, period, pixel)
        share = one + two - 2 * one * two
    else:
        assert thing.texture == "dotted"
        cell = np.hypot((across * 1.4) % 1 - 0.5, (v * (thing.scale * 1.4)) % 1 - 0.5)
        share = np.clip((0.3 - cell) * (period / 1.4 / pixel) + 0.5, 0, 1)
    return _mix(first, second, share)


def _lit(
    surface: Field,
    distance: Field,
    here: tuple[slice, slice],
    radius: float,
    towards: tuple[float, float],
    pixel: float,
) -> Field:
    """Shade the object as a cushion: flat in the middle, its rim turned down over two fifths of the radius."""
    slope_y, slope_x = (np.gradient(distance, pixel, axis=axis)[here] for axis in (0, 1))
    bevel = 0.42 * radius
    tilt = np.clip(1 + distance / bevel, 0, 1)[here] ** 1.5
    facing = (slope_x * towards[0] + slope_y * towards[1]) * tilt
    upright = np.sqrt(np.maximum(1 - (0.8 * tilt) ** 2, 0))
    diffuse = 0.62 + 0.42 * upright + 0.34 * facing
    highlight = np.clip(0.62 * facing + 0.62 * upright - 0.02, 0, 1) ** 14
    shaded: Field = surface * diffuse[..., None] + 0.55 * highlight[..., None]
    return shaded
