"""Several processes on one address: ready, swapping, dying, stopping, refusing; all real."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from exact_shard import ExactShard
from query_system import World
from service_process import PATIENCE_S, ServiceProcess, free_port
from toy_checkpoint import ToyModel

from query_service.settings import QuerySettings
from query_service.workers import exclusive, run
from retrieval_client import RetrievalClient, RetrievalError, ServiceStatus, UnavailableError
from towers.errors import InvalidInputError

QUERY_SERVICE = "retrieval.query.v1.QueryService"
FEATURES: dict[str, Any] = {"user_id": "1", "history": ["3", "4", "5"]}
NUM_CONNECTIONS = 8
K = 10


@pytest.fixture
def shards(models: dict[int, ToyModel]) -> Iterator[list[ExactShard]]:
    """Two shards on an event loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE_S)

    async def made() -> list[ExactShard]:
        return [await ExactShard(number, 2, models).__aenter__() for number in range(2)]

    async def closed(shards: list[ExactShard]) -> None:
        for shard in shards:
            await shard.__aexit__(None, None, None)

    running = wait_for(made())
    yield running
    wait_for(closed(running))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_package_that_the_workers_lack_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "redis").is_dir()])
    monkeypatch.delitem(sys.modules, "redis", raising=False)
    settings = QuerySettings(store=str(tmp_path), shards="127.0.0.1:1", address="127.0.0.1:0", workers=2)
    with pytest.raises(ModuleNotFoundError) as caught:
        run(settings)
    assert caught.value.name == "redis"


def service_of(world: World, shards: list[ExactShard], **settings: Any) -> ServiceProcess:
    addresses = ",".join(shard.address for shard in shards)
    return ServiceProcess(
        "query",
        QUERY_SERVICE,
        {"STORE": world.store.url, "SHARDS": addresses, "SHADOW_SHARE": 0, "WORKERS": 2, **settings},
    )


