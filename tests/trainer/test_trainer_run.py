"""Whole trainings, from files to a published checkpoint."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from towers.checkpoint import CheckpointDraft, CheckpointStore, GoldenExamples, Manifest
from towers.deployment import DeploymentStore, promoted, staged
from towers.errors import ConflictError, GateRefusedError, InvalidInputError, StoreUnavailableError
from towers.schema import parse_schema
from towers.store import Store
from towers.tower import Tower
from trainer import run, state
from trainer.__main__ import main as trainer_main
from trainer.comparison import TOWERS
from trainer.judge import evaluate_version
from trainer.run import Interrupted, TrainingReport, train


class Screen(io.StringIO):
    """What a user sees; presses Ctrl-C, a real one, when a text appears."""

    def __init__(self, interrupt_at: str | None = None) -> None:
        super().__init__()
        self._interrupt_at = interrupt_at

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._interrupt_at is not None and self._interrupt_at in text:
            self._interrupt_at = None
            signal.raise_signal(signal.SIGINT)
        return written


OPTIONAL_BASELINES = {"als": "implicit", "bm25": "bm25s"}


def trained(world: Path, screen: Screen, resume: bool = False, **changes: Any) -> TrainingReport:
    console = Console(file=screen, width=160)
    return train(world / "toy.toml", store=str(world / "store"), resume=resume, console=console, **changes)


def towers(world: Path, version: int) -> tuple[Tower, Tower]:
    checkpoints = CheckpointStore(Store(str(world / "store")))
    return Tower(checkpoints.load(version, "query")), Tower(checkpoints.load(version, "item"))


def recall_of_published(world: Path, version: int, k: int) -> float:
    """Recall@k on the test split, by loops over the files and the published towers, nothing of the trainer."""
    query_tower, item_tower = towers(world, version)
    items = pq.read_table(world / "items.parquet").to_pylist()
    for item in items:
        item["added"] = item["added"].timestamp()
    names = {feature.name for feature in item_tower.encoder.features}
    embeddings = item_tower.embed_rows([{name: item[name] for name in names} for item in items])
    found = []
    for user in pq.read_table(world / "users.parquet").to_pylist():
        own = [
            row
            for row in pq.read_table(world / "interactions.parquet").to_pylist()
            if row["user_id"] == user["user_id"]
        ]
        *history, target = [row["item_id"] for row in sorted(own, key=lambda row: row["timestamp"])]
        age = None if np.isnan(user["age"]) else user["age"]
        scores = embeddings @ query_tower.embed_rows([{**user, "age": age, "history": history}])[0]
        scores[history] = -np.inf
        found.append(target in np.argsort(-scores)[:k])
    return float(np.mean(found))


def test_training_publishes_a_checkpoint_that_services_load(world: Path) -> None:
    """Interrupted after training, published by --resume, then known as published; every figure is the one promised."""
    screen = Screen(interrupt_at="Exported both towers")
    with pytest.raises(Interrupted, match=r"saved in .*run/state\.safetensors; the same command with --resume"):
        trained(world, screen)
    shown_epochs = [line for line in screen.getvalue().splitlines() if line.startswith("epoch")]
    assert shown_epochs[-1].startswith("epoch   4")
    checkpoints = CheckpointStore(Store(str(world / "store")))
    assert checkpoints.versions() == []

    screen = Screen()
    report = trained(world, screen, resume=True)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "60 users, 40 items, 600 interactions: 480 to train on, 60 to validate, 60 to test"
    assert lines[1].startswith("Training had finished after epoch 4")
    assert not any(line.startswith("epoch") for line in lines)
    assert lines[-1] == "Published checkpoint 1"
    [popularity] = [line for line in lines if "popularity" in line]
    [two_towers] = [line for line in lines if "two towers" in line]
    assert f"{report.metrics['test.popularity_recall_at_10']:.4f}" in popularity
    assert f"{report.metrics['test.recall_at_10']:.4f}" in two_towers

    assert report.version == 1
    assert report.run_folder == world / "run"
    manifest = checkpoints.manifest(1)
    assert manifest.metrics == report.metrics
    optional = [f"test.{name}_" for name, package in OPTIONAL_BASELINES.items() if find_spec(package) is not None]
    assert manifest.metrics.keys() == {
        f"{prefix}{name}_at_{k}"
        for prefix in ("validation.", "test.", "test.popularity_", "test.item_knn_", *optional)
        for name in ("recall", "ndcg", "mrr")
        for k in (5, 10)
    }
    for shown, figures in zip(shown_epochs, manifest.epochs, strict=True):
        assert f"loss {figures.loss:.4f}  validation recall_at_10 {figures.metric:.4f}" in shown
    assert max(figures.metric or 0 for figures in manifest.epochs) == manifest.metrics["validation.recall_at_10"]
    assert [figures.temperature for figures in manifest.epochs] == [pytest.approx(0.1)] * 4
    assert manifest.dim == 12
    assert manifest.config["model"]["query_hidden"] == [24]
    assert manifest.parent_version is None
    assert manifest.code_revision == run.code_revision()
    window = manifest.data_window
    assert window is not None
    assert [moment.timestamp() for moment in window] == [1_700_000_000, 1_700_000_000 + 7 * 3600 + 59]

    queries = checkpoints.validation_queries(manifest)
    assert queries is not None
    assert queries.shape == (len(run.prepare(run.read_config(world / "toy.toml"), world).split.validation), 12)

    # All items are of two kinds, 20 each, and users like only their own: chance among those left is about 10 in 11.
    assert report.metrics["test.recall_at_10"] > 1.5 * report.metrics["test.popularity_recall_at_10"]
    for k in (5, 10):
        assert report.metrics[f"test.recall_at_{k}"] == pytest.approx(recall_of_published(world, 1, k))
    judged = evaluate_version(checkpoints, 1, world).comparison
    for name, figure in judged.figures["two_towers"].items():
        assert report.metrics[f"test.{name}"] == pytest.approx(figure.value)
        assert figure.low <= figure.value <= figure.high
    assert judged.figures["item_knn"]["recall_at_5"].value == report.metrics["test.item_knn_recall_at_5"]
    # Half of the users are of each kind, and each saw ten items of forty.
    names = {part.name: part.num_queries for part in judged.slices}
    assert names["history-length=5-9"] == 60
    assert names["segment=segment 1"] == 15
    assert names["tags=calm"] + names["tags="] == 30  # Item 4 is calm and has no tags.
    assert "segment=" in names
    assert not any(name.startswith(("user_id", "item_id")) for name in names)

    query_tower, item_tower = towers(world, 1)
    assert (query_tower.dim, item_tower.dim) == (12, 12)
    anyone = query_tower.embed_rows([{}, {"user_id": "nobody", "history": ["nothing"]}])
    assert np.linalg.norm(anyone, axis=1) == pytest.approx([1.0, 1.0], abs=1e-5)

    screen = Screen()
    again = trained(world, screen, resume=True)
    assert screen.getvalue() == "This run is already published as checkpoint 1\n"
    assert again == report
    assert checkpoints.versions() == [1]

    content = pq.read_table(world / "items.parquet")
    pq.write_table(content.slice(0, 39), world / "items.parquet")
    with pytest.raises(InvalidInputError, match=r"the run was started with another file\.items; restore it"):
        trained(world, Screen(), resume=True)


def make_live(world: Path, version: int) -> None:
    deployments = DeploymentStore(Store(str(world / "store")))
    standby = staged(deployments.current(), version, "test")
    deployments.write(standby)
    deployments.write(promoted(standby, "test"))


def edit_config(world: Path, *replacements: tuple[str, str]) -> None:
    config = world / "toy.toml"
    content = config.read_text()
    for old, new in replacements:
        assert old in content
        content = content.replace(old, new)
    config.write_text(content)


def test_the_same_seed_gives_the_same_checkpoint_which_is_no_worse_than_itself(world: Path) -> None:
    edit_config(
        world,
        ("epochs = 4", "epochs = 2"),
        (
            "ks = [5, 10]",
            'ks = [5, 10]\nmax_loss = 0.0\nmax_slice_loss = { "segment=segment 1" = 0, cold-items = 0.1 }',
        ),
    )
    first = trained(world, Screen())
    make_live(world, 1)
    screen = Screen()
    second = trained(world, screen)
    checkpoints = CheckpointStore(Store(str(world / "store")))
    assert (first.version, second.version) == (1, 2)
    assert second.metrics == first.metrics
    assert checkpoints.manifest(2).files == checkpoints.manifest(1).files
    assert checkpoints.manifest(2).forced is None
    lines = screen.getvalue().splitlines()
    assert lines[0] == (
        "Warning: [evaluation] max_slice_loss: slice 'cold-items' is not among those of the test targets, so it is not "
        "judged"
    )
    at = lines.index("Beside the live checkpoint 1, differences with 95 % intervals:")
    value = f"{first.metrics['test.recall_at_10']:.4f}"
    assert lines[at + 1] == (
        f"  recall_at_10, all targets: {value}, of the live checkpoint {value}; difference +0.0000 (+0.0000 to +0.0000)"
    )
    assert lines[at + 2].startswith("  recall_at_10, segment=segment 1: ")

    parameters = state.load_state(world / "run" / state.STATE_FILE).parameters
    edit_config(world, ("epochs = 2", "epochs = 2\nseed = 1"))
    with pytest.raises(Interrupted):
        trained(world, Screen(interrupt_at="epoch   1"))
    others = state.load_state(world / "run" / state.STATE_FILE).parameters
    assert any((others[name] - value).abs().max() > 0.1 for name, value in parameters.items())


def test_towers_worse_than_the_live_ones_are_published_only_by_force(world: Path) -> None:
    trained(world, Screen())
    make_live(world, 1)
    edit_config(world, ("epochs = 4", "epochs = 1"), ("learning_rate = 0.01", "learning_rate = 1e-9"))
    with pytest.raises(GateRefusedError) as refused:
        trained(world, Screen())
    [reason, advice] = str(refused.value).splitlines()
    assert reason.startswith("not published: recall_at_10, all targets: 0.")
    assert reason.endswith("; it must be shown to lose no more than 10% of it")
    assert "with --resume --force REASON" in advice
    checkpoints = CheckpointStore(Store(str(world / "store")))
    assert checkpoints.versions() == [1]

    with pytest.raises(InvalidInputError, match="--force: say why"):
        trained(world, Screen(), resume=True, force=" ")
    screen = Screen()
    assert trained(world, screen, resume=True, force="a drill").version == 2
    assert "epoch   1" not in screen.getvalue()
    forced = checkpoints.manifest(2).forced
    assert forced is not None
    assert (forced.reason, [f"not published: {line}" for line in forced.refusals]) == ("a drill", [reason])
    assert "@" in forced.by


def test_a_live_checkpoint_that_the_data_cannot_judge_is_a_refusal(world: Path) -> None:
    edit_config(world, ("epochs = 4", "epochs = 1"))
    trained(world, Screen())
    make_live(world, 1)
    edit_config(world, ('[[features]]\nname = "price"\nowner = "item"\nkind = "number"\n', ""))
    items = pq.read_table(world / "items.parquet")
    pq.write_table(items.drop_columns("price"), world / "items.parquet")
    with pytest.raises(GateRefusedError, match=r"live checkpoint 1 cannot be judged on this data: .*column 'price'"):
        trained(world, Screen())


def run_trainer(world: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", str(world / "toy.toml"), "--store", str(world / "store")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=world,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )


def test_ctrl_c_in_a_real_process_leaves_a_state_that_resume_publishes(world: Path) -> None:
    config = world / "toy.toml"
    config.write_text(config.read_text().replace("epochs = 4", "epochs = 12").replace("patience = 4", "patience = 12"))
    process = run_trainer(world)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "epoch  12" not in rest
    [line] = errors.splitlines()
    assert line.startswith("Interrupted. The run is saved in ")
    assert line.endswith("the same command with --resume goes on from there")

    screen = Screen()
    trained(world, screen, resume=True)
    lines = screen.getvalue().splitlines()
    assert lines[1].startswith("Resuming in epoch ")
    assert not any(line.startswith("epoch   1") for line in lines)
    assert lines[-1] == "Published checkpoint 1"
    assert towers(world, 1)[1].version == 1


def test_a_mistake_ends_with_one_line_and_exit_code_2(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(world, ('name = "brand"', 'name = "make"'))
    monkeypatch.setattr(sys, "argv", ["trainer", str(world / "toy.toml"), "--store", str(world / "store")])
    assert trainer_main() == 2
    output, errors = capsys.readouterr()
    assert output == ""
    [line] = errors.splitlines()
    assert "items.parquet: column 'make' (feature 'make') is missing. The file has" in line


def test_resume_without_a_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder is named after the configuration unless it says otherwise."""
    config = world / "toy.toml"
    config.write_text(config.read_text().replace('run_folder = "run"', ""))
    monkeypatch.chdir(world)
    with pytest.raises(InvalidInputError, match=r"^var/runs/toy/state\.safetensors: there is no run to resume"):
        trained(world, Screen(), resume=True)


