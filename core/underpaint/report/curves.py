"""Curves as SVG that takes its text colour and font from the page around it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

__all__ = ["curve_svg"]

# Seen well on white and on near-black.
_COLOURS = ("#4a86c8", "#d9822b", "#3f9b6a", "#cc5a5a", "#8f74ba", "#9c7a58", "#c97bb0", "#8a8f98")
# Stands for the text colour of the page while matplotlib draws.
_INK = "#010203"
_WIDE = 20.0
_MANY = 80


def curve_svg(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Draw curves over training steps, with a logarithmic scale when the values are positive and spread widely.

    Long curves are drawn thin, with their moving mean on top. Values that are not finite leave a gap in the curve
    and a mark on the axis below.

    Args:
        title: What is shown.
        series: Steps, ascending, and as many values, by name; at least one name.

    Returns:
        An ``<svg>`` element without a fixed size and without references to anything outside of it.
    """
    lines = {name: np.asarray(curve, dtype=np.float64) for name, curve in series.items()}
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9.0, "text.parse_math": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, (x, y)) in enumerate(lines.items()):
            _line(axes, x, y, name, _COLOURS[index % len(_COLOURS)])
        _dress(axes, np.concatenate([y for _, y in lines.values()]))
        axes.set_title(title, color=_INK, fontsize=10, loc="left", fontweight="bold")
        if len(lines) > 1:
            figure.legend(
                loc="outside lower center", ncols=min(len(lines), 4), frameon=False, labelcolor=_INK, handlelength=1.2
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _cleaned(buffer.getvalue(), title)


def _line(axes: mpl.axes.Axes, x: NDArray[np.float64], y: NDArray[np.float64], name: str, colour: str) -> None:
    finite = np.isfinite(y)
    # A single point between two gaps has no line to be seen by.
    marker = "." if len(x) < 2 or finite.sum() < 3 else None
    shown = np.where(finite, y, np.nan)
    if len(x) >= _MANY:
        axes.plot(x, shown, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(x, _moving_mean(y, len(y) // 40), color=colour, linewidth=1.5, label=name)
    else:
        axes.plot(x, shown, color=colour, linewidth=1.5, marker=marker, label=name)
    if not finite.all():
        axes.plot(
            x[~finite], np.zeros((~finite).sum()), "x", color="#cc3333", markersize=5, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _moving_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Return the mean of the finite values up to `reach` places away; NaN stays NaN."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(finite, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _dress(axes: mpl.axes.Axes, values: NDArray[np.float64]) -> None:
    finite = values[np.isfinite(values)]
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > _WIDE:
        axes.set_yscale("log")
        decades = np.log10(finite.max() / finite.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("step", color=_INK)
    axes.grid(color=_INK, alpha=0.14, linewidth=0.6)
    axes.tick_params(colors=_INK, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)
        spine.set_alpha(0.5)


def _cleaned(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    # The style element would hold for the whole page, and the font is the page's.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    # Several of these stand in one page, where an id may occur once; only definitions are referred to.
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib\.axis|xtick|ytick)_\d+"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    label = html.escape(title)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return svg.replace(_INK, "currentColor").strip()
