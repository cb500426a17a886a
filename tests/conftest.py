"""Fixtures that all rooms share: object stores on a folder and on S3, and a real Valkey.

Deliberately does not know any room; a room's own fixtures are in its own conftest.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from child_process import tied_python
from hypothesis import HealthCheck, settings
from valkey_server import ValkeyServer

# Before torch is imported, which reads them then: tests that run side by side need no threads of their own, and
# spinning ones starve themselves when the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No timed assertions: a slow machine is no failure. No database: each run stands alone.
settings.register_profile(
    "tests", max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}

_S3_SERVER = """
import logging, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
s3 = DomainDispatcherApplication(create_backend_app)
lock = threading.Lock()

def one_at_a_time(environment, start_response):
    # Put-if-absent is two steps in moto, one in S3.
    with lock:
        return s3(environment, start_response)

server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
print("http://%s:%s" % server.server_address, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of a local S3 server; it knows no bucket yet."""
    # A process of its own: some calls of deltalake hold the interpreter lock while they wait for the answer.
    with subprocess.Popen(tied_python(_S3_SERVER), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        assert endpoint.startswith("http://127.0.0.1:")
        yield endpoint
        server.kill()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket/prefix` in a new bucket; the environment (of child processes too) leads there."""
    environment = {**_CREDENTIALS, "AWS_ENDPOINT_URL": s3_endpoint, "AWS_ALLOW_HTTP": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture
def folder_url(tmp_path: Path) -> str:
    """A store on a folder."""
    return str(tmp_path / "store")


@pytest.fixture(params=["folder", "s3"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty object store: each test runs on a folder and on S3."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A real, empty Valkey; its `url` is a REDIS_URL."""
    server = ValkeyServer()
    try:
        server.start()
        yield server
    finally:
        server.close()
