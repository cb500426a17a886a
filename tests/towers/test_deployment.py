import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from child_process import tied_python

from towers.deployment import (
    FOLDER,
    NO_DEPLOYMENT,
    Deployment,
    DeploymentStore,
    canaried,
    held,
    promoted,
    rolled_back,
    staged,
)
from towers.errors import ConflictError, CorruptArtefactError, InvalidInputError, StoreUnavailableError
from towers.store import Store


def _record(live: int | None, standby: int | None, is_held: bool = False, revision: int = 4) -> Deployment:
    return Deployment(
        revision=revision,
        live_version=live,
        standby_version=standby,
        held=is_held,
        reason="before",
        created=datetime.now(UTC),
    )


Transition = Callable[[Deployment], Deployment]


def _stage(version: int) -> Transition:
    return lambda current: staged(current, version, "test")


def _promote(current: Deployment) -> Deployment:
    return promoted(current, "test")


def _roll_back(current: Deployment) -> Deployment:
    return rolled_back(current, "test")


def _hold(current: Deployment) -> Deployment:
    return held(current, "test")


@pytest.mark.parametrize(
    ("live", "standby", "is_held", "act", "then"),
    [
        (None, None, False, _stage(1), (None, 1, False)),
        (None, 1, False, _stage(2), (None, 2, False)),
        (1, None, False, _stage(2), (1, 2, False)),
        (1, 2, False, _stage(3), (1, 3, False)),
        (1, 2, True, _stage(3), (1, 3, False)),
        (2, 3, True, _stage(3), (2, 3, False)),
        (None, 1, False, _promote, (1, None, False)),
        (1, 2, False, _promote, (2, 1, False)),
        (1, 2, True, _promote, (2, 1, False)),
        (2, 1, False, _roll_back, (1, 2, True)),
        (2, 1, True, _roll_back, (1, 2, True)),
        (2, 1, False, _hold, (2, 1, True)),
        (1, None, True, _hold, (1, None, True)),
    ],
)
def test_transitions(
    live: int | None,
    standby: int | None,
    is_held: bool,
    act: Transition,
    then: tuple[int | None, int | None, bool],
) -> None:
    current = _record(live, standby, is_held)
    after = act(current)
    assert (after.live_version, after.standby_version, after.held) == then
    assert after.revision == current.revision + 1
    assert after.reason == "test"
    assert after.created >= current.created
    assert current == _record(live, standby, is_held).model_copy(update={"created": current.created})


