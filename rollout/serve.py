"""The rollout controller as a process.

Deliberately does not know the policy; it repeats the controller's step until it is told to stop.
"""

import asyncio
import contextlib
import logging

from rollout.controller import Controller
from rollout.overview import Observer
from rollout.settings import RolloutSettings
from rollout.statuses import StatusCollector
from towers.rpc import until_stopped
from towers.store import Store

_log = logging.getLogger(__name__)


def run(settings: RolloutSettings) -> None:
    """Blocks until SIGTERM or SIGINT.

    Raises:
        InvalidInputError: the store's URL is not valid.
    """
    asyncio.run(_run(settings))


async def _run(settings: RolloutSettings) -> None:
    store = Store(settings.store)
    stopped = asyncio.create_task(until_stopped())
    async with StatusCollector(settings.shards, settings.query_services) as collector:
        controller = Controller(store, Observer(store, collector, settings.thresholds))
        _log.info("the rollout controller follows %s", store.url)
        loop = asyncio.create_task(_repeat(controller, settings.poll_interval_s))
        await asyncio.wait((stopped, loop), return_when=asyncio.FIRST_COMPLETED)
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop
    _log.info("the rollout controller has stopped")


async def _repeat(controller: Controller, poll_interval_s: float) -> None:
    while True:
        await controller.step()
        await asyncio.sleep(poll_interval_s)
