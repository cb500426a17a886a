"""Real trainings in a toy world: a healthy one, and one for each fault that the doctor must find."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import doctor_world
import numpy as np
import pyarrow as pa
import pytest

from cli.main import run
from towers.checkpoint import CheckpointStore
from towers.store import Store
from trainer import losses
from trainer.doctor.examine import examine
from trainer.doctor.report import Finding, Report

FAULTS = {"collapsed-tower", "temperature-too-high", "wrong-logq-sign", "leaked-feature", "untrained-history"}


def examined(folder: Path, with_data: bool = True) -> Report:
    return examine(CheckpointStore(Store(str(folder / "store"))), 1, folder if with_data else None)


def found(report: Report, name: str) -> Finding:
    """The one finding of this name."""
    [finding] = [finding for finding in report.findings if finding.name == name]
    return finding


def names(report: Report) -> list[str]:
    return [finding.name for finding in report.findings]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doctor_world.trained(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The item tower has but a column that is the same for all items; the gate sees it and is overridden."""
    features = doctor_world.FEATURES + '\n[[features]]\nname = "constant"\nowner = "item"\nkind = "categorical"\n'
    features = features.replace(
        'name = "item_id"\nowner = "item"', 'name = "item_id"\nowner = "item"\nmin_count = 10000'
    )
    features = features.replace('name = "genre"\nowner = "item"', 'name = "genre"\nowner = "item"\nmin_count = 10000')
    return doctor_world.trained(tmp_path_factory.mktemp("collapsed"), features, force="a drill")


class Tags(HTMLParser):
    """Elements that a page opens, and whether all of them are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attributes if name == "id" and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attributes if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_healthy_checkpoint_has_none_of_the_faults(healthy: Path) -> None:
    report = examined(healthy)
    assert {finding.name: finding.finding for finding in report.findings if finding.severity != "note"} == {}
    assert not FAULTS & set(names(report))


def test_the_command_writes_a_page_that_needs_nothing_else(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(healthy)
    assert run(["doctor", "1", str(healthy), "--store", str(healthy / "store"), "--json", "found.json"]) == 0
    shown = capsys.readouterr().out
    assert "Page: var/doctor/1.html" in shown
    page = (healthy / "var/doctor/1.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert not re.search(r"<(script|link|img|iframe)|(src|url)=|@import", page)
    assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)', page))
    written = json.loads((healthy / "found.json").read_text())
    assert written["findings"] == [vars(finding) for finding in examined(healthy).findings]
    for finding in written["findings"]:
        assert f"{finding['severity']} {finding['name']}: {finding['finding']}" in shown
        assert f"  Remedy: {finding['remedy']}" in shown
        assert finding["finding"] in tags.texts
    assert any(text.startswith("Tale ") and "<genre>" in text for text in tags.texts)
    [training, *_] = written["sections"]
    assert training["figures"]["epochs"] == 6


def test_without_data_the_checkpoint_speaks_for_itself(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "1", "--store", str(healthy / "store"), "--html", str(tmp_path / "new" / "page.html")]) == 0
    assert "Without data only" in capsys.readouterr().out
    assert "query effective rank" in (tmp_path / "new" / "page.html").read_text()
    assert [section.title for section in examined(healthy, with_data=False).sections] == [
        "Training",
        "Geometry of the embeddings",
    ]


def test_a_version_that_is_not_there(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "9", "--store", str(healthy / "store")]) == 1
    assert re.fullmatch(r"error: .*checkpoint 9.*\n", capsys.readouterr().err)


def test_a_folder_without_the_data(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "1", str(tmp_path), "--store", str(healthy / "store")]) == 2
    assert re.fullmatch(
        r"error: \S*items\.parquet: no such file; fix \[data\] items or folder\n", capsys.readouterr().err
    )


def test_towers_that_remember_are_told_from_those_that_know(tmp_path: Path) -> None:
    """Choices are drawn without a reason, and each tenth user's newest is an item that nobody chose before."""
    log, random = doctor_world.tables()["interactions"], np.random.default_rng(5)
    newest = np.arange(doctor_world.NUM_LIKED - 1, len(log), 10 * doctor_world.NUM_LIKED)
    chosen = random.integers(doctor_world.NUM_ITEMS, size=len(log))
    chosen[newest] = doctor_world.NUM_ITEMS + np.arange(len(newest))
    items = pa.table({"item_id": np.arange(doctor_world.NUM_ITEMS + len(newest))})
    features = "".join(
        f'[[features]]\nname = "{name}_id"\nowner = "{owner}"\nkind = "categorical"\n'
        for name, owner in (("user", "query"), ("item", "item"))
    )
    changed = {"interactions": log.set_column(1, "item_id", pa.array(chosen)), "items": items}
    report = examined(doctor_world.trained(tmp_path, features, changed, epochs=20, learning_rate=0.03))
    assert {"overfitting", "cold-items-not-found"} <= set(names(report))


def test_a_collapsed_tower_is_found(collapsed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(["doctor", "1", str(collapsed), "--store", str(collapsed / "store"), "--html", str(page)]) == 1
    assert "critical collapsed-tower: The item tower has collapsed" in capsys.readouterr().out
    assert "collapsed-tower" in page.read_text()


def test_a_temperature_far_too_high_is_found(tmp_path: Path) -> None:
    finding = found(examined(doctor_world.trained(tmp_path, temperature=5.0)), "temperature-too-high")
    assert finding.severity == "critical"
    assert "temperature 5 " in finding.finding


def test_a_wrong_sign_of_logq_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_q = losses.log_sampling_probabilities
    monkeypatch.setattr(losses, "log_sampling_probabilities", lambda counts: -log_q(counts))
    finding = found(examined(doctor_world.trained(tmp_path, force="a drill")), "wrong-logq-sign")
    assert finding.severity == "critical"


def test_a_feature_made_from_what_is_to_be_predicted_is_found(tmp_path: Path) -> None:
    """Each user's newest item, which the file of the users knows as their favourite."""
    tables = doctor_world.tables()
    log = tables["interactions"]
    newest = dict(zip(log["user_id"].to_pylist(), log["item_id"].to_pylist(), strict=True))
    favourites = pa.array([f"tale {newest[user]}" for user in range(doctor_world.NUM_USERS)])
    features = doctor_world.FEATURES + '\n[[features]]\nname = "favourite"\nowner = "query"\nkind = "categorical"\n'
    users = tables["users"].append_column("favourite", favourites)
    finding = found(examined(doctor_world.trained(tmp_path, features, {"users": users})), "leaked-feature")
    assert finding.severity == "critical"
    assert "'favourite'" in finding.finding


def test_a_history_that_says_nothing_is_found(tmp_path: Path) -> None:
    """Its vocabulary knows no item: the tower has never read one."""
    entry = (
        '\n[[features]]\nname = "entry"\nowner = "item"\nkind = "categorical"\ncolumn = "item_id"\nmin_count = 10000\n'
    )
    user = '\n[[features]]\nname = "user_id"\nowner = "query"\nkind = "categorical"\n'
    features = doctor_world.FEATURES.replace('items = "item_id"', 'items = "entry"') + user + entry
    finding = found(examined(doctor_world.trained(tmp_path, features)), "untrained-history")
    assert finding.severity == "critical"
    assert "'history'" in finding.finding
    assert "min_count of 'entry'" in finding.remedy
