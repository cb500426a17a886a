"""Lists with known answers, and faults planted in scores."""

import numpy as np
import pytest
import torch
from doctor_subject import NUM_ITEMS, subject_of, wanting

from trainer.doctor import lists
from trainer.doctor.subject import Subject

CHOSEN = [[(user + 1) % NUM_ITEMS, (user + 2) % NUM_ITEMS, user] for user in range(NUM_ITEMS)]
NUM_POSITIONS = 3 * NUM_ITEMS
USERS = torch.arange(NUM_POSITIONS) // 3


def two_each() -> torch.Tensor:
    """User u is shown the items u and u + 1."""
    return torch.eye(NUM_ITEMS)[USERS] + torch.eye(NUM_ITEMS)[(USERS + 1) % NUM_ITEMS] / 2


def test_lists_of_their_own_are_well() -> None:
    section = lists.lists_section(subject_of(CHOSEN, two_each()))
    assert section.findings == []
    assert section.figures["overlap_of_two_lists"] == pytest.approx(20 * 2 / (20 * 19 * 2))
    assert section.figures["share_of_the_most_frequent_list"] == pytest.approx(1 / 20)
    assert section.figures["coverage"] == 1.0


def test_the_same_list_for_everyone_is_found() -> None:
    section = lists.lists_section(subject_of(CHOSEN, wanting([7] * NUM_POSITIONS)))
    assert [(finding.name, finding.severity) for finding in section.findings] == [
        ("same-list-for-everyone", "critical")
    ]
    assert section.figures["overlap_of_two_lists"] == 1.0
    [table] = section.tables
    assert table.rows[0] == ("Tale 0", "100.0%", "5.0%")


def test_lists_are_no_longer_than_a_tenth_of_the_catalogue() -> None:
    """Of twenty items two lists of ten would share five by chance."""
    section = lists.lists_section(subject_of(CHOSEN, two_each(), ks=10))
    assert section.figures["overlap_of_two_lists"] == pytest.approx(1 / 19)


@pytest.mark.parametrize(
    ("popular", "logq", "remedy"),
    [
        (True, "counts", 'logq = "none"'),
        (True, "none", "which features matter"),
        (False, "none", 'logq = "counts"'),
        (False, "counts", "Train longer"),
    ],
)
def test_popularity_bias_names_a_remedy_that_is_not_in_force(popular: bool, logq: str, remedy: str) -> None:
    # Training knows items 0 and 1 from everybody, what a quarter chooses in the test is one of them.
    chosen = [[0, 1, 0, 1, 5, user % 2 if user < 5 else 10] for user in range(NUM_ITEMS)]
    shown = torch.eye(NUM_ITEMS)[[0, 1] if popular else [8, 9]].sum(dim=0)
    section = lists.lists_section(subject_of(chosen, shown.expand(6 * NUM_ITEMS, -1), logq=logq))
    [finding] = [finding for finding in section.findings if finding.name == "popularity-bias"]
    assert remedy in finding.remedy


def skewed(weight: float, logq: str = "counts") -> Subject:
    """Scores that know each user's target, and a popularity that is off by some times log q."""
    subject = subject_of(CHOSEN, torch.zeros(NUM_POSITIONS, NUM_ITEMS), logq=logq)
    counts = np.arange(NUM_ITEMS) ** 2
    vars(subject)["item_counts"] = counts
    log_q = np.log((counts + 1) / (counts + 1).sum())
    scores = torch.eye(NUM_ITEMS)[USERS] * 1e-3 - torch.from_numpy(weight * subject.temperature * log_q)
    vars(subject.published)["scores"] = scores.float()
    return subject


@pytest.mark.parametrize(
    ("weight", "logq", "names"),
    [
        (0.0, "counts", []),
        (1.0, "none", ["popularity-missing"]),
        (1.0, "counts", ["popularity-missing"]),
        (2.0, "counts", ["wrong-logq-sign"]),
        (2.0, "none", ["popularity-missing"]),
        (-1.0, "counts", ["popularity-excess"]),
    ],
)
def test_the_weight_of_popularity_that_is_missing_is_found(weight: float, logq: str, names: list[str]) -> None:
    section = lists.popularity_section(skewed(weight, logq))
    assert section.figures["best_weight_of_log_q"] == weight
    assert section.figures["recall_at_2_at_best_weight"] == 1.0
    assert [finding.name for finding in section.findings] == names
