"""What changed in the catalogue after a state, for the items of one shard.

Deliberately does not know what is done with it. Each commit of the catalogue is read once, however many indexes of a
process ask for it.
"""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

import pyarrow as pa

from towers.catalogue import Catalogue, Commit, last_states, partition
from towers.errors import NotFoundError

_MAX_CACHED_ROWS = 200_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """The last state of each item that changed."""

    catalogue_version: str
    """The state of the catalogue that these changes lead to."""
    upserts: pa.Table
    """`item_id`, unique, and all attributes that the items have now."""
    deleted_ids: tuple[str, ...]
    num_commits: int = 1
    """Of the log, in which they were written."""


class ChangeFeed:
    """The changes of one shard. All methods block; any thread may call them."""

    def __init__(self, catalogue: Catalogue, shard: int, num_shards: int) -> None:
        self._catalogue = catalogue
        self._shard = shard
        self._num_shards = num_shards
        self._commits: OrderedDict[int, Commit] = OrderedDict()
        self._lock = threading.Lock()

    def since(self, catalogue_version: str) -> Changes | None:
        """What changed after a state of the catalogue; no changes, at that state, when it is the newest.

        Returns:
            None when the way from there to now is not known, because a tool rewrote the items or removed a part of the
            log: what was built from that state cannot catch up and is built anew.

        Raises:
            StoreUnavailableError: try again.
            CorruptArtefactError: another tool wrote something that the catalogue does not allow.
        """
        with self._lock:
            span = self._catalogue.commits_since(catalogue_version)
            if span is None:
                return None
            try:
                read = self._catalogue.commits([number for number in span.numbers if number not in self._commits])
            except NotFoundError as error:
                _log.warning("the catalogue's changes after %s cannot be followed: %s", catalogue_version, error)
                return None
            for commit in read:
                self._commits[commit.number] = Commit(
                    commit.number, partition(commit.rows, self._shard, self._num_shards)
                )
            commits = [self._commits[number] for number in span.numbers]
            self._forget()
        upserts, deletes = last_states([commit.rows for commit in commits])
        return Changes(span.version, upserts, tuple(deletes.to_pylist()), len(commits))

    def _forget(self) -> None:
        """Keeps the newest commits."""
        num_rows = sum(commit.rows.num_rows + 1 for commit in self._commits.values())
        for number in sorted(self._commits):
            if num_rows <= _MAX_CACHED_ROWS:
                return
            num_rows -= self._commits.pop(number).rows.num_rows + 1
