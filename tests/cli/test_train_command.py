"""`twotower train` as users run it: a small real training, published; Ctrl-C; wrong input."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_process import tied
from command_outcome import Twotower

CONFIG = """
[data]
interactions = "interactions.csv"
items = "items.csv"

[[features]]
name = "user_id"
owner = "query"
kind = "categorical"

[[features]]
name = "item_id"
owner = "item"
kind = "categorical"

[model]
dim = 4

[training]
batch_size = 16
epochs = {epochs}
patience = {epochs}
"""
WAIT_S = 90.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with 20 users who each saw 5 of 20 items."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [f"u{user},i{(user + step) % 20},{100 * step + user}" for user in range(20) for step in range(5)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (folder / "items.csv").write_text("\n".join(["item_id", *(f"i{item}" for item in range(20))]) + "\n")
    return folder


def configured(folder: Path, epochs: int) -> Path:
    config = folder / "small.toml"
    config.write_text(CONFIG.format(epochs=epochs))
    return config


def test_train_publishes(data: Path, tmp_path: Path, twotower: Twotower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = str(tmp_path / "store")
    result = twotower("train", str(configured(tmp_path, 2)), "--data", str(data), "--store", store)
    assert (result.exit_code, result.err) == (0, ""), result
    assert "Published checkpoint 1" in result.out
    (row,) = twotower("checkpoints", "--store", store, "--json").json
    assert (row["version"], row["dim"]) == (1, 4)
    assert "test.recall_at_10" in row["metrics"]

    outcome = twotower("evaluate", "1", str(data), "--store", store, "--json", str(tmp_path / "figures.json"))
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert "Checkpoint 1: 20 targets of 20 users, all items ranked, seen items left out" in outcome.out
    assert "item-kNN" in outcome.out
    assert "history-length=1-4" in outcome.out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["version"] == 1
    assert figures["models"]["two_towers"]["recall_at_10"]["value"] == pytest.approx(
        row["metrics"]["test.recall_at_10"]
    )
    assert twotower("evaluate", "2", str(data), "--store", store).err == (
        "error: checkpoint 2 is not published; published: [1]\n"
    )


def test_ctrl_c_leaves_a_run_to_resume(data: Path, tmp_path: Path) -> None:
    options = (str(configured(tmp_path, 100_000)), "--data", str(data), "--store", "store")
    command = tied(sys.executable, "-m", "cli.main", "train", *options)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        runs = tmp_path / "var" / "runs" / "small"
        give_up_s = time.monotonic() + WAIT_S
        while not any(path.suffix == ".safetensors" for path in runs.glob("*")):
            assert time.monotonic() < give_up_s, list(runs.glob("*"))
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "small.toml: cannot be read (No such file or directory)"),
        ("[data", "small.toml: not valid TOML"),
        (CONFIG.format(epochs=0), "small.toml: [training] epochs"),
        (CONFIG.replace('kind = "categorical"', 'kind = "colour"', 1).format(epochs=1), "small.toml: "),
    ],
)
def test_a_wrong_configuration_is_said_before_anything_is_read(
    text: str | None, words: str, twotower: Twotower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "small.toml").write_text(text)
    outcome = twotower("train", "small.toml", "--store", "store")
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert all(line.startswith("error: small.toml: ") for line in outcome.err.splitlines())
    assert words in outcome.err
    assert not (tmp_path / "store").exists()
