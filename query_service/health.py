"""Whether the replicas of the shards say that they serve, followed through the standard health protocol.

Deliberately does not know who is asked instead of one that does not.
"""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from query_service.replicas import Replica

_PAUSE_S = 0.5
"""From the end of a stream to the next."""


async def follow(replica: Replica, channel: grpc.aio.Channel, service_name: str) -> None:
    """Keeps `is_serving` of a replica up to date, until cancelled.

    A replica that drains, has not loaded the live version or is not connected does not serve. One that does not know
    the protocol counts as serving.

    Args:
        replica: The replica.
        channel: To it.
        service_name: Full name of the service that matters.
    """
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service_name)
    while True:
        with suppress(grpc.aio.AioRpcError):
            # It waits for the connection, or each pause would be a call that fails.
            async for response in (watching := stub.Watch(request, wait_for_ready=True)):
                replica.is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
        replica.is_serving = await watching.code() is grpc.StatusCode.UNIMPLEMENTED
        if replica.is_serving:
            return
        await asyncio.sleep(_PAUSE_S)
