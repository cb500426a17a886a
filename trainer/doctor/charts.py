"""Charts as SVG that goes into a page: text and axes have the colour of the page's text, in the light and in the dark.

Deliberately does not know what the numbers mean.
"""

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.doctor.report import Bars, Lines

_INK = "#010203"
"""Stands for the text's colour until the SVG is made: matplotlib knows no colour that a page decides."""
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7")
_SIZE_INCHES = (6.4, 3.2)
_BAR_INCHES = 0.26
_MAX_LABEL = 36
"""Characters."""
_STYLE: dict[Any, Any] = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "legend.framealpha": 0.0,
    "font.size": 9,
    "svg.fonttype": "none",
}


def svg(chart: Lines | Bars) -> str:
    """An `<svg>` element; the same chart always gives the same one, and no two share ids."""
    with rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        match chart:
            case Lines():
                figure = _lines(chart)
            case Bars():
                figure = _bars(chart)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    element = content.getvalue()
    prefix = re.sub(r"\W+", "-", chart.title.lower())
    element = element[element.index("<svg") :].replace(_INK, "currentColor")
    # matplotlib numbers its groups alike in every figure.
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", element)


def _lines(chart: Lines) -> Figure:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for colour, series in zip(_COLOURS, chart.series, strict=False):
        marker = "o" if len(series.x) <= 40 else ""
        axes.plot(series.x, series.y, label=series.label, color=colour, marker=marker, markersize=3, linewidth=1.5)
        if series.lows:
            axes.fill_between(series.x, series.lows, series.highs, color=colour, alpha=0.2, linewidth=0)
    if chart.is_log:
        axes.set_yscale("log")
    if all(float(x).is_integer() for series in chart.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(chart.y_label)
    _finish(axes, chart.x_label)
    if len(chart.series) > 1:
        axes.legend()
    return figure


def _bars(chart: Bars) -> Figure:
    width, _ = _SIZE_INCHES
    figure = Figure(figsize=(width, 0.9 + _BAR_INCHES * len(chart.labels)), layout="constrained")
    axes = figure.subplots()
    places = range(len(chart.labels))
    axes.barh(places, chart.values, color=_COLOURS[0], height=0.7)
    if chart.lows:
        axes.hlines(places, chart.lows, chart.highs, color=_INK, linewidth=1.2)
    # A label is data: a dollar sign in it begins no formula, and a long one leaves no room for the bars.
    axes.set_yticks(places, [_shortened(label).replace("$", r"\$") for label in chart.labels])
    axes.set_ylim(len(chart.labels) - 0.4, -0.6)
    _finish(axes, chart.x_label)
    return figure


def _shortened(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…"


def _finish(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="x" if not axes.get_ylabel() else "both", alpha=0.25)
