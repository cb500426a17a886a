"""Where computing is done: small work on the event loop, large work in threads so that it holds nobody up.

Deliberately does not know what is computed.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_LARGEST_INLINE = 32
"""Queries. Encoding, embedding or merging as many takes under a millisecond. A trip to a thread takes about a tenth,
and what is computed there competes for the interpreter."""
_NUM_THREADS = 2

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Offload:
    """A few threads for large work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="offload")

    async def run(self, num_queries: int, compute: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Computes something for so many queries."""
        if num_queries <= _LARGEST_INLINE:
            return compute(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: compute(*args, **kwargs))

    def close(self) -> None:
        """Lets go of the threads; work that nobody waits for is dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)
