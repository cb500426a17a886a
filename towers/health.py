"""Asks a gRPC server for its health: `python -m towers.health ADDRESS [SERVICE]`, exit code 0 when it serves.

Deliberately knows no service: without SERVICE it asks whether the process is up, with a service's full name whether
that service is ready.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0


def is_serving(address: str, service: str = "") -> bool:
    """Whether the server reports SERVING; False when it cannot be reached or does not know the service.

    Args:
        address: `host:port` or `unix:/path`.
        service: Full name of a service; empty for the process.
    """
    with grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m towers.health ADDRESS [SERVICE]")
    sys.exit(0 if is_serving(*sys.argv[1:]) else 1)
