"""`twotower retrieve` and `twotower status` against the whole stack, and how a value is read."""

import re

import pytest
from command_outcome import Twotower
from toy_checkpoint import toy_items, toy_model

from cli.local_stack import LocalStack
from cli.retrieve import parse_value, split_feature
from towers.errors import InvalidInputError

QUERY = ("user_id=2", "history=1,2")
KINDS = {
    "user_id": "categorical",
    "history": "sequence",
    "genres": "categorical_list",
    "age": "number",
    "at": "timestamp",
    "words": "text",
    "image": "vector",
}


def test_json(stack: LocalStack, twotower: Twotower) -> None:
    outcome = twotower("retrieve", *QUERY, "-k", "3", "--json", "--address", stack.query_address)
    assert (outcome.exit_code, outcome.err) == (0, "")
    answer = outcome.json
    model = toy_model()
    item_ids, scores = model.nearest({"user_id": "2", "history": ["1", "2"]}, toy_items()["item_id"].to_pylist(), 3)
    assert [item["item_id"] for item in answer["items"]] == item_ids
    assert [item["score"] for item in answer["items"]] == pytest.approx(list(scores), abs=1e-5)
    assert [item["attributes"] for item in answer["items"]] == [{"title": f"Title {number}"} for number in item_ids]
    assert (answer["checkpoint_version"], answer["shards_answered"], answer["shards_total"]) == (1, 2, 2)
    assert answer["degraded_reasons"] == []
    assert answer["milliseconds"] > 0
    again = twotower("retrieve", *QUERY, "-k", "3", "--json", "--address", stack.query_address).json
    assert again["embedding_cached"]


def test_table(stack: LocalStack, twotower: Twotower) -> None:
    outcome = twotower("retrieve", *QUERY, "-k", "2", "--address", stack.query_address)
    assert (outcome.exit_code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert re.findall(r"[\w#]+", lines[1]) == ["#", "item_id", "title", "score"]
    assert re.fullmatch(r"│ 1 │ (\d+) +│ Title \1 +│ \d\.\d{4} │", lines[3])
    assert re.fullmatch(r"version 1, [\d.]+ ms, 2 of 2 shards(, embedding from the cache)?", lines[-1])


def test_attributes_and_exclusion(stack: LocalStack, twotower: Twotower) -> None:
    at = ("--address", stack.query_address, "--json")
    best = [item["item_id"] for item in twotower("retrieve", *QUERY, "-k", "4", *at).json["items"]]
    answer = twotower(
        "retrieve",
        *QUERY,
        "-k",
        "2",
        *("--exclude", best[0], "--exclude", best[2]),
        *("--attribute", "year", "--attribute", "genres"),
        *at,
    ).json
    assert [item["item_id"] for item in answer["items"]] == [best[1], best[3]]
    rows = {row["item_id"]: row for row in toy_items().to_pylist()}
    for item in answer["items"]:
        row = rows[item["item_id"]]
        assert item["attributes"] == {"year": row["year"], "genres": row["genres"]}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["usr_id=2"], 2, "it reads history (sequence), user_id (categorical)"),
        (["user_id=2", "--attribute", "colour"], 2, "colour"),
        (["user_id=2", "-k", "1000000"], 2, "k"),
        (["user_id=2", "--min-shards", "3"], 2, "min_shards"),
    ],
)
def test_what_the_service_refuses(
    stack: LocalStack, twotower: Twotower, arguments: list[str], exit_code: int, words: str
) -> None:
    outcome = twotower("retrieve", *arguments, "--address", stack.query_address)
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (exit_code, "", 1), outcome
    assert words in outcome.err


def test_status_of_the_running_stack(stack: LocalStack, twotower: Twotower) -> None:
    where = ("--shards", ",".join(stack.shard_addresses), "--query-services", stack.query_address)
    seen = twotower("status", "--store", stack.store, *where, "--json").json
    assert (seen["deployment"]["live_version"], seen["deployment"]["standby_version"]) == (1, None)
    assert seen["next"] == "wait: version 1 is live; no newer one is published"
    assert [replica["error"] for replica in seen["replicas"]] == ["", "", ""]
    versions = [replica["versions"] for replica in seen["replicas"]]
    assert all([load["version"], load["state"]] == [1, "available"] for [load] in versions)
    assert sum(load["num_items"] for [load] in versions) == toy_items().num_rows
    table = twotower("status", "--store", stack.store, *where).out
    for words in ("version 1 is live", "shard 1", "available", "Flat", "promoted by the rollout controller"):
        assert words in table


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("user_id", "42", "42"),
        ("user_id", "a,b=c", "a,b=c"),
        ("user_id", "", ""),
        ("words", "red, shoes", "red, shoes"),
        ("history", "50,181", ["50", "181"]),
        ("history", "50, 181", ["50", "181"]),
        ("history", "", []),
        ("history", '"a,b",c', ["a,b", "c"]),
        ("genres", "Drama", ["Drama"]),
        ("age", "1e3", 1000.0),
        ("at", "1700000000", 1_700_000_000.0),
        ("image", "0.5,-1, 2", [0.5, -1.0, 2.0]),
    ],
)
def test_a_value_is_read_as_its_kind_wants_it(name: str, text: str, value: object) -> None:
    assert split_feature(f"{name}={text}") == (name, text)
    assert parse_value(name, text, KINDS) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("age", "old", "feature 'age': 'old' is not a number"),
        ("age", "", "feature 'age': '' is not a number"),
        ("image", "1,x", "feature 'image': 'x' is not a number"),
        ("agee", "1", "feature 'agee': the live version does not read it; it reads age (number), at (timestamp)"),
    ],
)
def test_a_value_that_cannot_be_read(name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as failure:
        parse_value(name, text, KINDS)
    assert str(failure.value).startswith(words)
