"""Outlines as signed distances: negative inside, zero on the edge, in units of the shape's radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHAPES", "Field"]

Field = NDArray[np.floating[Any]]
"""Numbers per pixel, in practice float32."""

Outline = Callable[[Field, Field], Field]


def _circle(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.92


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.72) - 0.24


def _pill(x: Field, y: Field) -> Field:
    return np.hypot(np.maximum(np.abs(x) - 0.55, 0), y) - 0.42


def _crescent(x: Field, y: Field) -> Field:
    outer, hollow, shift = 0.98, 0.8, 0.5
    # The two circles meet at the tips.
    tip_x = (outer**2 - hollow**2 + shift**2) / (2 * shift)
    tip_y = math.sqrt(outer**2 - tip_x**2)
    up = np.abs(y)
    arcs = np.maximum(np.hypot(x, y) - outer, hollow - np.hypot(x - shift, y))
    nearest_is_tip = (up * tip_x < x * tip_y) & ((x - shift) * tip_y > up * (tip_x - shift))
    distance: Field = np.where(nearest_is_tip, np.hypot(x - tip_x, up - tip_y), arcs)
    return distance


def _flower(x: Field, y: Field) -> Field:
    # Every petal is turned onto the first, a circle on the axis.
    fifth = 2 * math.pi / 5
    turn, radius = np.arctan2(x, -y) / fifth, np.hypot(x, y)
    inside = (turn - np.round(turn)) * fifth
    petal: Field = np.hypot(radius * np.cos(inside) - 0.56, radius * np.sin(inside)) - 0.39
    return np.minimum(petal, radius - 0.45)


def _polygon(points: list[tuple[float, float]], rounding: float = 0.05) -> Outline:
    """Make the outline of a polygon with rounded corners."""
    corners = np.array(points, dtype=np.float32)
    ends = np.roll(corners, -1, axis=0)
    spans = ends - corners
    lengths = (spans**2).sum(axis=1)

    def outline(x: Field, y: Field) -> Field:
        nearest = np.full(x.shape, np.inf, dtype=np.float32)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (_, by), (sx, sy), length in zip(corners, ends, spans, lengths, strict=True):
            dx, dy = x - ax, y - ay
            along = np.clip((dx * sx + dy * sy) / length, 0, 1)
            dx -= along * sx
            dy -= along * sy
            np.minimum(nearest, dx * dx + dy * dy, out=nearest)
            if ay != by:  # even-odd rule: each edge that a ray to the right crosses turns inside out
                inside ^= ((y >= ay) != (y >= by)) & (x < ax + (y - ay) * (sx / sy))
        distance = np.sqrt(nearest)
        return np.where(inside, -distance, distance) - rounding

    return outline


def _star() -> Outline:
    radii = (0.98, 0.45) * 5
    turns = np.arange(10) * np.pi / 5
    return _polygon([(float(r * np.sin(t)), float(-r * np.cos(t))) for r, t in zip(radii, turns, strict=True)], 0.04)


def _heart() -> Outline:
    turns = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    x = np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16 - 0.1
    return _polygon([(float(a), float(b)) for a, b in zip(0.92 * x, 0.92 * y, strict=True)], 0.03)


def _cross() -> Outline:
    half, reach = 0.28, 0.86
    corners = [(-half, -reach), (half, -reach), (half, -half)]
    for _ in range(3):  # a quarter turn each
        corners += [(-y, x) for x, y in corners[-3:]]
    return _polygon(corners)


SHAPES: dict[str, Outline] = {
    "circle": _circle,
    "square": _polygon([(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)], 0.07),
    "triangle": _polygon([(0.0, -0.95), (0.87, 0.62), (-0.87, 0.62)], 0.06),
    "star": _star(),
    "ring": _ring,
    "cross": _cross(),
    "heart": _heart(),
    "crescent": _crescent,
    "flower": _flower,
    "pill": _pill,
}
"""The outlines by name; the order is that of the classes. y points down."""
