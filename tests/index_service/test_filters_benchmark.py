"""The benchmark of filters, on an index that is small enough to be exact."""

from benchmarks.index.filters import SELECTIVITIES, indexed, measure, shown
from benchmarks.index.vectors import clustered


def test_the_benchmark_of_filters_finds_all_on_an_exact_index():
    items, queries = clustered(3000, 16, 3)
    index = indexed(items)
    figures = measure(index, queries)
    excluded = ["without nearest 1,000", "without nearest 1,500", "without random 1,500"]
    assert [row["filter"] for row in figures] == ["spread", "region"] * len(SELECTIVITIES) + excluded
    assert all(row["recall"] == 1.0 and row["full"] for row in figures)
    assert shown(figures, index.manifest.index_type).row_count == len(figures)