def until(look: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
    give_up_s = time.monotonic() + PATIENCE_S
    while not is_right(seen := look()):
        assert time.monotonic() < give_up_s, seen
        time.sleep(0.02)
    return seen


def pids(service: ServiceProcess) -> dict[int, int]:
    """Of the workers, the newest of each."""
    return {int(number): int(pid) for number, pid in re.findall(r"worker (\d) starts, pid (\d+)", service.log)}


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def status_of(service: ServiceProcess) -> ServiceStatus | None:
    """What one of the workers says, over a connection of its own; None where it does not."""
    with RetrievalClient(service.address, num_connections=2) as client:
        try:
            return client.get_status(timeout_s=2.0)
        except RetrievalError:
            return None


def until_all_serve(service: ServiceProcess, version: int) -> None:
    def serve(status: ServiceStatus | None) -> bool:
        workers = status.workers if status else ()
        return len(workers) == 2 and all(each.status and each.status.live_version == version for each in workers)

    until(lambda: status_of(service), serve)


@contextmanager
def callers(address: str, models: dict[int, ToyModel]) -> Iterator[list[int]]:
    """Calls without a pause; yields the versions that answered. Every answer is exact at its version, none fails."""
    versions: list[int] = []
    faults: list[str] = []
    is_over = threading.Event()
    best = {version: model.nearest(FEATURES, model.item_ids, K) for version, model in models.items()}

    def keep_calling() -> None:
        while not is_over.is_set():
            try:
                answer = client.retrieve(FEATURES, k=K)
            except RetrievalError as error:
                faults.append(str(error))
                continue
            item_ids, scores = best[answer.checkpoint_version]
            if [item.item_id for item in answer.items] != item_ids or any(
                abs(item.score - score) > 1e-5 for item, score in zip(answer.items, scores, strict=True)
            ):
                faults.append(f"not what version {answer.checkpoint_version} answers")
            versions.append(answer.checkpoint_version)

    with RetrievalClient(address, timeout_s=PATIENCE_S, num_connections=NUM_CONNECTIONS) as client:
        threads = [threading.Thread(target=keep_calling) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield versions
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
    assert faults == []


def num_requests(service: ServiceProcess) -> list[int]:
    """Requests of each worker under the newest record."""
    status = until(lambda: status_of(service), lambda status: status is not None)
    return [sum(part.num_requests for part in each.status.traffic) for each in status.workers if each.status]


def test_workers_start_once_the_first_is_ready_and_swap_and_are_replaced(
    world: World, shards: list[ExactShard], models: dict[int, ToyModel]
) -> None:
    with service_of(world, shards) as service:
        service.until_ready()
        until_all_serve(service, 1)
        with callers(service.address, models) as versions:
            # Each connection keeps to one worker, which the kernel chooses: both get some before long.
            until(lambda: num_requests(service), lambda counts: len(counts) == 2 and min(counts) > 0)
            world.deploy(live=2, standby=1)
            until_all_serve(service, 2)
            num_before = len(versions)
            until(lambda: len(versions), lambda count: count > num_before + 50)
            assert set(versions[num_before + 10 :]) == {2}

            before = pids(service)
            subprocess.run(["kill", "-KILL", str(before[1])], check=True)
            until(lambda: status_of(service), lambda status: status and status.workers[1].error == "is not reachable")
            until_all_serve(service, 2)
            after = pids(service)
            assert after[0] == before[0]
            assert after[1] != before[1]
            assert "worker 1 has ended and is replaced in 0.5 s: killed by SIGKILL" in service.log
        assert set(versions) == {1, 2}

        subprocess.run(["kill", "-STOP", str(after[1])], check=True)
        until(lambda: status_of(service), lambda status: status and status.workers[1].error)
        subprocess.run(["kill", "-CONT", str(after[1])], check=True)
        until_all_serve(service, 2)

        strangers_are_refused(service)
        service.signal(signal.SIGTERM)
        assert service.exit_code() == 0
        assert not any(map(is_running, after.values()))
        assert "Traceback" not in service.log


def strangers_are_refused(service: ServiceProcess) -> None:
    """Neither a single process nor other workers may share the address by accident."""
    for workers in (1, 2):
        stranger = ServiceProcess(
            "query", QUERY_SERVICE, {"STORE": "var/none", "SHARDS": "127.0.0.1:1", "WORKERS": workers}
        )
        stranger.address = service.address
        with stranger:
            assert stranger.exit_code() == 2
            assert stranger.log.count(f"error: cannot listen on {service.address}: is another process using it?") == 1
            assert "Traceback" not in stranger.log
            assert "starts, pid" not in stranger.log


def test_before_a_version_is_live_the_first_worker_says_so_alone(
    empty_world: World, shards: list[ExactShard], models: dict[int, ToyModel]
) -> None:
    with service_of(empty_world, shards) as service:
        status = until(lambda: status_of(service), lambda status: status is not None)
        assert [(each.worker, each.error) for each in status.workers] == [(0, "")]
        with RetrievalClient(service.address) as client, pytest.raises(UnavailableError, match="no version is live"):
            client.retrieve(FEATURES)
        empty_world.go_live(empty_world.publish(models[1]))
        service.until_ready()
        until_all_serve(service, 1)

        workers = pids(service)
        service.signal(signal.SIGKILL)
        service.exit_code()
        until(lambda: [pid for pid in workers.values() if is_running(pid)], lambda running: not running)


def test_what_is_wrong_is_told_once(tmp_path: Path) -> None:
    settings = {"STORE": "ftp://nowhere", "SHARDS": f"127.0.0.1:{free_port()}", "WORKERS": 3}
    with ServiceProcess("query", QUERY_SERVICE, settings) as service:
        assert service.exit_code() == 2
        assert service.log.count("error: ") == 1
        assert "ftp://nowhere" in service.log
        assert "Traceback" not in service.log
        assert service.log.count("starts, pid") == 1


def test_a_first_worker_that_dies_before_it_is_ready_ends_the_service(empty_world: World) -> None:
    with ServiceProcess(
        "query", QUERY_SERVICE, {"STORE": empty_world.store.url, "SHARDS": f"127.0.0.1:{free_port()}", "WORKERS": 2}
    ) as service:
        [pid] = until(lambda: pids(service).values(), lambda pids: len(pids) == 1)
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        assert service.exit_code() == 1
        assert "error: worker 0 has ended before it was ready: killed by SIGKILL" in service.log
        assert "Traceback" not in service.log


def test_an_address_is_held_against_all_but_those_who_share_it() -> None:
    with exclusive("127.0.0.1:0") as address:
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", address)
        with pytest.raises(InvalidInputError, match="is another process using it"), exclusive(address):
            pass
        port = int(address.rpartition(":")[2])
        alone = (
            f"import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
            f"s.bind(('127.0.0.1', {port})); s.listen()"
        )
        sharing = alone.replace(
            "REUSEADDR, 1)", "REUSEADDR, 1); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)"
        )
        assert subprocess.run([sys.executable, "-c", alone], capture_output=True, check=False).returncode == 1
        assert subprocess.run([sys.executable, "-c", sharing], capture_output=True, check=False).returncode == 0
    with exclusive(address) as again:
        assert again == address


@pytest.mark.parametrize("address", ["192.0.2.1:0", "no-such-host.invalid:0"])
def test_a_host_that_is_not_this_machine_is_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match=f"cannot listen on {address}"), exclusive(address):
        pass
