import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from child_process import tied_python

from towers.errors import ConflictError, InvalidInputError, NotFoundError, StoreUnavailableError
from towers.store import Store


def test_objects_are_put_once_and_come_back(store_url: str) -> None:
    store = Store(store_url)
    content = bytes(range(256)) * 10
    store.put_new("a/b/c.bin", content)
    store.put_new("a/empty", b"")
    with pytest.raises(ConflictError, match=r"c[.]bin exists already"):
        store.put_new("a/b/c.bin", b"other")
    assert store.get("a/b/c.bin") == content
    assert store.get("a/empty") == b""
    assert Store(store_url).get("a/b/c.bin") == content


def test_listings(store_url: str) -> None:
    store = Store(store_url)
    assert store.files("versions") == {}
    assert store.folders("versions") == []
    for path in ("versions/1/a", "versions/1/deep/b", "versions/22/a", "versions/file", "versions2/a", "other"):
        store.put_new(path, path.encode())
    assert store.files("versions") == {
        path: len(path) for path in ("versions/1/a", "versions/1/deep/b", "versions/22/a", "versions/file")
    }
    assert sorted(store.folders("versions")) == ["1", "22"]


def test_delete(store_url: str) -> None:
    store = Store(store_url)
    store.put_new("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert store.files("a") == {}
    with pytest.raises(NotFoundError, match="a/b is not in the store"):
        store.get("a/b")
    store.put_new("a/b", b"2")
    assert store.get("a/b") == b"2"


def test_one_of_many_threads_wins_each_object(store_url: str) -> None:
    num_racers, num_rounds = 4, 25
    barrier = threading.Barrier(num_racers)

    def race(racer: int) -> list[int]:
        store = Store(store_url)
        wins = []
        for number in range(num_rounds):
            barrier.wait()
            try:
                store.put_new(f"race/{number}", f"{racer}".encode() * 1000)
            except ConflictError:
                continue
            wins.append(number)
        return wins

    with ThreadPoolExecutor(num_racers) as racers:
        wins = list(racers.map(race, range(num_racers)))
    assert Counter(number for own in wins for number in own) == Counter(range(num_rounds))
    store = Store(store_url)
    for racer, own in enumerate(wins):
        assert all(store.get(f"race/{number}") == f"{racer}".encode() * 1000 for number in own)


_RACER = """
import sys
from towers.errors import ConflictError
from towers.store import Store

store = Store(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    try:
        store.put_new("race/" + line.strip(), sys.argv[2].encode() * 1000)
        print("won", flush=True)
    except ConflictError:
        print("lost", flush=True)
"""


@pytest.mark.parametrize(("kind", "num_rounds"), [("folder", 200), ("s3", 25)])
def test_one_of_many_processes_wins_each_object(request: pytest.FixtureRequest, kind: str, num_rounds: int) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    racers = [
        subprocess.Popen(tied_python(_RACER, url, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in "xyz"
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        store = Store(url)
        winners: Counter[str] = Counter()
        for number in range(num_rounds):
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{number}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
            assert sorted(answers) == ["lost", "lost", "won"]
            winner = "xyz"[answers.index("won")]
            assert store.get(f"race/{number}") == winner.encode() * 1000
            winners[winner] += 1
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert winners.total() == num_rounds


def test_what_a_killed_writer_leaves_is_not_seen(folder_url: str) -> None:
    store = Store(folder_url)
    store.put_new("a/whole", b"whole")
    # LocalStore writes beside the target, as `name#1`, and links it when whole.
    Path(folder_url, "a/half#1").write_bytes(b"ha")
    assert store.files("a") == {"a/whole": 5}
    assert store.folders("") == ["a"]
    with pytest.raises(NotFoundError):
        store.get("a/half")
    store.put_new("a/half", b"now whole")
    assert store.get("a/half") == b"now whole"


_DISK_FULL = """
import resource, sys
from towers.errors import StoreUnavailableError
from towers.store import Store

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Store(sys.argv[1]).put_new("a/large", b"x" * 100_000)
except StoreUnavailableError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_leaves_nothing(folder_url: str) -> None:
    done = subprocess.run(tied_python(_DISK_FULL, folder_url), capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert [path for path in Path(folder_url).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("url", ["", "ftp://host/x", "s3://", "http://host"])
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="store"):
        Store(url)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="file"):
        Store(str(tmp_path / "file" / "store"))


def test_folder_urls_and_paths_are_the_same(tmp_path: Path) -> None:
    Store(f"file://{tmp_path}/store").put_new("a", b"1")
    assert Store(str(tmp_path / "store")).get("a") == b"1"
    assert Store(f"{tmp_path}/store/").get("a") == b"1"


def test_a_server_that_is_down(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = Store(s3_url)
    for act in (
        lambda: store.get("a"),
        lambda: store.put_new("a", b""),
        lambda: store.files("a"),
        lambda: store.folders("a"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StoreUnavailableError) as caught:
            act()
        assert "\n" not in str(caught.value), "one clear line"


def test_plain_http_must_be_allowed(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreUnavailableError):
        Store(s3_url).get("a")


def test_a_bucket_that_is_missing_is_no_empty_store(s3_url: str) -> None:
    store = Store("s3://no-such-bucket-here/prefix")
    for act in (lambda: store.files("a"), lambda: store.folders("a"), lambda: store.put_new("a", b"")):
        with pytest.raises(StoreUnavailableError):
            act()
