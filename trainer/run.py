"""`twotower train`: read, train, measure, export, publish.

Deliberately does not know the command line; every line a user reads goes to the console it is given.
"""

import dataclasses
import getpass
import importlib.metadata
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from towers.checkpoint import MAX_VALIDATION_QUERIES, CheckpointDraft, CheckpointStore, Forced
from towers.deployment import DeploymentStore
from towers.errors import (
    ConflictError,
    CorruptArtefactError,
    CrossTowerFeatureError,
    GateRefusedError,
    InvalidInputError,
    NotFoundError,
    StoreUnavailableError,
)
from towers.features import FeatureEncoder
from towers.schema import Owner
from towers.store import Store
from trainer import comparison, curves, data, export, gates, losses, quantise, state
from trainer.baselines import baselines
from trainer.bm25 import Texts, texts_of
from trainer.config import ExportConfig, TrainerConfig, read_config
from trainer.encode import DataEncoder
from trainer.evaluate import Ranking, rank
from trainer.fit import FittedSchema, fit_schema
from trainer.matryoshka import tower_scores
from trainer.model import TwoTowers
from trainer.published import open_published
from trainer.questions import ask
from trainer.ranks import ALONE, Ranks
from trainer.shown import Shown
from trainer.slices import Slice, all_slices
from trainer.step import TrainingExamples
from trainer.text import encoder_files
from trainer.train import HeldOut, embed_items, embed_queries, train_towers, validate

RUNS = Path("var/runs")
_CURVES = "tensorboard"

_PUBLISH_ATTEMPTS = 5
_CHECKED_QUERIES = 1000
_NOT_TRAINED_ON: Any = {
    "run_folder": True,
    "tensorboard": True,
    "data": {"folder"},
    "features": {"__all__": {"encoder"}},
    "evaluation": {"max_loss", "max_slice_loss"},
    "export": True,
}
"""Keys of the configuration that change nothing about the trained towers."""


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """Ctrl-C. The message says what is saved and how to go on."""


@dataclass(frozen=True)
class TrainingReport:
    """What a run became."""

    version: int
    metrics: Mapping[str, float]
    run_folder: Path


@dataclass(frozen=True)
class Prepared:
    """All that training and measuring need, encoded."""

    log: data.InteractionLog
    split: data.Split
    fitted: FittedSchema
    encoder: DataEncoder
    items: dict[str, Tensor]
    item_counts: Tensor
    """`[I]` training interactions of each item."""
    examples: TrainingExamples
    validation: HeldOut
    test: HeldOut
    gated_slices: Sequence[Slice]
    """Parts of the test targets that publishing is judged by too."""
    num_users: int
    texts: Texts | None
    """What a text search of the users among the items would read."""
    notes: tuple[str, ...]


