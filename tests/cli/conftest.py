"""The command in this process, a store with toy checkpoints and a catalogue, and the whole stack."""

from collections.abc import Iterator

import pytest
from command_outcome import Outcome, Twotower
from toy_checkpoint import toy_items, toy_model

from cli.local_stack import LocalStack
from cli.main import run
from towers.catalogue import Catalogue
from towers.checkpoint import CheckpointStore
from towers.store import Store


@pytest.fixture
def twotower(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Twotower:
    """Runs a command in this process, without settings from outside."""
    for name in ("STORE", "SHARDS", "QUERY_SERVICES", "SHARD", "ADDRESS", "FOLDER"):
        monkeypatch.delenv(f"TWOTOWER_{name}", raising=False)

    def twotower(*arguments: str) -> Outcome:
        exit_code = run(arguments)
        captured = capsys.readouterr()
        return Outcome(exit_code, captured.out, captured.err)

    return twotower


@pytest.fixture
def store(folder_url: str) -> Store:
    """Two checkpoints and a catalogue; nothing is deployed."""
    store = Store(folder_url)
    Catalogue(store).upsert(toy_items())
    for seed in (1, 2):
        model = toy_model(dim=4 + 4 * seed, seed=seed)
        CheckpointStore(store).publish(model.draft({"test.recall_at_10": 0.1 * seed, "validation.recall_at_10": 0.5}))
    return store


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Everything that serves, ready at the one version there is."""
    folder = tmp_path_factory.mktemp("stack")
    store = Store(str(folder / "store"))
    Catalogue(store).upsert(toy_items())
    CheckpointStore(store).publish(toy_model().draft())
    with LocalStack(store=store.url, folder=folder, query_port=0) as stack:
        stack.wait_ready(timeout_s=60.0)
        yield stack
