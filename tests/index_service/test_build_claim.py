"""The claim to build: one replica holds it, and one that is gone loses it."""

import threading

from index_service.artefact import ArtefactStore
from index_service.claim import BuildClaim
from towers.store import Store


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def claims(url, clock, num=2):
    return [BuildClaim(Store(url), "indexes/1/0-of-1/claim", 10.0, clock) for _ in range(num)]


def test_one_holds_it_until_it_is_released(store_url):
    clock = Clock()
    one, other = claims(store_url, clock)
    assert one.try_take()
    assert one.try_take()
    assert not other.try_take()
    one.release()
    assert other.try_take()
    assert not one.try_take()
    one.release()  # Not ours: stays.
    assert not one.try_take()
    assert len(Store(store_url).files("indexes")) == 1
    other.release()
    assert not Store(store_url).files("indexes")


def test_a_holder_that_renews_keeps_it_and_one_that_is_gone_loses_it(folder_url):
    clock = Clock()
    one, other = claims(folder_url, clock)
    assert one.try_take()
    for _ in range(5):
        assert not other.try_take()
        clock.now_s += 9.0
        assert one.renew()
    assert not other.try_take()
    clock.now_s += 9.9
    assert not other.try_take()
    clock.now_s += 0.2
    assert other.try_take()
    # The first one was only slow; it learns that it lost, and then waits like anybody.
    assert not one.renew()
    assert not one.try_take()
    clock.now_s += 11.0
    assert one.try_take()
    assert len(Store(folder_url).files("indexes")) == 1


def test_of_many_that_want_it_at_once_one_gets_it(store_url):
    clock = Clock()
    outcomes = []
    threads = [
        threading.Thread(target=lambda claim=claim: outcomes.append(claim.try_take()))
        for claim in claims(store_url, clock, num=6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]


def test_a_claim_is_no_artefact(folder_url):
    artefacts = ArtefactStore(Store(folder_url), 0, 1)
    assert artefacts.claim(1, stale_after_s=10.0).try_take()
    assert artefacts.newest(1) is None
    assert not artefacts.claim(1, stale_after_s=10.0).try_take()
    assert artefacts.claim(2, stale_after_s=10.0).try_take()
