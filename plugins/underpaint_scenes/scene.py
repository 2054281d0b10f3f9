"""What is in a scene: drawn from (seed, index) alone, and put into words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import attrs
import numpy as np

from underpaint_scenes.shapes import SHAPES

__all__ = ["COLOURS", "GROUNDS", "TEXTURES", "Ground", "Scene", "Thing", "caption", "draw"]

COLOURS: Mapping[str, tuple[float, float, float]] = {  # hue in turns, saturation, value
    "red": (0.99, 0.82, 0.86),
    "orange": (0.07, 0.85, 0.95),
    "yellow": (0.135, 0.78, 0.97),
    "green": (0.36, 0.68, 0.66),
    "teal": (0.49, 0.70, 0.70),
    "blue": (0.60, 0.76, 0.84),
    "purple": (0.76, 0.60, 0.74),
    "pink": (0.92, 0.48, 0.95),
    "white": (0.11, 0.05, 0.95),
}
GROUNDS = ("gradient", "glow", "stripes", "tiles", "clouds", "table")
TEXTURES = ("plain", "striped", "dotted", "checkered")

_COUNTS = ("", "a small", "two small", "three small")
_Choice = TypeVar("_Choice")


@attrs.frozen
class Ground:
    """What the objects lie on.

    Attributes:
        kind: One of `GROUNDS`.
        colour: One of `COLOURS`, muted.
        hsv: Its shade: hue in turns, saturation, value.
        hsv2: The second shade.
        angle: Direction of the pattern in radians.
        scale: Periods of the pattern across the image.
        noise: Seed of the clouds.
    """

    kind: str
    colour: str
    hsv: tuple[float, float, float]
    hsv2: tuple[float, float, float]
    angle: float
    scale: float
    noise: int


@attrs.frozen
class Thing:
    """One object.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        hsv: Its shade.
        hsv2: The second shade, of the texture.
        texture: One of `TEXTURES`.
        x: Centre, −1 left to 1 right.
        y: Centre, −1 top to 1 bottom.
        radius: In units of half the image.
        rotation: Radians, clockwise.
        scale: Periods of the texture across the radius.
    """

    shape: str
    colour: str
    hsv: tuple[float, float, float]
    hsv2: tuple[float, float, float]
    texture: str
    x: float
    y: float
    radius: float
    rotation: float
    scale: float


@attrs.frozen
class Scene:
    """A ground, a light and objects, the main one last because it lies on top.

    Attributes:
        ground: Ground.
        things: Objects from back to front.
        light: Direction that the light comes from, in radians; 0 is right, π/2 is above.
    """

    ground: Ground
    things: tuple[Thing, ...]
    light: float

    @property
    def main(self) -> Thing:
        """The object that gives the class."""
        return self.things[-1]


def draw(seed: int, index: int) -> Scene:
    """Draw a scene, a pure function of its arguments."""
    rng = np.random.default_rng([seed, index])
    main_colour, ground_colour, small_colour = _choices(rng, tuple(COLOURS), 3)
    shape, small_shape = _choices(rng, tuple(SHAPES), 2)
    ground = _ground(rng, ground_colour)
    radius = float(rng.uniform(0.40, 0.58))
    # The main object leaves the middle only as far as it stays in the picture.
    reach = 0.94 - radius
    x, y = (float(value) for value in rng.uniform(-reach, reach, 2))
    main = _thing(rng, shape, main_colour, x, y, radius, _choice(rng, TEXTURES))
    texture = _choice(rng, TEXTURES[:2])
    shade = _shade(rng, small_colour)
    small: list[Thing] = []
    for _ in range(int(rng.integers(0, 4))):
        place = _free_place(rng, [main, *small])
        if place is not None:
            small.append(attrs.evolve(_thing(rng, small_shape, small_colour, *place, texture), hsv=shade))
    return Scene(ground, (*small, main), light=float(rng.uniform(0.25, 0.75) * math.pi))


def _ground(rng: np.random.Generator, colour: str) -> Ground:
    hue, saturation, value = COLOURS[colour]
    # Muted, so that objects stand out: pale or deep versions of the colour.
    deep = rng.random() < 0.5
    value = value * rng.uniform(0.38, 0.55) if deep else 0.97 - 0.12 * rng.random()
    saturation = saturation * (rng.uniform(0.5, 0.8) if deep else rng.uniform(0.25, 0.45))
    first = (hue + rng.uniform(-0.015, 0.015), saturation, value)
    second = (hue + rng.uniform(-0.06, 0.06), saturation * rng.uniform(0.7, 1.1), value * rng.uniform(0.68, 0.8))
    return Ground(
        kind=_choice(rng, GROUNDS),
        colour=colour,
        hsv=_plain(first),
        hsv2=_plain(second),
        angle=float(rng.uniform(0, math.pi)),
        scale=float(rng.uniform(2.5, 4.5)),
        noise=int(rng.integers(2**32)),
    )


def _thing(rng: np.random.Generator, shape: str, colour: str, x: float, y: float, radius: float, texture: str) -> Thing:
    hsv = _shade(rng, colour)
    # The second shade of a texture is paler on strong colours and darker on white.
    lift = (hsv[0], hsv[1] * 0.35, min(1.0, hsv[2] * 1.15)) if hsv[1] > 0.2 else (hsv[0], 0.12, hsv[2] * 0.62)
    return Thing(
        shape=shape,
        colour=colour,
        hsv=hsv,
        hsv2=_plain(lift),
        texture=texture,
        x=x,
        y=y,
        radius=radius,
        rotation=float(rng.uniform(-0.45, 0.45)),
        scale=float(rng.uniform(1.6, 2.4)),
    )


def _free_place(rng: np.random.Generator, taken: Sequence[Thing]) -> tuple[float, float, float] | None:
    for _ in range(12):
        radius = float(rng.uniform(0.14, 0.20))
        x, y = (float(value) for value in rng.uniform(radius - 0.97, 0.97 - radius, 2))
        if all(math.hypot(x - other.x, y - other.y) > radius + other.radius for other in taken):
            return x, y, radius
    return None


def _shade(rng: np.random.Generator, colour: str) -> tuple[float, float, float]:
    hue, saturation, value = COLOURS[colour]
    shift = rng.uniform(-1, 1, 3)
    return _plain((hue + 0.012 * shift[0], saturation * (1 + 0.1 * shift[1]), min(1.0, value * (1 + 0.07 * shift[2]))))


def _plain(hsv: Sequence[float]) -> tuple[float, float, float]:
    return float(hsv[0]) % 1.0, min(1.0, float(hsv[1])), min(1.0, float(hsv[2]))


def _choice(rng: np.random.Generator, choices: Sequence[_Choice]) -> _Choice:
    return choices[int(rng.integers(len(choices)))]


def _choices(rng: np.random.Generator, choices: Sequence[_Choice], count: int) -> list[_Choice]:
    """Draw without repetition."""
    return [choices[int(i)] for i in rng.permutation(len(choices))[:count]]


def caption(scene: Scene) -> str:
    """Describe a scene, such as "a red striped star on blue tiles with two small white rings"."""
    main, small = scene.main, scene.things[:-1]
    texture = "" if main.texture == "plain" else f"{main.texture} "
    ground = scene.ground
    article = "" if ground.kind in ("stripes", "tiles", "clouds") else f"{_article(ground.colour)} "
    text = f"{_article(main.colour)} {main.colour} {texture}{main.shape} on {article}{ground.colour} {ground.kind}"
    if small:
        plural = "" if len(small) == 1 else "es" if small[0].shape == "cross" else "s"
        text += f" with {_COUNTS[len(small)]} {small[0].colour} {small[0].shape}{plural}"
    return text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
