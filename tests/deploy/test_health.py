import asyncio
import sys

import pytest

from towers.rpc import RpcServer

SERVICE = "a.Service"


async def exit_codes(is_ready: bool, *questions: tuple[str, ...]) -> list[int]:
    """Exit codes of `python -m towers.health` against a real server; `{port}` is where it listens."""
    server = RpcServer("127.0.0.1:0", SERVICE, drain_s=0, grace_s=0)
    port = await server.start()
    await server.set_ready(is_ready)
    try:
        codes = []
        for question in questions:
            arguments = [word.format(port=port) for word in question]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "towers.health", *arguments, stderr=asyncio.subprocess.DEVNULL
            )
            codes.append(await process.wait())
        return codes
    finally:
        await server.drain_and_stop()


@pytest.mark.parametrize(("is_ready", "expected"), [(False, [0, 1, 1]), (True, [0, 0, 1])])
def test_the_process_is_healthy_before_the_service_is_ready(is_ready, expected):
    address = "127.0.0.1:{port}"
    codes = asyncio.run(exit_codes(is_ready, (address,), (address, SERVICE), (address, "another.Service")))
    assert codes == expected


def test_nothing_listens_and_nothing_given_are_failures():
    assert asyncio.run(exit_codes(True, ("127.0.0.1:1",), ())) == [1, 1]
