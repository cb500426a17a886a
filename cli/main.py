"""The `twotower` command: its commands, and what a failure looks like.

Deliberately imports nothing heavy: each command imports what it needs, so help is fast and no service loads torch.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cli import catalog, demonstration, deploy, doctor, evaluate, explain, index, retrieve, serve, training, up

app = typer.Typer(
    name="twotower",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"twotower {version('twotower')}")
        raise typer.Exit


@app.callback()
def twotower(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Two-tower retrieval: train, publish, index, serve and hot-swap, never mixing two checkpoints."""


for _command in (
    training.train,
    training.checkpoints,
    evaluate.evaluate,
    doctor.doctor,
    up.up,
    retrieve.retrieve,
    explain.explain,
    deploy.status,
    deploy.stage,
    deploy.canary,
    deploy.promote,
    deploy.rollback,
    serve.rollout,
    demonstration.demo,
    demonstration.demo_text,
):
    app.command()(_command)
app.add_typer(catalog.app, name="catalog")
app.add_typer(index.app, name="index")
app.add_typer(serve.app, name="serve")


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 for a failure, 2 for wrong input, 130 after Ctrl-C. A failure is one line on stderr.
    """
    try:
        result = app(list(arguments), prog_name="twotower", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(error.exit_code, f"{error.format_message().rstrip('.')}; see {_usage(arguments)}")
    except (KeyboardInterrupt, typer.Abort):
        return _fail(130, "interrupted")
    except Exception as error:
        from cli.failures import failure_of

        failure = failure_of(error)
        if failure is None:
            raise
        return _fail(failure.exit_code, failure.message)
    return result if isinstance(result, int) else 0


def _fail(exit_code: int, message: str) -> int:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    return exit_code


def _usage(arguments: Sequence[str]) -> str:
    """How to get help about the command that was meant."""
    groups = {group.name for group in app.registered_groups}
    words = arguments[: 2 if arguments and arguments[0] in groups else 1]
    return " ".join(("twotower", *(word for word in words if word.isidentifier()), "--help"))


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
