"""Figures of embeddings with known answers."""

import math

import pytest
import torch

from trainer.doctor import geometry


def test_effective_rank_counts_the_directions_in_use() -> None:
    corners = torch.cat([torch.eye(4), -torch.eye(4)])
    assert geometry.spectrum(corners) == pytest.approx([0.25] * 4)
    assert geometry.effective_rank(geometry.spectrum(corners)) == pytest.approx(4.0)
    line = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    assert geometry.effective_rank(geometry.spectrum(line)) == pytest.approx(1.0)
    point = torch.full((100, 3), 1 / math.sqrt(3))
    assert geometry.effective_rank(geometry.spectrum(point)) == 0.0


def test_alignment_and_uniformity_by_hand() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert geometry.alignment(torch.cat([east, east]), torch.cat([east, north])) == pytest.approx(1.0)
    # Three pairs, squared distances 2, 2 and 4.
    rows = torch.cat([east, north, -east])
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert geometry.uniformity(rows) == pytest.approx(expected)
    assert geometry.uniformity(torch.cat([east] * 5)) == 0.0
    assert geometry.uniformity(east) == 0.0


def test_uniformity_of_many_is_that_of_a_sample() -> None:
    rows = torch.nn.functional.normalize(torch.randn(7001, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    few = geometry.uniformity(rows[:2000])
    assert geometry.uniformity(rows) == pytest.approx(few, abs=0.02)


def test_positives_that_are_no_nearer_are_said() -> None:
    rows = torch.nn.functional.normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    embeddings = {"query": rows, "item": -rows}
    found = geometry.geometry_section(embeddings, (rows, -rows))
    assert [finding.name for finding in found.findings] == ["positives-not-nearer"]
    assert geometry.geometry_section(embeddings, (rows, rows)).findings == []
