"""The deployment record by hand, on a folder store."""

from pathlib import Path

import pytest
from command_outcome import Twotower
from toy_checkpoint import toy_model

from towers.checkpoint import CheckpointStore
from towers.deployment import DeploymentStore
from towers.store import Store

NOBODY = ("--shards", "127.0.0.1:1,127.0.0.1:2", "--query-services", "127.0.0.1:3")


def test_round_trip(twotower: Twotower, store: Store) -> None:
    at = ("--store", store.url)
    assert "version 1 stands by; staged by hand" in twotower("stage", "1", *at).out

    refused = twotower("promote", *at, *NOBODY)
    assert (refused.exit_code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert "version 1 is not promoted: replicas (wait): shard 0/2 at 127.0.0.1:1 is not reachable" in refused.err
    assert "--force" in refused.err

    forced = twotower("promote", *at, *NOBODY, "--force")
    assert forced.exit_code == 0
    assert "revision 2: version 1 is live; promoted by hand, by force although replicas (wait)" in forced.out

    assert twotower("stage", "1", *at).exit_code == 2
    assert twotower("stage", "2", *at).out.startswith("revision 3: version 1 is live, version 2 stands by;")
    never_live = twotower("rollback", *at)
    assert (never_live.exit_code, never_live.err.count("\n")) == (2, 1)
    assert "version 2 stands by but was not live" in never_live.err

    assert twotower("promote", *at, *NOBODY, "--force").out.startswith(
        "revision 4: version 2 is live, version 1 stands"
    )
    rolled_back = twotower("rollback", *at)
    assert rolled_back.out.startswith("revision 5: version 1 is live, version 2 stands by and is held; rolled back")
    assert [record.revision for record in DeploymentStore(store).history()] == [1, 2, 3, 4, 5]


def test_canary(twotower: Twotower, store: Store) -> None:
    at = ("--store", store.url)
    twotower("stage", "1", *at)
    twotower("promote", *at, *NOBODY, "--force")
    twotower("stage", "2", *at)

    refused = twotower("canary", "0.05", *at, *NOBODY)
    assert (refused.exit_code, refused.err.count("\n")) == (1, 1)
    assert "version 2 gets no share of the requests: replicas (wait)" in refused.err

    begun = twotower("canary", "0.05", *at, *NOBODY, "--force").out
    assert (
        "version 1 is live, version 2 stands by and answers 5.0% of the requests; a canary by hand, by force" in begun
    )
    status = twotower("status", *at, *NOBODY)
    assert "version 2 stands by and answers 5.0% of the requests" in status.out
    assert "0 of 1000 requests answered" in status.out
    seen = twotower("status", *at, *NOBODY, "--json").json
    assert seen["deployment"]["canary_share"] == 0.05
    assert [part["num_requests"] for part in seen["traffic"]] == [0, 0]

    ended = twotower("canary", "0", *at).out
    assert ended.startswith("revision 5: version 1 is live, version 2 stands by and is held; canary ended by hand")
    assert twotower("canary", "0", *at).exit_code == 2
    assert "SHARE" in twotower("canary", "2", *at).err


def test_the_live_version_is_staged_on_another_layout(twotower: Twotower, store: Store) -> None:
    at = ("--store", store.url)
    twotower("stage", "1", *at)
    twotower("promote", *at, *NOBODY, "--force")
    assert "version 1 on 3 shards stands by; staged by hand" in twotower("stage", "1", *at, "--num-shards", "3").out

    layouts = ("--shards", "127.0.0.1:1|127.0.0.1:4,127.0.0.1:2;127.0.0.1:5,127.0.0.1:6,127.0.0.1:7", *NOBODY[2:])
    status = twotower("status", *at, *layouts)
    for words in ("shard 0/2", "shard 2/3 at 127.0.0.1:7: is not reachable", "1/3"):
        assert words in status.out
    seen = twotower("status", *at, *layouts, "--json").json
    places = [(replica["shard"], replica["num_shards"]) for replica in seen["replicas"]]
    assert places == [(0, 2), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (None, None)]
    (replicas,) = [gate["explanation"] for gate in seen["gates"] if gate["name"] == "replicas"]
    assert "shard 0/3 at 127.0.0.1:5" in replicas
    assert "0/2" not in replicas

    forced = twotower("promote", *at, *layouts, "--force").out
    assert "version 1 on 3 shards is live, version 1 stands by and is held; promoted by hand" in forced


def test_stage_names_the_published_versions(twotower: Twotower, store: Store) -> None:
    outcome = twotower("stage", "9", "--store", store.url)
    assert (outcome.exit_code, outcome.err) == (1, "error: checkpoint 9 is not published; published: [1, 2]\n")
    assert DeploymentStore(store).history() == []


def test_checkpoints(twotower: Twotower, store: Store, folder_url: str) -> None:
    at = ("--store", store.url)
    twotower("stage", "1", *at)
    twotower("promote", *at, *NOBODY, "--force")
    twotower("stage", "2", *at)
    twotower("promote", *at, *NOBODY, "--force")
    twotower("rollback", *at)
    CheckpointStore(store).publish(toy_model(seed=3).draft())
    (Path(folder_url) / "checkpoints/3/manifest.json").write_text("{}")
    rows = twotower("checkpoints", *at, "--json").json
    assert [(row["version"], row["slot"], row["held"]) for row in rows] == [
        (1, "live", False),
        (2, "standby", True),
        (3, "", False),
    ]
    assert [row.get("dim") for row in rows] == [8, 12, None]
    assert rows[1]["metrics"] == {"test.recall_at_10": 0.2, "validation.recall_at_10": 0.5}
    assert "its manifest is not valid" in rows[2]["error"]

    table = twotower("checkpoints", *at).out
    assert "test.recall_at_10" in table
    assert "validation.recall_at_10" not in table
    for words in ("0.2000", "standby (held)", "live", "damaged: checkpoint 3"):
        assert words in table


def test_no_checkpoint_yet(twotower: Twotower, folder_url: str) -> None:
    outcome = twotower("checkpoints", "--store", folder_url)
    assert outcome.exit_code == 0
    assert f"twotower train CONFIG.toml --store {folder_url}" in outcome.out
    assert twotower("checkpoints", "--store", folder_url, "--json").json == []


def test_status_when_nothing_runs(twotower: Twotower, store: Store) -> None:
    twotower("stage", "1", "--store", store.url)
    outcome = twotower("status", "--store", store.url, *NOBODY)
    assert (outcome.exit_code, outcome.err) == (0, "")
    for words in (
        "Deployment revision 1: nothing is live, version 1 stands by",
        "Published: 1, 2",
        "next step: stage version 2",
        "is not reachable",
        "Gates of version 1",
        "golden replay",
        "offline recall",
        "staged by hand",
    ):
        assert words in outcome.out

    seen = twotower("status", "--store", store.url, *NOBODY, "--json").json
    assert (seen["deployment"]["standby_version"], seen["published"]) == (1, [1, 2])
    assert [replica["address"] for replica in seen["replicas"]] == ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
    assert {replica["error"] for replica in seen["replicas"]} == {"is not reachable"}
    assert {gate["name"]: gate["outcome"] for gate in seen["gates"]} == {
        "replicas": "wait",
        "golden replay": "wait",
        "item count": "wait",
        "offline recall": "pass",
        "index recall": "wait",
        "scores": "wait",
    }
    assert [record["reason"] for record in seen["history"]] == ["staged by hand"]


def test_the_store_comes_from_the_environment(
    twotower: Twotower, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOTOWER_STORE", store.url)
    assert len(twotower("checkpoints", "--json").json) == 2
