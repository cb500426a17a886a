"""The examples of docs/examples, as they stand there, against a running system."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from quick_stack import quick_stack
from toy_checkpoint import ToyModel, toy_items, toy_model

from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.store import Store

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
TYPESCRIPT = EXAMPLES / "typescript"
QUERY = {"user_id": "3", "history": ["21", "4"]}
WHY_NO_TYPESCRIPT = (
    "there is no npm"
    if shutil.which("npm") is None
    else ""
    if (TYPESCRIPT / "node_modules").is_dir()
    else "make examples"
)


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return toy_model()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, model: ToyModel) -> Iterator[str]:
    store = Store(str(tmp_path_factory.mktemp("store")))
    Catalogue(store).upsert(toy_items())
    CheckpointStore(store).publish(model.draft())
    folder = tmp_path_factory.mktemp("stack")
    with quick_stack(store.url, folder) as stack:
        stack.wait_ready(timeout_s=90.0)
        yield stack.query_address


def check(output: str, model: ToyModel) -> None:
    """What every example prints, whatever its language."""
    lines = output.strip().splitlines()
    items, scores = model.nearest(QUERY, model.item_ids, 5)
    titles = {item["item_id"]: item["title"] for item in toy_items().to_pylist()}
    assert lines[:5] == [
        f"{place}. {item_id} {score:.4f} {titles[item_id]}"
        for place, (item_id, score) in enumerate(zip(items, scores, strict=True), start=1)
    ]
    assert lines[5] == "version 1, 2 of 2 shards"
    allowed = [item_id for item_id in model.item_ids if item_id != "21"]
    for index, user in enumerate(("1", "2", "3")):
        assert lines[6 + index] == f"query {index}: {' '.join(model.nearest({'user_id': user}, allowed, 3)[0])}"
    assert re.match(r"query 3: invalid_?argument: .*'shoe_size'", lines[9], re.IGNORECASE)
    assert re.match(r"unknown_item: it is not in the catalogue", lines[10], re.IGNORECASE)
    assert re.match(r"invalid_?argument: k must be from 1", lines[11], re.IGNORECASE)
    assert len(lines) == 12


def run(*command: str, cwd: Path = EXAMPLES) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_python(address: str, model: ToyModel) -> None:
    check(run(sys.executable, "python/retrieve.py", address), model)


@pytest.mark.skipif(bool(WHY_NO_TYPESCRIPT), reason=f"the example's packages are not installed: {WHY_NO_TYPESCRIPT}")
def test_typescript_with_stubs_generated_from_the_protos(address: str, model: ToyModel) -> None:
    run("npm", "run", "build", cwd=TYPESCRIPT)
    check(run("node", "built/retrieve.js", address, cwd=TYPESCRIPT), model)
