"""Real processes on this machine: what `LocalStack` starts, kills, restarts and ends."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_process import tied_python

from cli.local_stack import LocalStack
from retrieval_client import RetrievalClient
from towers.errors import DeadlineError, InvalidInputError, NotFoundError, NotReadyError
from towers.store import Store


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    give_up_s = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < give_up_s, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)


def test_names_addresses_and_environment(stack: LocalStack) -> None:
    assert stack.names == ("valkey", "shard-0", "shard-1", "query", "rollout")
    assert [stack.address(name) for name in stack.names] == [
        stack.redis_url,
        *stack.shard_addresses,
        stack.query_address,
        "",
    ]
    for name in stack.names:
        assert is_running(stack.pid(name))
        assert "libtorch" not in Path(f"/proc/{stack.pid(name)}/maps").read_text()
        assert f"{name} starts" in stack.log(name)
    for name in ("shard-0", "query", "rollout"):
        environment = Path(f"/proc/{stack.pid(name)}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment
        assert b"OMP_WAIT_POLICY=passive" in environment
    assert os.getpgid(stack.pid("query")) != os.getpgid(0), "Ctrl-C would reach the children too"


def test_kill_and_restart(stack: LocalStack) -> None:
    pids = {name: stack.pid(name) for name in stack.names}
    for name in ("shard-1", "valkey"):
        stack.kill(name)
        assert not is_running(pids[name])
        assert not stack.is_up(name)
        with pytest.raises(NotReadyError, match=f"{name} is not running"):
            stack.pid(name)
    assert stack.first_death() is None, "a process that was killed on purpose has not died by itself"
    for name in ("shard-1", "valkey"):
        stack.restart(name)
    stack.wait_ready(timeout_s=60.0)
    with RetrievalClient(stack.query_address) as client:
        assert client.retrieve({"user_id": "1"}, k=3, min_shards=2).shards_answered == 2
    assert stack.pid("query") == pids["query"]
    assert stack.pid("shard-1") != pids["shard-1"]
    with pytest.raises(NotFoundError, match="there is no process 'shard-2'; there are valkey, shard-0, shard-1"):
        stack.restart("shard-2")


def test_a_death_is_noticed_and_named(stack: LocalStack) -> None:
    os.kill(stack.pid("rollout"), 9)
    give_up_s = time.monotonic() + 60
    while (death := stack.first_death()) is None:
        assert time.monotonic() < give_up_s
        time.sleep(0.02)
    assert (death.name, death.exit_code, death.log_path) == ("rollout", -9, stack.log_path("rollout"))
    assert "rollout has ended (killed by SIGKILL); its log is" in str(death)
    assert death.last_lines
    with pytest.raises(NotReadyError, match="rollout has ended"):
        stack.wait_up()
    stack.restart("rollout")
    stack.wait_up()


def test_nothing_is_ready_without_a_checkpoint_and_nothing_is_left(tmp_path: Path) -> None:
    with LocalStack(store=str(tmp_path / "store"), folder=tmp_path, num_shards=1, query_port=0) as stack:
        stack.wait_up(timeout_s=60.0)
        with pytest.raises(DeadlineError, match=r"waited 0 s for shard-0, query to be ready; see .*shard-0\.log"):
            stack.wait_ready(timeout_s=0.3)
        pids = [stack.pid(name) for name in stack.names]
        socket_folder = Path(stack.redis_url.removeprefix("unix://")).parent
        assert socket_folder.is_dir()
    assert not any(map(is_running, pids))
    assert not socket_folder.exists()
    for name in ("shard-0", "rollout"):
        assert "Traceback" not in (tmp_path / f"logs/{name}.log").read_text()


@pytest.mark.parametrize(("offset", "name"), [(0, "query"), (10, "shard-0"), (11, "shard-1")])
def test_a_port_in_use_is_named_and_nothing_starts(tmp_path: Path, offset: int, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        stack = LocalStack(store=str(tmp_path), folder=tmp_path, query_port=port - offset)
        with pytest.raises(InvalidInputError, match=f"{name} cannot listen on 127.0.0.1:{port}: another process does"):
            stack.start()
        stack.stop()
    assert not (tmp_path / "logs").exists()


def test_fixed_ports(tmp_path: Path) -> None:
    stack = LocalStack(store=str(tmp_path), folder=tmp_path, num_shards=3, query_port=50051)
    assert stack.query_address == "127.0.0.1:50051"
    assert stack.shard_addresses == ("127.0.0.1:50061", "127.0.0.1:50062", "127.0.0.1:50063")


_PARENT = """
import signal, sys
from pathlib import Path
from cli.local_stack import LocalStack
stack = LocalStack(store=sys.argv[1], folder=Path(sys.argv[1]), num_shards=1, query_port=0)
stack.start()
print(*(stack.pid(name) for name in stack.names), flush=True)
signal.pause()
"""


def test_the_children_of_a_killed_parent_die(store: Store) -> None:
    with subprocess.Popen(tied_python(_PARENT, store.url), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4
        assert all(map(is_running, pids))
        parent.kill()
    wait_until_gone(pids)


def test_a_child_whose_parent_has_ended_already_does_not_start() -> None:
    child = [sys.executable, "-I", "-S", "cli/child.py", "1", sys.executable, "-c", "print('started')"]
    result = subprocess.run(child, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert "the parent has ended already" in result.stderr