def test_resume_with_another_configuration(world: Path) -> None:
    with pytest.raises(Interrupted):
        trained(world, Screen(interrupt_at="epoch   1"))
    config = world / "toy.toml"
    config.write_text(config.read_text().replace("learning_rate = 0.01", "learning_rate = 0.02"))
    with pytest.raises(
        InvalidInputError, match=r"another config\.training\.learning_rate; restore it, or train afresh"
    ):
        trained(world, Screen(), resume=True)


def test_ctrl_c_before_training_does_not_pass_an_old_run_for_this_one(world: Path) -> None:
    with pytest.raises(Interrupted, match="--resume"):
        trained(world, Screen(interrupt_at="epoch   1"))
    with pytest.raises(Interrupted, match="nothing is saved, run the same command again"):
        trained(world, Screen(interrupt_at="60 users"))


def test_a_fresh_start_replaces_an_old_run(world: Path) -> None:
    with pytest.raises(Interrupted):
        trained(world, Screen(interrupt_at="epoch   2"))
    screen = Screen(interrupt_at="epoch   1")
    with pytest.raises(Interrupted):
        trained(world, screen)
    assert "epoch   1" in screen.getvalue()
    assert "epoch   2" not in screen.getvalue()


def test_notes_about_the_data_are_shown(world: Path) -> None:
    items = pq.read_table(world / "items.parquet")
    pq.write_table(pa.concat_tables([items, items.slice(0, 1)]), world / "items.parquet")
    screen = Screen(interrupt_at="60 users")
    with pytest.raises(Interrupted):
        trained(world, screen)
    assert screen.getvalue().startswith("Warning: ")
    assert "items.parquet: column 'item_id': 1 rows repeat an id; the last of each was kept" in screen.getvalue()


