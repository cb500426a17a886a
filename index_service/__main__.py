"""One shard replica from the environment alone: `TWOTOWER_STORE=… TWOTOWER_SHARD=0/2 python -m index_service`.

Deliberately does not know how the settings are used.
"""

import logging
import sys

from index_service.serve import run
from index_service.settings import IndexSettings
from towers.errors import TwoTowerError


def main() -> int:
    """Serves until it is told to stop; 2 when the settings are wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(IndexSettings())
    except TwoTowerError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
