"""How the client connects.

Deliberately does not know what is called.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from retrieval.query.v1 import query_service_pb2

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SERVICE = query_service_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name

_SERVICE_CONFIG: Mapping[str, Any] = {
    # Of several replicas behind one name, `dns:///query:50051`, each takes its turn.
    "loadBalancingConfig": [{"round_robin": {}}],
    # No storm of second attempts: they stop while more than about a tenth of the calls fail.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.1},
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            # All methods only read, so that a second attempt does no harm.
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 3,
                # Where a service that sheds says when to come again, `grpc-retry-pushback-ms`, that counts.
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}

_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A connection whose other end is gone is noticed within seconds, but only while calls wait on it: servers
    # refuse pings that come without need.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The default backs off for up to two minutes: a restarted server would stay unseen for as long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name the time that connecting may take; the default is longer than any deadline here.
    ("grpc.min_reconnect_backoff_ms", 2000),
)

Priority = Literal["critical", "default", "sheddable"]
"""How much a request matters to a service that has more to do than it can."""

Metadata = tuple[tuple[str, str | bytes], ...]
"""What goes with a request, by key."""

_PRIORITY_KEY = "twotower-priority"

_OF_SEVERAL = ("dns:", "ipv4:", "ipv6:")
"""What addresses that may stand for several replicas begin with."""


def plain_options() -> Sequence[tuple[str, Any]]:
    """Of a channel that asks a replica whether or not it is ready."""
    return (*_OPTIONS, ("grpc.service_config", json.dumps(_SERVICE_CONFIG)))


def metadata_of(priority: Priority | None) -> Metadata:
    """What goes with each request.

    Raises:
        ValueError: there is no such priority.
    """
    if priority is None:
        return ()
    if priority not in get_args(Priority):
        raise ValueError(f"priority = {priority!r}: give one of {', '.join(get_args(Priority))}, or None")
    return ((_PRIORITY_KEY, priority),)


def balanced_options(address: str, num_connections: int) -> Sequence[tuple[str, Any]]:
    """Of each channel over which queries go.

    Args:
        address: What the client was given. Of several replicas, those that are not ready, or drain, get no turn.
        num_connections: How many such channels the client has.

    Raises:
        ValueError: there is not one.
    """
    if num_connections < 1:
        raise ValueError(f"num_connections = {num_connections}: give at least 1")
    # A replica that is alone answers itself why it is not ready.
    checks = {"healthCheckConfig": {"serviceName": _SERVICE}} if address.startswith(_OF_SEVERAL) else {}
    return (
        *_OPTIONS,
        ("grpc.service_config", json.dumps({**_SERVICE_CONFIG, **checks})),
        # Channels of one process that look alike share their connections otherwise.
        ("grpc.use_local_subchannel_pool", int(num_connections > 1)),
    )
