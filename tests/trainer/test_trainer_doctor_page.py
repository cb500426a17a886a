"""A report as a page."""

import re

from trainer.doctor.charts import svg
from trainer.doctor.page import html
from trainer.doctor.report import Bars, Finding, Lines, Report, Section, Series

SECTION = Section(
    "Slices",
    "Parts & pieces.",
    [Finding("mild", "note", "a < b", "wait"), Finding("grave", "critical", "c", "act")],
    {"recall_at_10": 0.5},
    [Bars("Parts", "recall_at_10", ["genre=$x$ <b>"], [0.5], [0.4], [0.6])],
)


def test_the_worst_comes_first_in_the_summary_and_in_each_section() -> None:
    page = html(Report(3, "data", [SECTION]))
    assert re.findall(r"<b>(\w+: \w+)</b>", page) == ["critical: grave", "note: mild"] * 2
    assert "a &lt; b" in page
    assert "<td>recall at 10</td><td>0.5</td>" in page


def test_a_section_without_figures_and_charts_has_no_row_for_them() -> None:
    page = html(Report(3, None, [Section("Neighbours", "None.")], ["some rows < all rows"]))
    assert '<div class="row">' not in page
    assert "nothing found" in page
    assert "some rows &lt; all rows" in page


def test_labels_are_text_and_long_ones_are_shortened() -> None:
    label = "title=" + "long" * 20
    element = svg(Bars("By title", "recall", ["cost=$5$ <b>", label], [0.1, 0.2]))
    assert "cost=$5$ &lt;b&gt;" in element
    assert label not in element
    assert f"{label[:35]}…" in element


def test_a_line_has_a_band_where_it_has_bounds() -> None:
    line = Series("mean", [0, 1], [0.5, 0.6])
    bounded = Series("mean", [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])
    assert "PolyCollection" not in svg(Lines("Curve", "x", "y", [line]))
    assert "PolyCollection" in svg(Lines("Curve", "x", "y", [bounded]))
