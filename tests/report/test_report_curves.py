"""Curves as SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from underpaint.report.curves import curve_svg


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def series(values) -> dict:
    return {"loss": (list(range(1, len(values) + 1)), list(values))}


def test_is_one_element_that_refers_to_nothing_outside_and_takes_the_colour_of_the_page():
    svg = curve_svg("stage: a <b> & $x$_1", series(np.linspace(1, 0.9, 300)) | {"t_$1": ([1, 2], [0.5, 0.6])})
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("aria-label") == "stage: a <b> & $x$_1"
    assert root.get("viewBox")
    assert root.get("width") is None
    assert "currentColor" in svg
    assert "font-family" not in svg
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))
    assert {"stage: a <b> & $x$_1", "step", "loss", "t_$1"} <= set(texts(svg))


def test_ids_of_two_pictures_differ():
    ids = [set(re.findall(r' id="([^"]*)"', curve_svg(title, series([1, 2, 3])))) for title in ("one", "two")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_the_same_curve_gives_the_same_bytes():
    assert curve_svg("a", series([1, 2])) == curve_svg("a", series([1, 2]))


def test_scale_is_logarithmic_only_for_positive_values_that_spread_widely():
    log = texts(curve_svg("x", series(np.geomspace(1000, 0.1, 50))))
    assert {"0.1", "1", "10", "100", "1000"} <= set(log)
    linear = texts(curve_svg("x", series(np.linspace(1, 0.5, 50))))
    assert "0.6" in "".join(linear)
    negative = texts(curve_svg("x", series(np.linspace(-1, 1000, 50))))
    assert not {"0.1", "10"} & set(negative)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values", [[NAN], [1.0], [1.0, NAN, 2.0], [NAN, NAN], [INF, 1.0], [0.0, 0.0], [-INF] * 3, [1e30, 1e-30]]
)
def test_odd_values_do_not_break_it(values):
    ET.fromstring(curve_svg("x", series(values)))


@pytest.mark.parametrize("length", [20, 400])
def test_every_value_that_is_not_finite_is_marked(length):
    values = np.linspace(1.0, 0.1, length)
    values[[3, 4, 11]] = [NAN, INF, NAN]
    assert curve_svg("x", series(values)).count("<use ") == 3
    assert curve_svg("x", series(np.linspace(1.0, 0.1, length))).count("<use ") == 0
