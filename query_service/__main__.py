"""One replica from the environment alone: `TWOTOWER_STORE=… TWOTOWER_SHARDS=host:port,… python -m query_service`.

Deliberately does not know how the settings are used.
"""

import logging
import sys

from query_service.serve import run
from query_service.settings import QuerySettings
from towers.errors import TwoTowerError


def main() -> int:
    """Serves until it is told to stop; 2 when the settings are wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(QuerySettings())
    except TwoTowerError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
