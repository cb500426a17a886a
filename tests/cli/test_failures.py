"""Help, and what wrong input looks like: one line on stderr that names the fix, exit code 2 or 1, no traceback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_outcome import Twotower

from cli.failures import Failure, failure_of
from cli.main import app
from retrieval_client import InvalidRequestError, UnavailableError
from towers.errors import ConflictError, GoldenDriftError, InvalidFeatureError
from towers.store import Store

HEAVY = ("torch", "pyarrow", "deltalake", "numpy", "grpc", "faiss", "redis", "onnxruntime", "rich.live")
COMMANDS = [
    "train",
    "checkpoints",
    "up",
    "retrieve",
    "explain",
    "evaluate",
    "doctor",
    "status",
    "stage",
    "promote",
    "rollback",
    "canary",
    "rollout",
    "demo",
    "demo-text",
]

WRONG = {
    "no command": ([], 2, "Missing command; see twotower --help"),
    "unknown command": (["stagee", "1"], 2, "No such command 'stagee'"),
    "unknown option": (["status", "--colour"], 2, "No such option: --colour"),
    "serve what": (["serve"], 2, "Missing command; see twotower serve --help"),
    "catalog what": (["catalog"], 2, "Missing command; see twotower catalog --help"),
    "store of another kind": (["checkpoints", "--store", "ftp://host/x"], 2, "use a folder or one of s3://"),
    "store that is a file": (["checkpoints", "--store", "FILE/x"], 2, "FILE/x"),
    "train what": (["train"], 2, "Missing argument 'CONFIG.toml'"),
    "load what": (["catalog", "load"], 2, "Missing argument 'ITEMS'"),
    "load nothing": (["catalog", "load", "no.parquet"], 2, "no.parquet: it cannot be read: No such file"),
    "load a picture": (["catalog", "load", "a.png"], 2, "a.png: items are read from .parquet, .csv and .jsonl files"),
    "stage what": (["stage"], 2, "Missing argument 'VERSION'"),
    "stage a word": (["stage", "newest"], 2, "'VERSION': Input should be a valid integer"),
    "stage a version that is not published": (["stage", "9"], 1, "checkpoint 9 is not published; published: []"),
    "promote nothing": (["promote"], 2, "no version stands by; stage one first: twotower stage VERSION"),
    "promote by force nothing": (["promote", "--force"], 2, "no version stands by"),
    "roll back nothing": (["rollback"], 2, "no other version is loaded to roll back to"),
    "status of what": (["status", "--shards", "here"], 2, "TWOTOWER_SHARDS: 'here' is not host:port"),
    "promote where": (
        ["promote", "--query-services", "a:1,a:1"],
        2,
        "TWOTOWER_QUERY_SERVICES: a:1 is named more than once",
    ),
    "rollout of what": (["rollout"], 2, "TWOTOWER_STORE is not set"),
    "rollout at once": (["rollout", "--store", "s", "--poll-interval", "0"], 2, "TWOTOWER_POLL_INTERVAL_S: "),
    "no shard": (
        ["up", "--shards", "0"],
        2,
        "'--shards': Input should be greater than or equal to 1; see twotower up --help",
    ),
    "too many shards": (
        ["up", "--shards", "1000"],
        2,
        "shards = 1000 with replicas = 1: give at least 1 of each, and at most 64 processes",
    ),
    "no port": (["up", "--port", "70000"], 2, "port = 70000"),
    "index without settings": (["serve", "index"], 2, "TWOTOWER_STORE is not set; TWOTOWER_SHARD: "),
    "which shard": (["serve", "index", "--store", "s", "--shard", "2/2"], 2, "TWOTOWER_SHARD: "),
    "query without settings": (["serve", "query"], 2, "TWOTOWER_STORE is not set; TWOTOWER_SHARDS is not set"),
    "query of what": (["serve", "query", "--store", "s", "--shards", "x"], 2, "TWOTOWER_SHARDS: "),
    "cache of what": (
        ["serve", "query", "--store", "s", "--shards", "h:1", "--redis-url", "http://h"],
        2,
        "REDIS_URL: ",
    ),
    "retrieve what": (["retrieve"], 2, "Missing argument 'NAME=VALUE…'"),
    "a feature without value": (["retrieve", "user_id"], 2, "'user_id': write a feature as name=value"),
    "a feature without name": (["retrieve", "=42"], 2, "'=42': write a feature as name=value"),
    "no items": (
        ["retrieve", "user_id=1", "-k", "0"],
        2,
        "'-k': Input should be greater than or equal to 1; see twotower retrieve --help",
    ),
    "nobody there to explain": (
        ["explain", "50", "user_id=1", "--address", "127.0.0.1:1"],
        1,
        "the query service at 127.0.0.1:1 is unavailable",
    ),
    "nobody there": (
        ["retrieve", "user_id=1", "--address", "127.0.0.1:1"],
        1,
        "the query service at 127.0.0.1:1 is unavailable",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_an_exit_code(
    name: str, twotower: Twotower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, exit_code, words = WRONG[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    outcome = twotower(*arguments)
    assert (outcome.exit_code, outcome.out) == (exit_code, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err


def test_help_of_every_command(twotower: Twotower) -> None:
    names = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback
    }
    assert names == set(COMMANDS)
    for command in (*([name] for name in COMMANDS), ["catalog", "load"], ["serve", "index"], ["serve", "query"]):
        outcome = twotower(*command, "--help")
        assert (outcome.exit_code, outcome.err) == (0, "")
        assert f"Usage: twotower {' '.join(command)}" in re.sub(r"\s+", " ", outcome.out)


def test_help_and_the_services_commands_import_nothing_heavy() -> None:
    code = (
        "import contextlib, io, json, sys\n"
        "from cli.main import run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    codes = [run(['--help']), run(['--version']), run(['serve', 'index', '--help'])]\n"
        f"print(json.dumps([codes, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(result.stdout) == [[0, 0, 0], []]


def test_version(twotower: Twotower) -> None:
    assert re.fullmatch(r"twotower \d+\.\d+\.\d+\n", twotower("--version").out)


@pytest.mark.parametrize(
    "arguments", [["index", "--shard", "0/1"], ["query", "--shards", "127.0.0.1:1"]], ids=["index", "query"]
)
def test_a_port_in_use_is_said(arguments: list[str], store: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "cli.main", "serve", *arguments, "--store", store.url, "--address", address]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 2
    assert f"error: cannot listen on {address}: is another process using it?\n" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_controller_ends_with_exit_code_0(number: signal.Signals, store: Store, tmp_path: Path) -> None:
    log_path = tmp_path / "log"
    command = [sys.executable, "-m", "cli.main", "rollout", "--store", store.url, "--poll-interval", "0.1"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "TWOTOWER_SHARDS": "127.0.0.1:1"})
    try:
        give_up_s = time.monotonic() + 60
        while "staged version 2" not in log_path.read_text() and time.monotonic() < give_up_s:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 0, log_path.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InvalidFeatureError("feature 'x'"), Failure(2, "feature 'x'")),
        (ConflictError("later"), Failure(1, "later")),
        (GoldenDriftError("drift"), Failure(1, "drift")),
        (InvalidRequestError("INVALID_ARGUMENT", "k"), Failure(2, "INVALID_ARGUMENT: k")),
        (UnavailableError("UNAVAILABLE", "gone"), Failure(1, "UNAVAILABLE: gone")),
        (ModuleNotFoundError("", name="faiss"), Failure(1, "faiss is not installed: pip install 'twotower[index]'")),
        (
            ModuleNotFoundError("", name="redis.asyncio"),
            Failure(1, "redis.asyncio is not installed: pip install 'twotower[query]'"),
        ),
        (PermissionError(13, "Permission denied", "f"), Failure(1, "[Errno 13] Permission denied: 'f'")),
        (ModuleNotFoundError("", name="index_service"), None),
        (ValueError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_what_a_failure_says(error: Exception, failure: Failure | None) -> None:
    assert failure_of(error) == failure
