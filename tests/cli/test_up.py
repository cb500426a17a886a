"""`twotower up` as users run it: in a pipe and on a terminal, until Ctrl-C or until a process ends."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from child_process import tied
from command_outcome import Outcome, Twotower
from running import is_running, wait_until_gone
from toy_checkpoint import toy_items, toy_model

from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.store import Store

WAIT_S = 90.0


def command(store: str, folder: Path, *more: str) -> list[str]:
    arguments = ["up", "--store", store, "--port", "0", "--folder", str(folder), *more]
    return list(tied(sys.executable, "-m", "cli.main", *arguments))


def wait_for(read: Callable[[], str], pattern: str) -> re.Match[str]:
    give_up_s = time.monotonic() + WAIT_S
    while (match := re.search(pattern, read())) is None:
        assert time.monotonic() < give_up_s, f"waited {WAIT_S:.0f} s for {pattern} in:\n{read()}"
        time.sleep(0.05)
    return match


def pids_in(output: str) -> dict[str, int]:
    return {name: int(pid) for name, pid in re.findall(r"^([\w-]+): \w+, pid (\d+)", output, re.MULTILINE)}


def test_advice_then_answers_then_one_dies_and_all_end(twotower: Twotower, folder_url: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    errors = tmp_path / "errors"
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command(folder_url, tmp_path), stdout=out, stderr=err)
    try:
        advice = wait_for(output.read_text, "no checkpoint is published yet: .*").group()
        assert (
            f"twotower train CONFIG.toml --store {folder_url}; the catalogue is empty: twotower catalog load" in advice
        )
        store = Store(folder_url)
        # Without titles: the table is shown without them then.
        Catalogue(store).upsert(toy_items().drop_columns(["title"]))
        CheckpointStore(store).publish(toy_model().draft())
        address = wait_for(output.read_text, r"twotower retrieve NAME=VALUE … --address (\S+)").group(1)
        wait_for(output.read_text, r"shard-1: up, pid \d+, \S+ version 1 available")
        answer = retrieve_once_live(twotower, address)
        assert "title" not in answer.out
        assert "version 1, " in answer.out

        pids = pids_in(output.read_text())
        assert set(pids) == {"valkey", "shard-0", "shard-1", "query", "rollout"}
        os.kill(pids["shard-0"], signal.SIGKILL)
        assert process.wait(timeout=WAIT_S) == 1
        log_path = tmp_path / "logs/shard-0.log"
        assert f"error: shard-0 has ended (killed by SIGKILL); its log is {log_path}" in errors.read_text()
        assert log_path.read_text().rstrip().splitlines()[-1] in errors.read_text()
        assert not any(map(is_running, pids.values()))
    finally:
        process.kill()
        process.wait()


def retrieve_once_live(twotower: Twotower, address: str) -> Outcome:
    give_up_s = time.monotonic() + WAIT_S
    while True:
        answer = twotower("retrieve", "user_id=1", "-k", "2", "--address", address)
        if answer.exit_code == 0:
            return answer
        assert "no version loaded yet" in answer.err
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


def test_sigterm_ends_all_cleanly(folder_url: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("wb") as out:
        more = ("--shards", "1", "--replicas", "2")
        process = subprocess.Popen(command(folder_url, tmp_path, *more), stdout=out, stderr=out)
    try:
        wait_for(output.read_text, "rollout: up, pid")
        pids = pids_in(output.read_text())
        assert set(pids) == {"valkey", "shard-0", "shard-0-replica-1", "query", "rollout"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WAIT_S) == 0, output.read_text()
        assert not any(map(is_running, pids.values()))
        assert "Traceback" not in output.read_text()
    finally:
        process.kill()
        process.wait()


_ON_THIS_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
"""Makes the terminal the session's own, so that ^C arrives as it does for a user: to all of the foreground group."""


def test_on_a_terminal_a_table_is_drawn_and_ctrl_c_ends_all(store: Store, tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_THIS_TERMINAL, *command(store.url, tmp_path)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment,
        start_new_session=True,
    )
    os.close(inside)
    drawn = bytearray()

    def read() -> str:
        while select.select([terminal], [], [], 0)[0]:
            try:
                drawn.extend(os.read(terminal, 65536))
            except OSError:
                break  # The other end is closed.
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode(errors="replace"))

    try:
        wait_for(read, r"│ shard-1 +│ up +│ \d+ +│ 127\.0\.0\.1:\d+ +│ version \d")
        pids = {int(pid) for pid in re.findall(r"│ [\w-]+ +│ \w+ +│ (\d+) ", read())}
        assert len(pids) == 5
        assert "Ctrl-C ends all" in read()
        os.write(terminal, b"\x03")
        give_up_s = time.monotonic() + WAIT_S
        while process.poll() is None:
            read()  # A full terminal would block the process.
            assert time.monotonic() < give_up_s
            time.sleep(0.05)
        assert process.returncode == 0
        wait_until_gone(list(pids))
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_a_second_stack_on_the_same_ports_is_refused(twotower: Twotower, tmp_path: Path) -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        port = first.getsockname()[1]
        outcome = twotower("up", "--port", str(port), "--store", str(tmp_path / "store"), "--folder", str(tmp_path))
    assert (outcome.exit_code, outcome.err.count("\n")) == (2, 1)
    assert f"query cannot listen on 127.0.0.1:{port}: another process does" in outcome.err
