"""One stream of queries: so many under way at once, answered in their order, each of which may fail alone.

Deliberately does not know how a query is answered. The caller's pace is the pace: nothing is read while the answers
that are under way or wait to be taken are as many as may be.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any, TypeVar

from towers.errors import NotReadyError

_Query = TypeVar("_Query")
_Answer = TypeVar("_Answer")


async def answer_stream(
    queries: AsyncIterable[_Query],
    answer: Callable[[int, _Query], Awaitable[_Answer]],
    write: Callable[[_Answer], Awaitable[None]],
    max_in_flight: int,
    draining: asyncio.Event,
) -> None:
    """Answers a stream to its end. Cancelled, it cancels all that is under way.

    Args:
        queries: As they come.
        answer: Answers one, given its position from 0; fails only when the whole stream is to fail.
        write: Sends an answer; returns when there is room for the next.
        max_in_flight: Queries read whose answers are not sent yet.
        draining: Once set, no more queries are read, and those that were are answered.

    Raises:
        NotReadyError: the service drains; the queries without an answer are to be asked elsewhere.
    """
    room = asyncio.Semaphore(max_in_flight)
    under_way: deque[asyncio.Future[_Answer]] = deque()
    arrived = asyncio.Semaphore(0)

    async def read() -> None:
        await room.acquire()
        position = 0
        async for query in queries:
            under_way.append(asyncio.ensure_future(answer(position, query)))
            arrived.release()
            position += 1
            await room.acquire()

    async def stop_reading_at_drain() -> None:
        await draining.wait()
        reader.cancel()

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: arrived.release())
    stopper = asyncio.create_task(stop_reading_at_drain())
    try:
        while True:
            await arrived.acquire()
            if not under_way:
                break
            await write(await under_way[0])
            under_way.popleft()
            room.release()
        if reader.cancelled():
            raise NotReadyError("this replica is draining; ask the queries that have no answer again, elsewhere")
        reader.result()
    finally:
        left: list[asyncio.Future[Any]] = [reader, stopper, *under_way]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