def train(
    config_path: Path,
    *,
    store: str,
    resume: bool,
    console: Console,
    data_folder: Path | None = None,
    force: str | None = None,
    ranks: Ranks = ALONE,
) -> TrainingReport | None:
    """Trains both towers as a configuration says and publishes them as a checkpoint.

    Args:
        config_path: The TOML file.
        store: The object store to publish to.
        resume: Whether to go on from the state of an earlier run with the same configuration and data. A run that
            had finished training is exported and published without training again, once for each `[export]`.
        console: Gets progress and results.
        data_folder: Where the data files are; instead of `[data] folder`.
        force: Why to publish although gates refuse; the manifest keeps it. None: they decide.
        ranks: The processes that train together, each with these arguments and the same files; the first publishes.

    Returns:
        What the run became; None in all processes but the first.

    Raises:
        InvalidInputError: the configuration or the data; a line for each mistake names file, column or key, and fix.
        GateRefusedError: a gate refuses the towers, a line for each reason. `resume` with `force` publishes them.
        StoreUnavailableError: the store cannot be reached. Once training is done, `resume` publishes without training.
        ConflictError: other publishers were first several times.
        Interrupted: Ctrl-C; the message says how to resume.
    """
    if force is not None and not force.strip():
        raise InvalidInputError("--force: say why the gates are overridden, the manifest keeps it")
    config = read_config(config_path)
    folder = data_folder if data_folder is not None else config_path.parent / config.data.folder
    run_folder = config_path.parent / config.run_folder if config.run_folder else RUNS / config_path.stem
    state_file = run_folder / state.STATE_FILE
    objects = Store(store)
    checkpoints = CheckpointStore(objects)
    # An unreachable store is better known before the training than after it.
    checkpoints.versions()
    held = state.alone_in(run_folder) if ranks.is_first else nullcontext()
    with held, _interruptible(state_file, resume), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        files = data.data_files(config.data, folder) | encoder_files(config.feature_schema())
        origin = _origin(config, data.digest_files(files))
        resumed = _resumed(state_file, origin) if resume else None
        published = resumed.progress.published.get(objects.url) if resumed else None
        if published is not None and _is_published(checkpoints, published, config.export):
            _say(console, f"This run is already published as checkpoint {published}")
            return TrainingReport(published, checkpoints.manifest(published).metrics, run_folder)

        prepared = prepare(config, folder)
        for note in prepared.notes:
            _say(console, f"Warning: {note}")
        _say(console, _description(prepared))
        if resumed is not None:
            _say(console, _resumption(resumed.progress))
        model = TwoTowers(prepared.fitted.schema, prepared.encoder.query, prepared.encoder.item, config.model)
        num_epochs = resumed.progress.epoch if resumed else 0
        is_shown = config.tensorboard and ranks.is_first
        with (
            curves.written(run_folder / _CURVES, num_epochs) if is_shown else nullcontext(curves.unnoted) as note_epoch
        ):
            finished = train_towers(
                model,
                prepared.items,
                prepared.examples,
                prepared.validation,
                config,
                origin,
                state_file,
                console,
                resumed,
                ranks,
                note_epoch,
            )
        if not ranks.is_first:
            return None
        gates.check_finite(model)
        for tower in (model.query, model.item):
            tower.cut(config.widths[-1])
        embeddings: dict[Owner, Tensor] = {
            "query": embed_queries(model.query, prepared.test.queries),
            "item": embed_items(model.item, prepared.items),
        }
        rankings = _rankings(embeddings, prepared, config)
        found = _compare(rankings, prepared, config)
        metrics = _metrics(found, validate(model, prepared.items, prepared.validation, config))
        console.print(_figures(found, config))
        refusals = [
            *gates.collapse_refusals(embeddings),
            *_live_refusals(objects, rankings[comparison.TOWERS], prepared, config, folder, console),
        ]
        forced = _overridden(refusals, force)
        exported = _export(model, prepared, config.export, console)
        draft = export.draft_checkpoint(
            exported,
            prepared.fitted,
            metrics,
            config.model_dump(mode="json"),
            data.data_window(prepared.log, prepared.split.train),
            code_revision(),
            forced,
            config.reranker_features(),
            finished.progress.epochs,
        )
        version = publish(checkpoints, draft, console)
        _say(console, f"Published checkpoint {version}")
        published_in = {**finished.progress.published, objects.url: version}
        progress = dataclasses.replace(finished.progress, published=published_in)
        state.save_state(state_file, dataclasses.replace(finished, progress=progress))
    return TrainingReport(version, metrics, run_folder)