def test_an_unreachable_store_is_noticed_before_training(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    screen = Screen()
    with pytest.raises(StoreUnavailableError):
        train(world / "toy.toml", store="s3://bucket/x", resume=False, console=Console(file=screen))
    assert screen.getvalue() == ""


SCHEMA = parse_schema(
    [
        {"name": "user_id", "owner": "query", "kind": "categorical"},
        {"name": "item_id", "owner": "item", "kind": "categorical"},
    ]
)
GOLDEN = GoldenExamples(features=[{}], embeddings=[[1.0]])
DRAFT = CheckpointDraft(
    dim=1,
    schema=SCHEMA,
    vocabularies={"user_id": [], "item_id": []},
    towers={"query": b"", "item": b""},
    golden={"query": GOLDEN, "item": GOLDEN},
    metrics={},
    config={},
    data_window=None,
    code_revision="",
    parent_version=None,
)


class Overtaken(CheckpointStore):
    """A real store in which another publisher is first, a given number of times."""

    def __init__(self, store: Store, times: int) -> None:
        super().__init__(store)
        self._times = times

    def publish(self, draft: CheckpointDraft) -> Manifest:
        if self._times:
            self._times -= 1
            super().publish(dataclasses.replace(draft, code_revision="the other"))
            raise ConflictError("another publisher took the number; publish again")
        return super().publish(draft)


def test_a_publisher_that_is_overtaken_takes_the_next_number(tmp_path: Path) -> None:
    screen = Screen()
    checkpoints = Overtaken(Store(str(tmp_path)), times=2)
    assert run.publish(checkpoints, DRAFT, Console(file=screen, width=160)) == 3
    assert checkpoints.manifest(3).parent_version == 2
    assert screen.getvalue().count("publishing under the next number") == 2


def test_a_publisher_that_is_always_overtaken_gives_up_and_says_how_to_go_on(tmp_path: Path) -> None:
    checkpoints = Overtaken(Store(str(tmp_path)), times=100)
    with pytest.raises(ConflictError, match="with --resume, it trains nothing again"):
        run.publish(checkpoints, DRAFT, Console(file=Screen()))
    assert len(checkpoints.versions()) == 5


def test_a_store_that_fails_at_the_end_says_how_to_go_on(tmp_path: Path) -> None:
    class Broken(CheckpointStore):
        def publish(self, draft: CheckpointDraft) -> Manifest:
            raise StoreUnavailableError("disk full")

    with pytest.raises(
        StoreUnavailableError, match=r"disk full\. The trained towers are saved: .* --resume to publish"
    ):
        run.publish(Broken(Store(str(tmp_path))), DRAFT, Console(file=Screen()))


def test_the_code_revision_is_a_commit_only_in_the_projects_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = run.code_revision()
    assert revision
    # Copied into another repository that does not track it: the package's version.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    copied = tmp_path / "run.py"
    copied.write_bytes(Path(run.__file__).read_bytes())
    monkeypatch.setattr(run, "__file__", str(copied))
    assert run.code_revision() == run.importlib.metadata.version("twotower")


def test_a_given_split_is_trained_and_published_without_validation(world: Path) -> None:
    edit_config(world, ("epochs = 4", "epochs = 1"), ("[data]", '[data]\nsplit_column = "split"'))
    table = pq.read_table(world / "interactions.parquet")
    # Not each user's newest, so that the split shows.
    split = ["test" if row % 10 == 3 else "train" for row in range(len(table))]
    pq.write_table(table.append_column("split", [split]), world / "interactions.parquet")
    screen = Screen()
    report = trained(world, screen)
    assert "validation" not in screen.getvalue()
    assert not any(name.startswith("validation") for name in report.metrics)
    judged = evaluate_version(CheckpointStore(Store(str(world / "store"))), report.version, world).comparison
    assert judged.figures[TOWERS]["recall_at_10"].value == pytest.approx(report.metrics["test.recall_at_10"])
