"""Which replica builds an index, while the others wait for it: a claim in the object store.

Deliberately does not know what is built. A claim saves work and nothing depends on it: two builders at once are only a
waste, since one manifest wins.

A claim is a file whose number its holder raises now and then. Who sees the same number for a while, by a clock of its
own, takes the claim over by writing the next number first; so no two machines need clocks that agree.
"""

import time
from collections.abc import Callable

from towers.errors import ConflictError
from towers.store import Store


class BuildClaim:
    """One replica's view of a claim. All methods block and raise `StoreUnavailableError`."""

    def __init__(
        self, store: Store, folder: str, stale_after_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Claims nothing yet.

        Args:
            store: Where the claim is.
            folder: Holds the claim and nothing else.
            stale_after_s: How long a claim may stay unrenewed before somebody else takes it; several times the
                interval at which holders renew.
            now: Seconds of a clock that never goes back.
        """
        self._store = store
        self._folder = folder
        self._stale_after_s = stale_after_s
        self._now = now
        self._mine = 0
        self._seen = 0
        self._seen_since_s = 0.0

    def try_take(self) -> bool:
        """Takes the claim where nobody holds it or its holder is gone; True when it is ours. Call it now and then."""
        newest = max(self._numbers(), default=0)
        if newest == self._mine != 0:
            return True
        now_s = self._now()
        if newest != self._seen:
            self._seen, self._seen_since_s = newest, now_s
        if newest != 0 and now_s - self._seen_since_s < self._stale_after_s:
            return False
        return self._write(newest + 1)

    def renew(self) -> bool:
        """Says that the holder is alive; False when somebody else has taken the claim over."""
        return self._write(self._mine + 1)

    def release(self) -> None:
        """Gives the claim back, if it is ours."""
        if self._mine:
            self._store.delete(f"{self._folder}/{self._mine}")
            self._mine = 0

    def _write(self, number: int) -> bool:
        try:
            self._store.put_new(f"{self._folder}/{number}", b"")
        except ConflictError:
            return False
        self._mine = number
        for older in self._numbers():
            if older < number:
                self._store.delete(f"{self._folder}/{older}")
        return True

    def _numbers(self) -> list[int]:
        names = (path.rsplit("/", 1)[-1] for path in self._store.files(self._folder))
        return [int(name) for name in names if name.isdigit()]