def prepare(config: TrainerConfig, folder: Path) -> Prepared:
    """Reads, splits, fits and encodes the data.

    Args:
        config: The configuration.
        folder: Where the data files are.

    Raises:
        CrossTowerFeatureError: a column of one side differs between rows of the other; a line for each feature.
        InvalidInputError: a mistake in the data; names file, column and fix.
    """
    tables = data.read_data(config.data, config.feature_schema(), folder)
    if tables.crossings:
        raise CrossTowerFeatureError("\n".join(tables.crossings))
    split = tables.split
    fitted = fit_schema(config.feature_schema(), tables, split)
    encoder = DataEncoder(fitted, tables)
    positives = torch.from_numpy(tables.log.items[split.train])
    item_counts = torch.bincount(positives, minlength=len(tables.items.ids))
    test = _held_out(tables.log, split.test, encoder, config)
    gated_slices, notes = _gated_slices(tables, fitted, item_counts, test, config)
    return Prepared(
        log=tables.log,
        split=split,
        fitted=fitted,
        encoder=encoder,
        items=encoder.items(),
        item_counts=item_counts,
        examples=TrainingExamples(
            encoder.training_queries(split.train, config.training.history_share),
            positives,
            losses.log_sampling_probabilities(item_counts),
            _weights(tables.log, split.train),
            encoder.items_as_of(split.train) if config.training.items_as_of == "interaction" else None,
            _shown(tables) if config.training.shown_negatives else None,
        ),
        validation=_held_out(tables.log, split.validation, encoder, config),
        test=test,
        gated_slices=gated_slices,
        num_users=len(tables.users.ids),
        texts=texts_of(tables, fitted.schema),
        notes=(*tables.notes, *encoder.truncation_notes(), *notes),
    )


def _is_published(checkpoints: CheckpointStore, version: int, options: ExportConfig) -> bool:
    """Whether a run's checkpoint is still there, exported in this way; in another way it may be published once more."""
    if version not in checkpoints.versions():
        return False
    return bool(ExportConfig.model_validate(checkpoints.manifest(version).config.get("export", {})) == options)


def _weights(log: data.InteractionLog, positions: NDArray[np.int64]) -> Tensor | None:
    """Divided by their mean: only their proportions mean something, and the learning rate keeps its scale."""
    if log.weights is None:
        return None
    weights = log.weights[positions]
    return torch.from_numpy((weights / weights.mean()).astype(np.float32))


def _shown(tables: data.TrainingData) -> Shown | None:
    if tables.impressions is None:
        return None
    if not len(tables.impressions.items):
        raise InvalidInputError(
            "[training] shown_negatives: no row of what is trained on says 0 in [data] label_column; give some, or "
            "leave it out"
        )
    users, items = map(torch.from_numpy, (tables.impressions.users, tables.impressions.items))
    return Shown.of(users, items, len(tables.users.ids), len(tables.items.ids))


def publish(checkpoints: CheckpointStore, draft: CheckpointDraft, console: Console) -> int:
    """Publishes a draft as the child of the newest checkpoint, under the next number when another publisher is first.

    Returns:
        The version.

    Raises:
        ConflictError: others were first several times.
        StoreUnavailableError: the store cannot be written; says how to publish without training again.
    """
    for attempt in range(1, _PUBLISH_ATTEMPTS + 1):
        try:
            parent_version = max(checkpoints.versions(), default=None)
            return checkpoints.publish(dataclasses.replace(draft, parent_version=parent_version)).version
        except ConflictError as error:
            if attempt == _PUBLISH_ATTEMPTS:
                raise ConflictError(f"{error}: run the same command with --resume, it trains nothing again") from error
            _say(console, f"{error}: publishing under the next number")
        except StoreUnavailableError as error:
            raise StoreUnavailableError(
                f"{error}. The trained towers are saved: run the same command with --resume to publish them"
            ) from error
    raise AssertionError("the last attempt returns or raises")


def code_revision() -> str:
    """The commit that this code is at, `-dirty` with changes; the package's version where it is not in a repository."""
    here = Path(__file__).parent
    try:
        # Tracked, because an installed package may lie inside a repository that is not its own.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        return _git(here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return importlib.metadata.version("twotower")


def _held_out(
    log: data.InteractionLog, positions: NDArray[np.int64], encoder: DataEncoder, config: TrainerConfig
) -> HeldOut:
    questions = ask(log, positions, config.evaluation.exclude_seen)
    return HeldOut(encoder.queries(questions.positions), questions)


