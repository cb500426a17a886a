"""The command in this process, and a store with toy checkpoints and a catalogue."""

import pytest
from command_outcome import Outcome, Twotower
from toy_checkpoint import toy_items, toy_model

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
