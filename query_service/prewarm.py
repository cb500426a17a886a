"""The hottest queries, embedded by the standby version before it answers.

Deliberately does not know how a query is embedded, nor when the versions change places. Live queries go first: it
works in small steps, away from the event loop, and rests four times as long as a step took.
"""

import asyncio
import logging
import time

from query_service.embed import Embedder
from query_service.hot import HotQueries
from query_service.versions import Pin, Versions

_STEP = 8
"""Queries at once."""
_REST = 4.0
"""Times that the step took."""
_AGAIN_S = 30.0
"""What has become hot meanwhile is added."""

_log = logging.getLogger(__name__)


class Prewarmer:
    """Follows the standby version."""

    def __init__(self, versions: Versions, embedder: Embedder, hot: HotQueries, poll_interval_s: float) -> None:
        """Nothing is embedded before `follow`.

        Args:
            versions: Which version stands by.
            embedder: Embeds.
            hot: What is embedded.
            poll_interval_s: Pause between two looks at the standby version.
        """
        self._versions = versions
        self._embedder = embedder
        self._hot = hot
        self._poll_interval_s = poll_interval_s
        self._warmed = b""
        """The fingerprint of the tower that was warmed last; the tower itself would be kept alive."""
        self._again_at_s = 0.0

    async def follow(self) -> None:
        """Warms each standby version once it is loaded, and now and then again, until cancelled."""
        while True:
            try:
                await self._look()
            except Exception:  # Without it the version answers all the same.
                _log.exception("the standby version is not warmed")
            await asyncio.sleep(self._poll_interval_s)

    async def _look(self) -> None:
        pin = self._versions.standby_pin
        if pin is not None and (pin.fingerprint != self._warmed or time.monotonic() >= self._again_at_s):
            self._warmed, self._again_at_s = pin.fingerprint, time.monotonic() + _AGAIN_S
            await self._warm(pin)

    async def _warm(self, pin: Pin) -> None:
        queries, num_warmed = self._hot.hottest(), 0
        for first in range(0, len(queries), _STEP):
            standby = self._versions.standby_pin
            if standby is None or standby.tower is not pin.tower:
                return
            started_s = time.monotonic()
            num_warmed += await self._embedder.embed_ahead(queries[first : first + _STEP], pin)
            await asyncio.sleep(_REST * (time.monotonic() - started_s))
        if num_warmed:
            _log.info("version %d has embedded %d hot queries ahead", pin.version, num_warmed)