def _gated_slices(
    tables: data.TrainingData, fitted: FittedSchema, item_counts: Tensor, test: HeldOut, config: TrainerConfig
) -> tuple[list[Slice], list[str]]:
    names = list(config.evaluation.max_slice_loss)
    if not names:
        return [], []
    slices = all_slices(tables, fitted.schema, item_counts.numpy(), test.questions)
    return gates.chosen_slices(names, slices, fitted.schema)


def _rankings(embeddings: Mapping[Owner, Tensor], prepared: Prepared, config: TrainerConfig) -> dict[str, Ranking]:
    """How the best epoch and the baselines rank the test set."""
    questions = prepared.test.questions
    models = {
        **baselines(prepared.log, prepared.split.train, questions.positions, len(prepared.item_counts), prepared.texts),
        **tower_scores(embeddings["query"], embeddings["item"], config.widths),
    }
    return {
        name: rank(scores, questions.targets, questions.excluded, config.evaluation.ks)
        for name, scores in models.items()
    }


def _compare(rankings: Mapping[str, Ranking], prepared: Prepared, config: TrainerConfig) -> comparison.Comparison:
    targets = prepared.test.questions.targets.items
    return comparison.compare(rankings, config.evaluation.ks, prepared.item_counts.numpy(), targets)


def _live_refusals(
    objects: Store, ranking: Ranking, prepared: Prepared, config: TrainerConfig, folder: Path, console: Console
) -> list[str]:
    """Why the towers may not follow the live checkpoint; says how they compare."""
    version = DeploymentStore(objects).current().live_version
    if version is None:
        return []
    options = config.evaluation
    try:
        live = open_published(CheckpointStore(objects), version)
        live_ranking = gates.live_ranking(live, config.data, folder, prepared.test.questions, options.ks)
    except (InvalidInputError, NotFoundError, CorruptArtefactError) as error:
        return [f"the live checkpoint {version} cannot be judged on this data: {error}"]
    judgements = gates.judge(
        ranking, live_ranking, options.metric, options.max_loss, prepared.gated_slices, options.max_slice_loss
    )
    _say(console, f"Beside the live checkpoint {version}, differences with 95 % intervals:")
    for judgement in judgements:
        _say(console, f"  {judgement}")
    return [judgement.refusal for judgement in judgements if not judgement.is_passed]


def _overridden(refusals: Sequence[str], force: str | None) -> Forced | None:
    if not refusals:
        return None
    if force is None:
        raise GateRefusedError(
            "\n".join(
                [
                    *(f"not published: {refusal}" for refusal in refusals),
                    "The trained towers are saved: run the same command with --resume --force REASON to publish them "
                    "all the same",
                ]
            )
        )
    return Forced(by=_user(), reason=force.strip(), refusals=refusals)


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"uid {os.getuid()}"  # Containers run as users that have no name.
    return f"{name}@{socket.gethostname()}"


def _metrics(found: comparison.Comparison, validation: Mapping[str, float]) -> dict[str, float]:
    """What the manifest keeps of the figures: the towers' by their bare names, the baselines' behind their own."""
    metrics = {f"validation.{name}": value for name, value in validation.items()}
    for model, figures in found.figures.items():
        prefix = "" if model == comparison.TOWERS else f"{model}_"
        metrics |= {f"test.{prefix}{name}": figure.value for name, figure in figures.items()}
    return metrics