@pytest.mark.parametrize(
    ("live", "standby", "act", "reason"),
    [
        (1, None, _stage(1), "version 1 is live already"),
        (1, 2, _stage(1), "version 1 is live already"),
        (None, None, _promote, "no version stands by"),
        (1, None, _promote, "no version stands by"),
        (None, None, _roll_back, "to roll back to"),
        (1, None, _roll_back, "to roll back to"),
        (None, 1, _roll_back, "to roll back to"),
    ],
)
def test_transitions_that_make_no_sense(live: int | None, standby: int | None, act: Transition, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        act(_record(live, standby))


@pytest.mark.parametrize(
    ("live", "standby", "versions"),
    [(None, None, ()), (1, None, (1,)), (None, 2, (2,)), (2, 1, (2, 1)), (1, 2, (1, 2))],
)
def test_versions_named(live: int | None, standby: int | None, versions: tuple[int, ...]) -> None:
    assert _record(live, standby).versions == versions


def _canary(share: float) -> Transition:
    return lambda current: canaried(current, share, "test")


def _layouts(live: tuple[int | None, int | None], standby: tuple[int | None, int | None], **fields: bool) -> Deployment:
    slots = {
        "live_version": live[0],
        "live_num_shards": live[1],
        "standby_version": standby[0],
        "standby_num_shards": standby[1],
    }
    return _record(None, None).model_copy(update={**slots, **fields})


def test_a_canary_ends_with_the_record_that_began_it() -> None:
    canary = canaried(_record(1, 2), 0.1, "test")
    assert (canary.live, canary.standby, canary.canary_share) == ((1, None), (2, None), 0.1)
    for act in (_stage(3), _promote, _roll_back, _hold):
        assert act(canary).canary_share == 0.0
    assert _canary(0.2)(canary).canary_share == 0.2
    assert canaried(_record(1, 2, is_held=True), 0.1, "test").held


@pytest.mark.parametrize(
    ("live", "standby", "share", "reason"),
    [
        (1, 2, 0.0, "share = 0.0: give a number above 0"),
        (1, 2, 1.0, "share = 1.0: give a number above 0 and below 1"),
        (1, 2, float("nan"), "share = nan"),
        (1, None, 0.1, "no version stands by"),
        (None, 2, 0.1, "nothing is live"),
    ],
)
def test_a_canary_needs_two_slots(live: int | None, standby: int | None, share: float, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        canaried(_record(live, standby), share, "test")


def test_layouts_are_swapped_with_their_versions() -> None:
    staged_elsewhere = staged(_layouts((1, 2), (None, None)), 2, "test", 4)
    assert (staged_elsewhere.live, staged_elsewhere.standby) == ((1, 2), (2, 4))
    live_elsewhere = promoted(staged_elsewhere, "test")
    assert (live_elsewhere.live, live_elsewhere.standby, live_elsewhere.held) == ((2, 4), (1, 2), False)
    assert staged(live_elsewhere, 3, "test").standby == (3, 4), "the live one's layout"
    assert rolled_back(live_elsewhere, "test").live == (1, 2)


def test_the_former_layout_of_a_version_is_held() -> None:
    moved = promoted(staged(_layouts((1, None), (None, None)), 1, "test", 4), "test")
    assert (moved.live, moved.standby, moved.held, moved.versions) == ((1, 4), (1, None), True, (1,))
    with pytest.raises(InvalidInputError, match="version 1 is live already"):
        staged(moved, 1, "test")


@pytest.mark.parametrize(
    ("live", "standby", "num_shards", "versions"),
    [
        ((1, None), (2, None), 2, (1, 2)),
        ((1, 2), (2, 2), 2, (1, 2)),
        ((1, 2), (2, 4), 2, (1,)),
        ((1, 2), (2, 4), 4, (2,)),
        ((1, 2), (1, 4), 4, (1,)),
        ((1, 2), (2, 4), 3, ()),
        ((1, 2), (2, None), 3, (2,)),
        ((None, None), (None, None), 2, ()),
    ],
)
def test_a_shard_loads_the_versions_of_its_layout(
    live: tuple[int | None, int | None],
    standby: tuple[int | None, int | None],
    num_shards: int,
    versions: tuple[int, ...],
) -> None:
    assert _layouts(live, standby).versions_on(num_shards) == versions


def test_records_without_the_newer_fields_are_read(folder_url: str) -> None:
    Store(folder_url).put_new(
        f"{FOLDER}/1.json",
        b'{"revision": 1, "live_version": 3, "standby_version": 2, "held": false, "reason": "", '
        b'"created": "2026-01-01T00:00:00Z"}',
    )
    record = DeploymentStore(Store(folder_url)).current()
    assert (record.live, record.standby, record.canary_share) == ((3, None), (2, None), 0.0)


def test_history_is_the_audit_log(store_url: str) -> None:
    deployments = DeploymentStore(Store(store_url))
    assert deployments.current() == deployments.newer_than(NO_DEPLOYMENT) == NO_DEPLOYMENT
    assert deployments.history() == []
    records = []
    current = NO_DEPLOYMENT
    for version in range(1, 13):
        for act in (_stage(version), _promote):
            current = act(current)
            deployments.write(current)
            records.append(current)
    reader = DeploymentStore(Store(store_url))
    assert reader.current() == current
    assert current.revision == 24, "revisions order as numbers, not as text"
    assert reader.history() == records
    assert reader.newer_than(NO_DEPLOYMENT) == current
    assert reader.newer_than(records[10]) == current
    assert reader.newer_than(current) == current


def test_a_revision_is_written_once(store_url: str) -> None:
    deployments = DeploymentStore(Store(store_url))
    deployments.write(staged(NO_DEPLOYMENT, 1, "first"))
    with pytest.raises(ConflictError, match="revision 1 was written by somebody else"):
        deployments.write(staged(NO_DEPLOYMENT, 2, "second"))
    assert deployments.current().reason == "first"


class CountingStore(Store):
    """Counts what is asked of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_gets = 0
        self.num_listings = 0

    def get(self, path: str) -> bytes:
        self.num_gets += 1
        return super().get(path)

    def files(self, prefix: str) -> dict[str, int]:
        self.num_listings += 1
        return super().files(prefix)


def test_following_costs_one_small_read(folder_url: str) -> None:
    store = CountingStore(folder_url)
    deployments = DeploymentStore(store)
    current = NO_DEPLOYMENT
    for version in range(1, 6):
        current = staged(current, version, "test")
        deployments.write(current)
    store.num_gets = store.num_listings = 0
    assert deployments.newer_than(current) == current
    assert (store.num_gets, store.num_listings) == (1, 0)


_CONTROLLER = """
import sys
from towers.deployment import DeploymentStore, staged
from towers.errors import ConflictError
from towers.store import Store

deployments = DeploymentStore(Store(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    current = deployments.current()
    print(current.revision, flush=True)
    sys.stdin.readline()
    try:
        deployments.write(staged(current, int(sys.argv[2]), sys.argv[2]))
        print("won", flush=True)
    except ConflictError:
        print("lost", flush=True)
"""


@pytest.mark.parametrize(("kind", "num_rounds"), [("folder", 60), ("s3", 8)])
def test_of_controllers_that_race_exactly_one_wins(request: pytest.FixtureRequest, kind: str, num_rounds: int) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    controllers = [
        subprocess.Popen(tied_python(_CONTROLLER, url, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in "123"
    ]

    def tell_all() -> None:
        for controller in controllers:
            assert controller.stdin is not None
            controller.stdin.write("go\n")
            controller.stdin.flush()

    def lines() -> list[str]:
        return [controller.stdout.readline().strip() for controller in controllers if controller.stdout is not None]

    winners = []
    try:
        assert lines() == ["ready"] * 3
        for revision in range(num_rounds):
            tell_all()
            assert lines() == [str(revision)] * 3, "all have seen the same record"
            tell_all()
            answers = lines()
            assert sorted(answers) == ["lost", "lost", "won"]
            winners.append("123"[answers.index("won")])
    finally:
        for controller in controllers:
            controller.kill()
            controller.communicate()
    history = DeploymentStore(Store(url)).history()
    assert [record.reason for record in history] == winners
    assert [record.revision for record in history] == list(range(1, num_rounds + 1))


def test_threads_that_retry_lose_no_update(folder_url: str) -> None:
    num_writers, num_updates = 4, 10
    barrier = threading.Barrier(num_writers)

    def write(writer: int) -> None:
        deployments = DeploymentStore(Store(folder_url))
        barrier.wait()
        for update in range(num_updates):
            while True:
                try:
                    deployments.write(staged(deployments.current(), writer * 100 + update + 1, "test"))
                except ConflictError:
                    continue
                break

    with ThreadPoolExecutor(num_writers) as writers:
        list(writers.map(write, range(num_writers)))
    staged_versions = [record.standby_version for record in DeploymentStore(Store(folder_url)).history()]
    expected = [writer * 100 + update + 1 for writer in range(num_writers) for update in range(num_updates)]
    assert sorted(version for version in staged_versions if version is not None) == expected


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"{}", b"\xff", b'{"revision": 2}', b'{"revision": "x", "held": "maybe"}']
)
def test_a_corrupt_record_is_refused(folder_url: str, content: bytes) -> None:
    deployments = DeploymentStore(Store(folder_url))
    first = staged(NO_DEPLOYMENT, 1, "test")
    deployments.write(first)
    Path(folder_url, FOLDER, "2.json").write_bytes(content)
    for act in (deployments.current, deployments.history, lambda: deployments.newer_than(first)):
        with pytest.raises(CorruptArtefactError, match="deployment revision 2"):
            act()


def test_a_record_under_another_number_is_refused(folder_url: str) -> None:
    deployments = DeploymentStore(Store(folder_url))
    first = staged(NO_DEPLOYMENT, 1, "test")
    deployments.write(first)
    Path(folder_url, FOLDER, "2.json").write_text(first.model_dump_json())
    for act in (deployments.current, lambda: deployments.newer_than(first)):
        with pytest.raises(CorruptArtefactError, match="deployment revision 2: the record says 1"):
            act()


def test_other_files_are_no_records(folder_url: str) -> None:
    store = Store(folder_url)
    for path in ("latest.json", "1.json.bak", "x/3.json", "4"):
        store.put_new(f"{FOLDER}/{path}", b"{}")
    assert DeploymentStore(store).current() == NO_DEPLOYMENT


def test_a_store_that_is_down_is_no_empty_history(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    deployments = DeploymentStore(Store(s3_url))
    for act in (deployments.current, lambda: deployments.newer_than(NO_DEPLOYMENT)):
        with pytest.raises(StoreUnavailableError):
            act()
