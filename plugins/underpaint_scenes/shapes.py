"""Outlines as signed distances: negative inside, zero on the edge, in units of the shape's radius."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHAPES", "Field"]

Field = NDArray[np.float32]
Outline = Callable[[Field, Field], Field]


def _circle(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - np.float32(0.92)


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - np.float32(0.72)) - np.float32(0.24)


def _pill(x: Field, y: Field) -> Field:
    return np.hypot(np.maximum(np.abs(x) - np.float32(0.55), 0), y) - np.float32(0.42)


def _crescent(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y) - np.float32(0.98), np.float32(0.8) - np.hypot(x - np.float32(0.5), y))


def _flower(x: Field, y: Field) -> Field:
    edge = np.float32(0.76) + np.float32(0.2) * np.cos(5 * np.arctan2(x, -y))
    # A polar curve is nearer than it looks along the ray; its slope is at most about one in this one.
    return (np.hypot(x, y) - edge) * np.float32(0.8)


def _polygon(points: list[tuple[float, float]], rounding: float = 0.05) -> Outline:
    """Make the outline of a polygon with rounded corners."""
    corners = np.array(points, dtype=np.float32)
    ends = np.roll(corners, -1, axis=0)
    spans = ends - corners
    lengths = (spans**2).sum(axis=1)
    radius = np.float32(rounding)

    def outline(x: Field, y: Field) -> Field:
        nearest = np.full(x.shape, np.inf, dtype=np.float32)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by), (sx, sy), length in zip(corners, ends, spans, lengths, strict=True):
            dx, dy = x - ax, y - ay
            along = np.clip((dx * sx + dy * sy) / length, 0, 1)
            dx -= along * sx
            dy -= along * sy
            np.minimum(nearest, dx * dx + dy * dy, out=nearest)
            if ay != by:  # even-odd rule: each edge that a ray to the right crosses turns inside out
                inside ^= ((y >= ay) != (y >= by)) & (x < ax + (y - ay) * (sx / sy))
        return np.sqrt(nearest) * np.where(inside, np.float32(-1), np.float32(1)) - radius

    return outline


def _star() -> Outline:
    radii = (0.98, 0.45) * 5
    turns = np.arange(10) * np.pi / 5
    return _polygon([(float(r * np.sin(t)), float(-r * np.cos(t))) for r, t in zip(radii, turns, strict=True)], 0.04)


def _heart() -> Outline:
    turns = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x = np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16 - 0.1
    return _polygon([(float(a), float(b)) for a, b in zip(0.92 * x, 0.92 * y, strict=True)], 0.03)


_A, _B = 0.28, 0.86  # half the width and half the length of the cross's bars

SHAPES: dict[str, Outline] = {
    "circle": _circle,
    "square": _polygon([(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)], 0.07),
    "triangle": _polygon([(0.0, -0.95), (0.87, 0.62), (-0.87, 0.62)], 0.06),
    "star": _star(),
    "ring": _ring,
    "cross": _polygon(
        [(-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A)]
        + [(_A, _B), (-_A, _B), (-_A, _A), (-_B, _A), (-_B, -_A), (-_A, -_A)]
    ),
    "heart": _heart(),
    "crescent": _crescent,
    "flower": _flower,
    "pill": _pill,
}
"""The outlines by name; the order is that of the classes. y points down."""