def _export(model: TwoTowers, prepared: Prepared, options: ExportConfig, console: Console) -> export.ExportedTowers:
    positions = np.concatenate([prepared.split.test, prepared.split.validation])[:_CHECKED_QUERIES]
    rows: Mapping[Owner, export.Rows] = {
        "query": prepared.encoder.raw_queries(positions.tolist()),
        "item": prepared.encoder.raw_items(range(len(prepared.item_counts))),
    }
    encoders: Mapping[Owner, FeatureEncoder] = {"query": prepared.encoder.query, "item": prepared.encoder.item}
    validation = prepared.split.validation
    step = -(-len(validation) // MAX_VALIDATION_QUERIES) or 1
    validation_queries = prepared.encoder.raw_queries(validation[::step].tolist())
    pairs = paired(prepared.encoder, prepared.log, prepared.test.questions.positions[:_CHECKED_QUERIES])
    exported = export.export_towers(model, prepared.fitted, encoders, rows, validation_queries, pairs)
    _say(console, _agreement(exported))
    if not options.int8:
        return exported
    coarse, overlap = quantise.quantised(exported, prepared.fitted, rows, validation_queries)
    is_close = overlap >= options.int8_min_overlap
    _say(
        console,
        f"In int8 the towers find {overlap:.1%} of the {quantise.K} best items of float32, for {len(rows['query']):,} "
        f"queries; int8_min_overlap = {options.int8_min_overlap:.1%}: published in {'int8' if is_close else 'float32'}",
    )
    return coarse if is_close else exported


def paired(encoder: DataEncoder, log: data.InteractionLog, positions: NDArray[np.int64]) -> dict[Owner, export.Paired]:
    """Both sides of the interactions at positions, one of each user, as they are and with the other side moved on."""
    users, items = log.users.copy(), log.items.copy()
    users[positions], items[positions] = np.roll(users[positions], 1), np.roll(items[positions], 1)
    pairs = encoder.raw_pairs(positions)
    others: Mapping[Owner, data.InteractionLog] = {
        "query": dataclasses.replace(log, items=items),
        "item": dataclasses.replace(log, users=users),
    }
    return {
        owner: export.Paired(pairs[owner], encoder.with_log(other).raw_pairs(positions)[owner])
        for owner, other in others.items()
    }


def _origin(config: TrainerConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a resumed run must have in common with its start; where files lie does not matter, what they hold does."""
    settings = config.model_dump(mode="json", exclude=_NOT_TRAINED_ON)
    return {"config": settings, "file": dict(digests)}


def _resumed(state_file: Path, origin: Mapping[str, Any]) -> state.RunState:
    resumed = state.load_state(state_file)
    state.check_origin(state_file, resumed.origin, origin)
    return resumed


@contextmanager
def _interruptible(state_file: Path, resume: bool) -> Iterator[None]:
    """Says what Ctrl-C left behind. An older run's state, from before a fresh start, is not this run's."""
    before = _modified_ns(state_file)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if resume or _modified_ns(state_file) != before:
            message = (
                f"Interrupted. The run is saved in {state_file}; the same command with --resume goes on from there"
            )
        else:
            message = "Interrupted before training began; nothing is saved, run the same command again"
        raise Interrupted(message) from interrupt


def _modified_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _description(prepared: Prepared) -> str:
    split = prepared.split
    return (
        f"{prepared.num_users:,} users, {len(prepared.item_counts):,} items, {len(prepared.log.items):,} interactions: "
        f"{len(split.train):,} to train on, {len(split.validation):,} to validate, {len(split.test):,} to test"
    )


def _resumption(progress: state.Progress) -> str:
    if progress.is_finished:
        return f"Training had finished after epoch {progress.epoch}; epoch {progress.best_epoch} is the best"
    return f"Resuming in epoch {progress.epoch + 1}, after step {progress.step}"


def _agreement(exported: export.ExportedTowers) -> str:
    differences = ", ".join(f"{owner} tower {difference:.1e}" for owner, difference in exported.differences.items())
    return f"Exported both towers; largest difference to the trained ones: {differences}"


def _figures(found: comparison.Comparison, config: TrainerConfig) -> Table:
    seen = "seen items left out" if config.evaluation.exclude_seen else "seen items included"
    title = f"Test: {found.num_targets:,} targets of {found.num_queries:,} users, all items ranked, {seen}"
    return comparison.accuracy_table(found, config.evaluation.ks, title)


def _git(folder: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=10)
    return finished.stdout.strip()


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
