"""Procedural scenes: pure functions of seed and index, with labels and captions that say what is drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from underpaint import ConfigError, create
from underpaint_scenes.render import render
from underpaint_scenes.scene import COLOURS, GROUNDS, TEXTURES, Ground, Scene, Thing, draw
from underpaint_scenes.shapes import SHAPES

COUNT = 400


@pytest.fixture(scope="module")
def scenes():
    return [draw(0, index) for index in range(COUNT)]


def test_a_sample_is_a_function_of_seed_and_index():
    short, long = create("dataset", "scenes/shapes", length=5), create("dataset", "scenes/shapes", length=500)
    for index in (0, 4):
        assert np.array_equal(short[index].image, long[index].image)
        assert short[index].text == long[index].text
    other = create("dataset", "scenes/shapes", seed=1)
    assert not np.array_equal(short[0].image, other[0].image)


def test_fingerprints_tell_options_apart():
    made = [create("dataset", "scenes/shapes", **options) for options in ({}, {"seed": 1}, {"size": 32}, {"length": 9})]
    assert len({dataset.fingerprint() for dataset in made}) == 4


def test_labels_and_captions_say_what_is_drawn():
    dataset = create("dataset", "scenes/shapes", length=60, size=16)
    for index in range(60):
        sample, factors = dataset[index], dataset.factors(index)
        main = factors["things"][-1]
        assert dataset.classes[sample.label] == main["shape"]
        words = re.findall(r"[a-z]+", sample.text)
        assert words[1] == main["colour"]
        assert main["shape"] in words
        assert factors["ground"]["colour"] in words
        assert factors["ground"]["kind"] in words
        small = factors["things"][:-1]
        if small:
            number = {1: "a", 2: "two", 3: "three"}[len(small)]
            assert f"with {number} small {small[0]['colour']} {small[0]['shape']}" in sample.text
        else:
            assert "with" not in words


def test_every_factor_occurs_about_equally_often(scenes):
    for values, kinds in (
        ([scene.main.shape for scene in scenes], SHAPES),
        ([scene.main.colour for scene in scenes], COLOURS),
        ([scene.main.texture for scene in scenes], TEXTURES),
        ([scene.ground.kind for scene in scenes], GROUNDS),
    ):
        share = COUNT / len(kinds)
        assert all(abs(values.count(kind) - share) < 4.5 * share**0.5 for kind in kinds)


def test_objects_stay_in_the_picture_and_apart(scenes):
    for scene in scenes:
        assert 1 <= len(scene.things) <= 4
        for thing in scene.things:
            assert max(abs(thing.x), abs(thing.y)) + 0.9 * thing.radius < 1
        for i, one in enumerate(scene.things):
            for two in scene.things[:i]:
                assert np.hypot(one.x - two.x, one.y - two.y) > one.radius + two.radius


def test_the_main_object_has_another_colour_than_its_ground(scenes):
    assert all(scene.main.colour != scene.ground.colour for scene in scenes)


def _area(name):
    line = (np.arange(800) + 0.5) / 400 - 1
    x, y = np.meshgrid(line * 1.2, line * 1.2)
    return (SHAPES[name](x, y) < 0).mean() * 2.4**2


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", np.pi * 0.92**2),
        ("ring", np.pi * (0.96**2 - 0.48**2)),
        ("pill", np.pi * 0.42**2 + 4 * 0.55 * 0.42),
        ("square", 1.44**2 + 4 * 1.44 * 0.07 + np.pi * 0.07**2),
    ],
)
def test_areas_are_those_of_the_shapes(name, area):
    assert _area(name) == pytest.approx(area, rel=0.005)


@pytest.mark.parametrize("name", SHAPES)
def test_distances_grow_no_faster_than_the_way(name):
    # A field that rises faster than one per unit would draw a hard, aliased edge.
    line = np.linspace(-1.5, 1.5, 300)
    x, y = np.meshgrid(line, line)
    field = SHAPES[name](x, y)
    step = line[1] - line[0]
    slope = np.hypot(*np.gradient(field, step))
    assert np.percentile(slope[np.abs(field) < 0.1], 99) < 1.15
    assert np.median(slope[np.abs(field) < 0.1]) > 0.75
    assert (field[[0, -1]] > 0).all()


def _plain_scene(light=np.pi / 2, **change):
    ground = Ground("gradient", "blue", (0.6, 0.0, 0.5), (0.6, 0.0, 0.5), 0.0, 3.0, 0)
    thing = {"shape": "circle", "colour": "red", "hsv": (0.0, 1.0, 0.8), "hsv2": (0.0, 1.0, 0.8), "texture": "plain"}
    thing |= {"x": 0.0, "y": 0.0, "radius": 0.5, "rotation": 0.0, "scale": 2.0}
    return Scene(ground, (Thing(**{**thing, **change}),), light)


def test_objects_are_where_the_scene_says():
    image = render(_plain_scene(x=0.4, y=-0.3, radius=0.3), 64).astype(int)
    red = np.argwhere(image[..., 0] - image[..., 1] > 60)
    y, x = (red.mean(axis=0) + 0.5) / 32 - 1
    assert (x, y) == pytest.approx((0.4, -0.3), abs=0.03)
    assert len(red) / 64**2 * 4 == pytest.approx(np.pi * (0.3 * 0.92) ** 2, rel=0.1)


def test_light_falls_from_its_direction():
    from_above = render(_plain_scene(np.pi / 2), 64).astype(int)
    assert from_above[19, 32, 0] > from_above[44, 32, 0] + 30  # the rim
    assert from_above[50, 32].mean() < from_above[13, 32].mean() - 20  # the shadow is below
    from_right = render(_plain_scene(0.0), 64).astype(int)
    assert from_right[32, 44, 0] > from_right[32, 19, 0] + 30


def test_a_larger_picture_shows_the_same_scene():
    small, large = render(draw(0, 7), 32).astype(float), render(draw(0, 7), 128).astype(float)
    pooled = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(pooled - small).mean() < 4


@pytest.mark.parametrize("options", [{"length": 0}, {"size": 8}, {"seed": -1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        create("dataset", "scenes/shapes", **options)
