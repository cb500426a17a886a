"""How well answers are found, with towers whose answers are given."""

import numpy as np
import pytest
import torch
from doctor_subject import FEATURES, NUM_ITEMS, subject_of, wanting

from towers.schema import parse_schema
from trainer.config import TrainingConfig
from trainer.data import order_by_time
from trainer.doctor import accuracy
from trainer.doctor.report import Section

USERS = 40


def names(section: Section) -> list[str]:
    return [finding.name for finding in section.findings]


@pytest.mark.parametrize(
    ("options", "share"),
    [
        # Of the negatives of user 1 a third are item 0, which she is to choose later; user 0 has none.
        ({}, 1 / 9),
        ({"mask_known_positives": False}, 4 / 9),
        ({"negatives": "all"}, 1 / 6),
        ({"negatives": "all", "mask_known_positives": False}, 1 / 2),
    ],
)
def test_false_negatives_by_hand(options: dict[str, object], share: float) -> None:
    log = order_by_time(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]), np.arange(4.0))
    found = accuracy.false_negative_share(log, np.array([0, 1, 2]), TrainingConfig.model_validate(options), 2)
    assert found == pytest.approx(share)


def test_false_negatives_name_a_remedy_that_is_not_in_force() -> None:
    chosen = [[user % 2, 1 - user % 2, user % 2, 1 - user % 2] for user in range(USERS)]
    for masked, remedy in ((True, "score_margin"), (False, "mask_known_positives = true")):
        subject = subject_of(chosen, wanting([0] * 4 * USERS), mask_known_positives=masked)
        section = accuracy.gap_section(subject)
        if masked:
            assert section.figures["false_negatives"] == 0.0
            assert names(section) == []
        else:
            assert section.figures["false_negatives"] == pytest.approx(0.5)
            [finding] = section.findings
            assert (finding.name, remedy in finding.remedy) == ("false-negatives", True)


def test_towers_that_know_what_they_were_trained_on_and_no_more_are_found() -> None:
    """Users chose item u % 5 in training, 5 in validation and 6 in the test."""
    chosen = [[user % 5, 5, 6] for user in range(USERS)]
    told = [[user % 5, 5, 9] for user in range(USERS)]
    section = accuracy.gap_section(subject_of(chosen, wanting([item for items in told for item in items])))
    assert [section.figures[f"recall_at_2_{part}"] for part in ("training", "validation", "test")] == [1.0, 1.0, 0.0]
    assert names(section) == ["overfitting"]
    true = [item for items in chosen for item in items]
    assert names(accuracy.gap_section(subject_of(chosen, wanting(true)))) == []


def test_weak_slices_and_a_better_baseline_are_found() -> None:
    """All choose items 2 or 3, popular ones; the towers know it of 2 alone, or of nothing."""
    chosen = [[3 - user % 2, 4, 2 + user % 2] for user in range(2 * USERS)]
    know = [item if item == 2 else 9 for items in chosen for item in items]
    section = accuracy.slices_section(subject_of(chosen, wanting(know)))
    assert section.figures["two_towers_recall_at_2"] == pytest.approx(0.5)
    assert section.figures["popularity_recall_at_2"] == 1.0
    weak, below = section.findings
    assert (weak.name, "genre=genre 1." in weak.finding) == ("weak-slices", True)
    assert below.name == "below-a-baseline"
    right = subject_of(chosen, wanting([item for items in chosen for item in items]))
    assert names(accuracy.slices_section(right)) == []


def test_few_targets_make_no_slice_to_be_judged_and_no_chart() -> None:
    chosen = [[3, 4, 2], [2, 4, 3], [3, 4, 2]]
    section = accuracy.slices_section(subject_of(chosen, wanting([0] * 9)))
    assert [chart.title for chart in section.charts] == ["Models"]
    assert names(section) == ["below-a-baseline"]


def test_cold_items_and_new_users_are_found_wanting() -> None:
    """A half chooses a cold item, 10 and up, the other an item that training knows; item 0 is not among them."""
    targets = [10 + user % 10 if user % 2 else 1 for user in range(USERS)]
    chosen = [[1, 2, target] for target in targets]
    told = [item if item < 10 else 3 for items in chosen for item in items]
    section = accuracy.newcomers_section(subject_of(chosen, wanting(told)))
    assert section.figures["cold_targets"] == USERS / 2
    assert section.figures["cold_share_of_the_catalogue"] == pytest.approx((NUM_ITEMS - 1) / NUM_ITEMS)
    assert section.figures["cold_items"] == 0.0
    # Without a history everybody is shown item 0, then item 1.
    assert section.figures["new_users"] == pytest.approx(0.5)
    assert names(section) == ["cold-items-not-found"]


def test_new_users_that_popularity_serves_better_are_found() -> None:
    chosen = [[5, 2, 5] for _ in range(USERS)]
    section = accuracy.newcomers_section(subject_of(chosen, wanting([5] * 3 * USERS)))
    assert (section.figures["new_users"], section.figures["popularity"]) == (0.0, 1.0)
    assert names(section) == ["new-users-below-popularity"]


def test_new_users_have_an_unknown_id_and_no_history() -> None:
    """A vocabulary's unknown id is trained by min_count; its missing one is not."""
    hashed = {"name": "hashed", "column": "user_id", "owner": "query", "kind": "categorical", "hash_buckets": 8}
    features = parse_schema([*FEATURES, hashed]).of("query")
    change = accuracy.as_new(features)
    values = {name: torch.full((2, 3), 2) for name in ("user_id", "history", "hashed", "other")}
    found = change(values, torch.arange(2))
    assert {name: set(rows.flatten().tolist()) for name, rows in found.items()} == {
        "user_id": {1},
        "history": {0},
        "hashed": {0},
        "other": {2},
    }
