"""A published checkpoint over a set of data: its towers as services run them, its features as it encodes them.

Deliberately does not know what the embeddings are for.
"""

import json
from collections.abc import Mapping
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
from trainer.encode import DataEncoder, Tensors
from trainer.fit import FittedSchema

_ROWS_AT_ONCE = 4096


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
        items, queries = encoder.items(), encoder.queries(positions)
        return (
            torch.cat([self._run("query", queries.batch(rows)) for rows in _blocks(len(queries))]),
            torch.cat(
                [
                    self._run("item", {name: values[rows] for name, values in items.items()})
                    for rows in _blocks(len(data.items.ids))
                ]
            ),
        )

    def _run(self, owner: Owner, features: Tensors) -> Tensor:
        return torch.from_numpy(self.towers[owner].embed({name: values.numpy() for name, values in features.items()}))


def open_published(checkpoints: CheckpointStore, version: int) -> PublishedTowers:
    """Loads both towers of a checkpoint, verified.

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
        towers={tower.owner: Tower(tower) for tower in files},
    )


def _blocks(num_rows: int) -> tuple[Tensor, ...]:
    return torch.split(torch.arange(num_rows), _ROWS_AT_ONCE)
