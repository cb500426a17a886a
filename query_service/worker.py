"""One of several processes that share an address: `python -m query_service.worker PARENT_PID`, told the rest on stdin.

Deliberately does not know the others (`query_service.siblings`), nor when it is replaced (`query_service.workers`).
"""

import asyncio
import logging
import sys
from collections.abc import Callable

from query_service.serve import serving
from query_service.settings import QuerySettings
from query_service.siblings import Siblings
from query_service.workers import WorkerMessage, WorkerOrder
from towers import event_loop
from towers.errors import TwoTowerError
from towers.parent import end_with_parent, message_stream
from towers.rpc import until_stopped


def main(arguments: list[str]) -> int:
    """Entry point of the process; 0 after SIGTERM."""
    end_with_parent(int(arguments[0]))
    order = WorkerOrder.model_validate_json(sys.stdin.readline())
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s worker {order.number} %(name)s: %(message)s"
    )
    with message_stream() as messages:

        def say(message: WorkerMessage) -> None:
            print(message.model_dump_json(), file=messages, flush=True)

        try:
            event_loop.run(_serve_until_stopped(order, say))
        except TwoTowerError as error:
            say(WorkerMessage.of_failure(error))
            return 1
    return 0


async def _serve_until_stopped(order: WorkerOrder, say: Callable[[WorkerMessage], None]) -> None:
    # First, so that a signal during the start drains too.
    stopped = asyncio.create_task(until_stopped())
    siblings = Siblings(order.folder, order.number, joins_at_once=order.joins_at_once)
    async with serving(QuerySettings(**order.settings), siblings):
        await asyncio.wait((stopped, siblings.joined), return_when=asyncio.FIRST_COMPLETED)
        if siblings.joined.done():
            siblings.joined.result()
            say(WorkerMessage())
        await stopped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
