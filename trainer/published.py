"""A published checkpoint over a set of data: its towers as services run them, its features as it encodes them.

Deliberately does not know what the embeddings are for.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from towers.checkpoint import CheckpointStore, Manifest
from towers.errors import InvalidInputError
from towers.schema import Owner
from towers.tower import Tower
from trainer.config import TrainerConfig
from trainer.data import TrainingData
from trainer.encode import DataEncoder, EncodedQueries, Tensors
from trainer.fit import FittedSchema
from trainer.step import take

_ROWS_AT_ONCE = 4096

Change = Callable[[Tensors, Tensor], Tensors]
"""Makes other features of those of the queries at some rows."""


def unchanged(features: Tensors, rows: Tensor) -> Tensors:  # noqa: ARG001 - the signature of a change
    """The features themselves."""
    return features


@dataclass(frozen=True)
class PublishedTowers:
    """Both towers of a checkpoint, ready to run, and what they were made from."""

    manifest: Manifest
    fitted: FittedSchema
    towers: Mapping[Owner, Tower]

    def config(self) -> TrainerConfig:
        """The training configuration.

        Raises:
            InvalidInputError: this release cannot read it.
        """
        try:
            return TrainerConfig.model_validate_json(json.dumps(self.manifest.config))
        except ValidationError as error:
            mistake = error.errors()[0]
            raise InvalidInputError(
                f"checkpoint {self.manifest.version}: its training configuration cannot be read "
                f"({'.'.join(map(str, mistake['loc']))}: {mistake['msg']}); use the release that trained it"
            ) from error

    def embed(self, data: TrainingData, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Embeds queries at positions of the log, `[Q, D]`, and all items, `[I, D]`.

        Raises:
            InvalidInputError: a value that its feature does not allow; names the file.
        """
        encoder = DataEncoder(self.fitted, data)
        return self.embed_queries(encoder.queries(positions)), self.embed_items(encoder.items())

    def embed_queries(self, queries: EncodedQueries, change: Change = unchanged) -> Tensor:
        """Embeddings `[Q, D]` of encoded queries, of whose features something else may be made first."""
        blocks = _blocks(len(queries))
        return torch.cat([self._run("query", change(queries.batch(rows), rows)) for rows in blocks])

    def embed_items(self, items: Tensors) -> Tensor:
        """Embeddings `[I, D]` of encoded items."""
        blocks = _blocks(len(next(iter(items.values()))))
        return torch.cat([self._run("item", take(items, rows)) for rows in blocks])

    def _run(self, owner: Owner, features: Tensors) -> Tensor:
        return torch.from_numpy(self.towers[owner].embed({name: values.numpy() for name, values in features.items()}))


def open_published(checkpoints: CheckpointStore, version: int) -> PublishedTowers:
    """Loads both towers of a checkpoint, verified, to run with as many threads as torch does.

    Raises:
        NotFoundError: the version is not published.
        CorruptArtefactError: a file is missing or damaged.
        StoreUnavailableError: the store cannot be read.
    """
    files = [checkpoints.load(version, owner) for owner in ("query", "item")]
    vocabularies = {name: tokens for tower in files for name, tokens in tower.vocabularies.items()}
    tokenizers = {name: content for tower in files for name, content in tower.tokenizers.items()}
    return PublishedTowers(
        manifest=files[0].manifest,
        fitted=FittedSchema(files[0].schema, vocabularies, tokenizers),
        towers={tower.owner: Tower(tower, torch.get_num_threads()) for tower in files},
    )


def _blocks(num_rows: int) -> tuple[Tensor, ...]:
    return torch.split(torch.arange(num_rows), _ROWS_AT_ONCE)
