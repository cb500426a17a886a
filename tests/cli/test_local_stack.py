"""Real processes on this machine: what `LocalStack` starts, kills, restarts and ends."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import tied_python
from running import is_running, wait_until_gone

from cli.local_stack import LocalStack
from towers.errors import DeadlineError, InvalidInputError
from towers.store import Store


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
    port = int(LocalStack(store="", folder=tmp_path, query_port=0).query_address.rpartition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + offset))
        taken.listen()
        stack = LocalStack(store=str(tmp_path), folder=tmp_path, query_port=port)
        message = f"{name} cannot listen on 127.0.0.1:{port + offset}: another process does"
        with pytest.raises(InvalidInputError, match=message):
            stack.start()
        stack.stop()
    assert not (tmp_path / "logs").exists()


def test_fixed_ports(tmp_path: Path) -> None:
    stack = LocalStack(store=str(tmp_path), folder=tmp_path, num_shards=3, query_port=50051)
    assert stack.query_address == "127.0.0.1:50051"
    assert stack.shard_addresses == ("127.0.0.1:50061", "127.0.0.1:50062", "127.0.0.1:50063")


def test_replicas_and_a_second_layout_have_names_and_ports_of_their_own(tmp_path: Path) -> None:
    stack = LocalStack(
        store=str(tmp_path),
        folder=tmp_path,
        num_shards=1,
        next_num_shards=2,
        replicas=2,
        query_services=2,
        query_port=50051,
    )
    addresses = [f"127.0.0.1:{port}" for port in range(50061, 50067)]
    assert stack.names == (
        "valkey",
        "shard-0",
        "shard-0-replica-1",
        "shard-0-of-2",
        "shard-0-of-2-replica-1",
        "shard-1-of-2",
        "shard-1-of-2-replica-1",
        "query",
        "query-1",
        "rollout",
    )
    assert stack.query_addresses == ("127.0.0.1:50051", "127.0.0.1:50052")
    assert [stack.address(name) for name in stack.names[1:7]] == addresses
    a, b, c, d, e, f = addresses
    assert stack.layouts == (((a, b),), ((c, d), (e, f)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_shards": 0}, "shards = 0 with replicas = 1: give at least 1 of each"),
        ({"replicas": 0}, "shards = 2 with replicas = 0: give at least 1 of each"),
        (
            {"num_shards": 20, "next_num_shards": 30, "replicas": 2},
            "shards = 20 and 30 with replicas = 2: .* at most 64",
        ),
        ({"query_services": 0}, "query services = 0: give 1 to 10"),
        ({"next_num_shards": 2}, "next shards = 2: there are as many already"),
        ({"query_port": 65_535}, "port = 65535: give a port up to 65461"),
    ],
)
def test_numbers_that_make_no_stack_are_refused(tmp_path: Path, wrong: dict[str, int], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        LocalStack(**{"store": str(tmp_path), "folder": tmp_path, **wrong})


_PARENT = """
import signal, sys
from pathlib import Path
from cli.local_stack import LocalStack
stack = LocalStack(store=sys.argv[1], folder=Path(sys.argv[1]), num_shards=1, query_port=0)
stack.start()
print(stack.redis_url, *(stack.pid(name) for name in stack.names), flush=True)
signal.pause()
"""


def test_the_children_of_a_killed_parent_die(store: Store) -> None:
    with subprocess.Popen(tied_python(_PARENT, store.url), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        redis_url, *words = parent.stdout.readline().split()
        pids = [int(pid) for pid in words]
        assert len(pids) == 4
        assert all(map(is_running, pids))
        parent.kill()
    wait_until_gone(pids)
    shutil.rmtree(Path(redis_url.removeprefix("unix://")).parent)


def test_a_child_whose_parent_has_ended_already_does_not_start() -> None:
    child = [sys.executable, "-I", "-S", "cli/child.py", "1", sys.executable, "-c", "print('started')"]
    result = subprocess.run(child, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert "the parent has ended already" in result.stderr
