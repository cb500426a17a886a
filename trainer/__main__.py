"""`python -m trainer CONFIG --store STORE`: training without the rest of the command line, in one process or, started
by torchrun, in several.

Deliberately does not know how training works.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from towers.errors import InvalidInputError, TwoTowerError


def main() -> int:
    """Trains as the arguments say.

    Returns:
        0 when published; 1 for a failure, 2 for a mistake in configuration or data, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Trains both towers and publishes them.")
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("--store", required=True, help="object store to publish to: a folder, s3://, gs:// or az://")
    parser.add_argument("--data", type=Path, help="folder of the data files, instead of [data] folder")
    parser.add_argument("--resume", action="store_true", help="go on from where an earlier run was interrupted")
    parser.add_argument(
        "--force", metavar="REASON", help="publish although gates refuse; the manifest keeps who and why"
    )
    arguments = parser.parse_args()
    # On each machine the processes read the same files and stumble over the same mistakes: one of them says so.
    is_quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, quiet=is_quiet)
    try:
        return _train(arguments, errors)
    except KeyboardInterrupt:
        errors.print("Interrupted")
        return 130


def _train(arguments: argparse.Namespace, errors: Console) -> int:
    # Read when torch is imported: threads that spin while they wait starve themselves on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Here, because torch takes seconds to import, and Ctrl-C must find somebody to catch it.
    from trainer.ranks import joined
    from trainer.run import Interrupted, train

    try:
        with joined() as ranks:
            train(
                arguments.config,
                store=arguments.store,
                resume=arguments.resume,
                console=Console(quiet=not ranks.is_first),
                data_folder=arguments.data,
                force=arguments.force,
                ranks=ranks,
            )
    except InvalidInputError as error:
        errors.print(str(error))
        return 2
    except TwoTowerError as error:
        errors.print(str(error))
        return 1
    except Interrupted as interrupt:
        errors.print(str(interrupt))
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # Threads of gloo's that are still there when the interpreter ends abort the process now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
