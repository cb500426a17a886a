"""Recent query embeddings in Redis. Every failure is a miss.

Deliberately does not know how an embedding is made. Holds nothing that cannot be lost.
"""

import asyncio
import logging
import random
import struct
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import redis.asyncio
import xxhash
from numpy.typing import NDArray
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from query_service.digest import DIGEST_BYTES

_HEADER = struct.Struct("<Q")
_CHECKSUM_BYTES = 8
_LARGEST_JITTER = 0.1
_NUM_CONNECTIONS = 32
_MOST_WRITES = 64
"""More writes than these are dropped: they are made again at the next miss."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 5.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class EmbeddingCache:
    """Embeddings by version and digest.

    1. A value is used only if it is exactly what was stored for this version and digest.
    2. A lookup takes no longer than the timeout; after a failure lookups are skipped until Redis answers again.
    3. Writes happen in the background.
    """

    def __init__(self, url: str, ttl_s: float, timeout_s: float, dtype: Literal["float32", "float16"]) -> None:
        """Connects at the first use.

        Args:
            url: `redis://…`, `rediss://…` or `unix://…`; empty: nothing is ever found or stored.
            ttl_s: Lifetime of an embedding, give or take 10 %, so that those stored together do not expire together.
            timeout_s: The longest that a lookup takes.
            dtype: Of what is stored. float16 takes half the room, and a score moves by up to 0.0005.
        """
        self.is_enabled = bool(url)
        self.num_hits = 0
        self.num_misses = 0
        self.num_errors = 0
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._form = _FORMS[dtype]
        self._commands: set[asyncio.Task[Any]] = set()
        self._num_writes = 0
        self._probing: asyncio.Task[None] | None = None
        # Only to look at until the first command.
        self._redis = redis.asyncio.Redis(
            connection_pool=redis.asyncio.BlockingConnectionPool.from_url(
                url or "redis://",
                max_connections=_NUM_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # The default tries again, for seconds.
                retry=Retry(NoBackoff(), 0),
                driver_info=None,
            )
        )

    @property
    def is_reachable(self) -> bool:
        """Whether the last call succeeded; True before the first."""
        return self._probing is None

    async def get(self, version: int, digests: Sequence[bytes], dim: int) -> list[NDArray[np.float32] | None]:
        """Looks embeddings up.

        Args:
            version: The checkpoint version.
            digests: B digests.
            dim: D.

        Returns:
            B embeddings `[D]`; None for a miss.
        """
        found: list[NDArray[np.float32] | None] = [None] * len(digests)
        if not self.is_enabled:
            return found
        if self.is_reachable:
            keys = [self._form.key(version, digest) for digest in digests]
            try:
                async with asyncio.timeout(self._timeout_s):
                    values = await asyncio.shield(self._started(self._read(keys)))
            except Exception as error:  # Whatever it is, the tower knows the answer.
                self._failed(error)
            else:
                for position, (value, digest) in enumerate(zip(values, digests, strict=True)):
                    if value is not None:
                        found[position] = self._form.embedding_in(value, version, digest, dim)
                        self.num_errors += found[position] is None
        num_hits = sum(embedding is not None for embedding in found)
        self.num_hits += num_hits
        self.num_misses += len(found) - num_hits
        return found

    def put(self, version: int, digests: Sequence[bytes], embeddings: NDArray[np.float32]) -> None:
        """Stores embeddings, later.

        Args:
            version: The checkpoint version.
            digests: B digests.
            embeddings: `[B, D]`
        """
        if not self.is_enabled or not self.is_reachable or self._num_writes >= _MOST_WRITES:
            return
        values = {
            self._form.key(version, digest): self._form.value(version, digest, embedding)
            for digest, embedding in zip(digests, embeddings, strict=True)
        }
        self._num_writes += 1
        self._started(self._write(values))

    async def close(self) -> None:
        """Drops what is under way and disconnects."""
        tasks = [*self._commands, *([self._probing] if self._probing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(RedisError):
            await self._redis.connection_pool.disconnect()

    def _started(self, command: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A command in a task of its own, which ends by itself: cancelled, it could lose a connection of the pool."""
        task = asyncio.create_task(command)
        self._commands.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._commands.discard(task)
        if not task.cancelled():
            # A failure after the lookup gave up concerns nobody; unread, asyncio would log it.
            task.exception()

    async def _read(self, keys: Sequence[str]) -> Sequence[Any]:
        return await self._redis.mget(keys)

    async def _write(self, values: dict[str, bytes]) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key, value in values.items():
                    jitter = random.uniform(1 - _LARGEST_JITTER, 1 + _LARGEST_JITTER)  # noqa: S311
                    pipeline.set(key, value, px=max(1, round(1000 * self._ttl_s * jitter)))
                await pipeline.execute()
        except Exception as error:  # It is stored at the next miss.
            self._failed(error)
        finally:
            self._num_writes -= 1

    def _failed(self, error: Exception) -> None:
        self.num_errors += 1
        # A refusal, for example of a write when memory is full, is an answer: lookups go on.
        is_refusal = isinstance(error, redis.ResponseError) and not isinstance(error, redis.ConnectionError)
        if self._probing is None and not is_refusal:
            _log.warning("the embedding cache is skipped until it answers: %s", error or type(error).__name__)
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Tries, off the path of requests, until Redis answers."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                await self._redis.ping()
            except Exception:  # noqa: S112 - the log says already that it does not answer.
                continue
            _log.info("the embedding cache answers again")
            self._probing = None
            return


@dataclass(frozen=True)
class _Form:
    """How embeddings are stored."""

    key_prefix: str
    """Of this form alone: who reads another would take rounded embeddings for exact ones, or refuse every value."""
    dtype: str

    def key(self, version: int, digest: bytes) -> str:
        return f"twotower:{version}:{self.key_prefix}{digest.hex()}"

    def value(self, version: int, digest: bytes, embedding: NDArray[np.float32]) -> bytes:
        content = _HEADER.pack(version) + digest + embedding.astype(self.dtype, copy=False).tobytes()
        return content + xxhash.xxh3_64_digest(content)

    def embedding_in(self, value: Any, version: int, digest: bytes, dim: int) -> NDArray[np.float32] | None:
        """The embedding of a value; None unless the value is whole and belongs to this version and digest."""
        expected_size = _HEADER.size + DIGEST_BYTES + np.dtype(self.dtype).itemsize * dim + _CHECKSUM_BYTES
        if not isinstance(value, bytes) or len(value) != expected_size:
            return None
        content, checksum = value[:-_CHECKSUM_BYTES], value[-_CHECKSUM_BYTES:]
        if not content.startswith(_HEADER.pack(version) + digest) or xxhash.xxh3_64_digest(content) != checksum:
            return None
        stored = np.frombuffer(content, dtype=self.dtype, offset=_HEADER.size + DIGEST_BYTES)
        if not np.isfinite(stored).all():
            return None
        if stored.dtype == np.float32:
            return stored
        rounded = stored.astype(np.float32)
        norm = np.linalg.norm(rounded)
        return rounded / norm if norm else None


_FORMS = {"float32": _Form("", "<f4"), "float16": _Form("f2:", "<f2")}
