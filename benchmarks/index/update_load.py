"""The writer of `benchmarks.index.updates`, a process of its own: upserts at a steady rate.

Deliberately does not search. Ends by writing the last acknowledged state of each item to a file.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from retrieval.feature.v1 import feature_pb2
from retrieval.index.v1 import index_service_pb2, index_service_pb2_grpc

LOOK = "look"
ITEMS_PER_CALL = 100
_TIMEOUT_S = 20.0
_MARGIN_S = 3.0
"""At the beginning and at the end, when a shard is killed: left out of the figures."""


class Writer:
    """Gives every item a new look in turn; an item is changed again only when its last change was answered."""

    def __init__(self, num_items: int, num_looks: int) -> None:
        self._random = np.random.default_rng(7)
        self._num_looks = num_looks
        self.looks = np.arange(num_items) % num_looks
        """`[N]` the last look that was acknowledged."""
        self.is_sure = np.ones(num_items, dtype=bool)
        """`[N]` whether the last change was answered, so that the look is known."""
        self.latencies_s: list[float] = []
        self.answered_s: list[float] = []
        """When each call was answered, by the monotonic clock."""
        self.num_failed = 0

    async def write(self, stub: Any, first: int) -> None:
        """One call: the items from `first` on."""
        numbers = np.arange(first, min(first + ITEMS_PER_CALL, len(self.looks)))
        looks = self._random.integers(self._num_looks, size=len(numbers))
        request = index_service_pb2.UpsertItemsRequest(
            items=[
                index_service_pb2.Item(
                    item_id=str(number),
                    attributes={
                        LOOK: feature_pb2.FeatureValue(string_value=str(look)),
                        "title": feature_pb2.FeatureValue(string_value=f"Title of item {number}"),
                        "price": feature_pb2.FeatureValue(number_value=look / 4),
                        "stock": feature_pb2.FeatureValue(number_value=look % 100),
                    },
                )
                for number, look in zip(numbers.tolist(), looks.tolist(), strict=True)
            ]
        )
        self.is_sure[numbers] = False
        started_s = time.monotonic()
        try:
            await stub.UpsertItems(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            self.num_failed += len(numbers)
            return
        self.answered_s.append(time.monotonic())
        self.latencies_s.append(self.answered_s[-1] - started_s)
        self.looks[numbers] = looks
        self.is_sure[numbers] = True


async def run(addresses: list[str], num_items: int, num_looks: int, rate: float, seconds: float, result: Path) -> None:
    """Writes for some seconds, and then says what came of it."""
    writer = Writer(num_items, num_looks)
    channels = [grpc.aio.insecure_channel(address) for address in addresses]
    stubs = [index_service_pb2_grpc.CatalogServiceStub(channel) for channel in channels]
    calls: set[asyncio.Task[None]] = set()
    started_s = time.monotonic()
    num_calls = 0
    while (now_s := time.monotonic()) < started_s + seconds:
        while num_calls * ITEMS_PER_CALL < (now_s - started_s) * rate:
            first = num_calls * ITEMS_PER_CALL % num_items
            call = asyncio.create_task(writer.write(stubs[num_calls % len(stubs)], first))
            calls.add(call)
            call.add_done_callback(calls.discard)
            num_calls += 1
        await asyncio.sleep(ITEMS_PER_CALL / rate / 2)
    await asyncio.gather(*calls)
    answered_s = np.array(writer.answered_s) - started_s
    is_steady = (answered_s > _MARGIN_S) & (answered_s < seconds - _MARGIN_S)
    np.savez(
        result,
        looks=writer.looks,
        is_sure=writer.is_sure,
        latencies_s=np.array(writer.latencies_s)[is_steady],
        rate=is_steady.sum() * ITEMS_PER_CALL / (seconds - 2 * _MARGIN_S),
        num_failed=writer.num_failed,
    )


def main() -> None:
    """Runs from the command line of `benchmarks.index.updates`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--looks", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(run(options.addresses, options.items, options.looks, options.rate, options.seconds, options.result))


if __name__ == "__main__":
    main()
