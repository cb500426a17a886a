"""Training queries as windows of histories, beside the same queries one by one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import TrainerConfig
from trainer.data import InteractionLog
from trainer.encode import EncodedQueries, EncodedUsers, EncodedWindows
from trainer.model import TwoTowers
from trainer.run import Prepared, prepare

Configure = Callable[..., TrainerConfig]


def windows_of(prepared: Prepared) -> EncodedWindows:
    queries = prepared.examples.queries
    assert isinstance(queries, EncodedWindows)
    return queries


def known(log: InteractionLog, prepared: Prepared, start: int, stop: int) -> list[int]:
    """Ids of the known items in a stretch of the log."""
    tokens = [str(item) for item in log.items[start:stop].tolist()]
    ids = prepared.encoder.query.encode({"history": [[token] for token in tokens]}, len(tokens))["history"]
    return [token_id for token_id in ids[:, 0].tolist() if token_id]


@pytest.mark.parametrize("min_count", [1, 11])
@pytest.mark.parametrize("max_length", [1, 3, 5, 20])
def test_a_query_of_a_window_comes_after_its_newest_items(
    world: Path, configure: Configure, max_length: int, min_count: int
) -> None:
    """With a min_count of 11 about half of the items are unknown, and leave nothing in a history."""
    config = configure(history__pooling="transformer", history__max_length=max_length, item_id__min_count=min_count)
    prepared = prepare(config, world)
    windows, log, train = windows_of(prepared), prepared.log, prepared.split.train
    assert windows.interactions(torch.arange(len(windows))).tolist() == list(range(len(train)))
    num_full = 0
    for window in range(len(windows)):
        rows = torch.tensor([window])
        features, places = windows.batch(rows), windows.places(rows)
        history = features["history"][0].tolist()
        assert len(history) <= max_length
        for query, (row, step) in zip(windows.interactions(rows).tolist(), places.tolist(), strict=True):
            position = train[query]
            before = known(log, prepared, log.starts[position], position)
            assert row == 0
            assert history[:step] == before[len(before) - step :]
            # Only what was the first of all is asked after nothing.
            assert step > 0 or not before
            num_full += step == min(len(before), max_length)
            assert (
                features["user_id"].tolist()
                == prepared.encoder.queries(train[[query]]).batch(torch.tensor([0]))["user_id"].tolist()
            )
    # The newest query of each user has all of the history that it has when it is served.
    assert num_full >= len(np.unique(log.users))
    if max_length == 20:
        assert num_full == len(train)


def test_one_pass_gives_the_embeddings_of_queries_one_by_one(world: Path, configure: Configure) -> None:
    config = configure(history__pooling="transformer", history__max_length=20, item_id__min_count=1)
    prepared = prepare(config, world)
    torch.manual_seed(0)
    model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model).eval()
    windows = windows_of(prepared)
    rows = torch.tensor([5, 0, 17])
    one_by_one = prepared.encoder.queries(prepared.split.train)
    together = model.query(windows.batch(rows), windows.places(rows))
    alone = model.query(one_by_one.batch(windows.interactions(rows)))
    assert len(together) == 24
    assert torch.allclose(together, alone, atol=1e-6)
    direction = torch.randn(together.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(model.query.parameters())
    gradients = [torch.autograd.grad((e * direction).sum(), parameters) for e in (together, alone)]
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_a_step_holds_about_as_many_queries_as_the_batch(world: Path, configure: Configure) -> None:
    windows = windows_of(prepare(configure(history__pooling="transformer", item_id__min_count=1), world))
    assert len(windows.users) == 480
    assert len(windows) == 120
    assert [windows.rows_per_step(size) for size in (1, 32, 480)] == [1, 8, 120]


def test_beside_another_history_queries_go_one_by_one(world: Path, configure: Configure) -> None:
    toml = configure(history__pooling="transformer").model_dump(mode="json")
    toml["features"].append({"name": "recent", "owner": "query", "kind": "sequence", "items": "item_id"})
    prepared = prepare(TrainerConfig.model_validate_json(json.dumps(toml)), world)
    assert isinstance(prepared.examples.queries, EncodedQueries)


def test_a_user_asks_for_all_of_hers_from_a_sample_of_them(world: Path, configure: Configure) -> None:
    config = configure(training__history_share=0.5, history__max_length=20, item_id__min_count=1)
    prepared = prepare(config, world)
    users, log, train = prepared.examples.queries, prepared.log, prepared.split.train
    assert isinstance(users, EncodedUsers)
    assert [users.rows_per_step(size) for size in (1, 32, 480)] == [1, 4, 60]
    rows = torch.tensor([7, 3])
    asked = train[users.interactions(rows).numpy()]
    assert log.users[asked].tolist() == [7] * 8 + [3] * 8
    assert users.askers(rows).tolist() == [0] * 8 + [1] * 8
    torch.manual_seed(0)
    histories = [users.batch(rows)["history"] for _ in range(200)]
    for row, user in enumerate(rows.tolist()):
        own = train[users.starts[user : user + 2].numpy() - [0, 1]]  # The first and the last.
        whole = known(log, prepared, own[0], own[1] + 1)
        samples = [[entry for entry in history[row].tolist() if entry] for history in histories]
        assert all([entry for entry in whole if entry in sample] == sample for sample in samples)
        assert {entry for sample in samples for entry in sample} == set(whole)
        assert 3.6 < np.mean([len(sample) for sample in samples]) < 4.4
