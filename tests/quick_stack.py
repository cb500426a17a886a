"""A `LocalStack` whose processes look for what is new five times a second and end at once.

Deliberately does not know what a test wants of it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cli.local_stack import LocalStack


def quick_stack(store: str, folder: Path, settings: Mapping[str, str] = MappingProxyType({}), **how: Any) -> LocalStack:
    """A stack on free ports.

    Args:
        store: The object store.
        folder: Takes the logs.
        settings: More variables for all processes.
        how: How many of what.
    """
    environment = {"TWOTOWER_POLL_INTERVAL_S": "0.2", "TWOTOWER_DRAIN_S": "0", **settings}
    return LocalStack(store=store, folder=folder, query_port=0, environment=environment, **how)
