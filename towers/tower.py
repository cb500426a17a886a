"""A tower at work: raw features in, unit embeddings out, through ONNX Runtime.

Deliberately does not know torch, nor what the embeddings are for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from towers.checkpoint import TowerFiles
from towers.errors import CorruptArtefactError, GoldenDriftError, InvalidFeatureError, TwoTowerError
from towers.features import Arrays, FeatureEncoder, RawValue
from towers.text import groups_of_similar_length

OUTPUT_NAME = "tower_output"
GOLDEN_TOLERANCE = 1e-4
"""Largest absolute difference to a golden embedding; float32 on another processor stays near 1e-6."""
_UNIT_TOLERANCE = 1e-3


def input_name(feature_name: str) -> str:
    """Name of a feature's input in the ONNX graph."""
    return f"feature_{feature_name}"


class Tower:
    """One tower of one checkpoint, verified and ready."""

    def __init__(self, files: TowerFiles, num_threads: int = 1) -> None:
        """Builds the session and replays the golden examples.

        Args:
            files: The verified files.
            num_threads: Threads of one pass.

        Raises:
            CorruptArtefactError: the ONNX graph does not load, or does not fit the schema.
            GoldenDriftError: the golden embeddings do not come out, or are not unit vectors.
        """
        self.version = files.manifest.version
        self.owner = files.owner
        self.dim = files.manifest.dim
        try:
            self.encoder = FeatureEncoder(files.schema, files.owner, files.vocabularies, files.tokenizers)
        except InvalidFeatureError as error:
            raise CorruptArtefactError(f"checkpoint {self.version}: {error}") from error
        self._tokenised = files.schema.tokenizer_names(files.owner)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(files.onnx, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types for a graph it cannot load.
            raise CorruptArtefactError(
                f"checkpoint {self.version}: the {self.owner} tower does not load: {error}"
            ) from error
        self.golden_difference = self._replay_golden(files)

    def embed(self, arrays: Arrays) -> NDArray[np.float32]:
        """Embeds encoded features.

        Args:
            arrays: Encoded features of B rows, as `FeatureEncoder.encode` returns them.

        Returns:
            `[B, D]` unit embeddings.
        """
        if not self._tokenised:
            return self._run(arrays)
        lengths = {name: (arrays[name] != 0).sum(axis=1) for name in self._tokenised}  # [B] each
        groups = groups_of_similar_length(np.sum([*lengths.values()], axis=0))
        embeddings = np.empty((sum(map(len, groups)), self.dim), dtype=np.float32)  # [B, D]
        for group in groups:
            of_group = {name: array[group] for name, array in arrays.items()}
            for name, of_rows in lengths.items():
                of_group[name] = of_group[name][:, : max(1, of_rows[group].max())]
            embeddings[group] = self._run(of_group)
        return embeddings

    def embed_rows(self, rows: Sequence[Mapping[str, RawValue]]) -> NDArray[np.float32]:
        """Embeds raw features, `[B, D]`.

        Raises:
            InvalidFeatureError: a feature that the schema does not allow.
        """
        return self.embed(self.encoder.encode_rows(rows))

    def _run(self, arrays: Arrays) -> NDArray[np.float32]:
        feeds = {input_name(name): array for name, array in arrays.items()}
        return self._session.run([OUTPUT_NAME], feeds)[0]  # type: ignore[no-any-return]

    def _replay_golden(self, files: TowerFiles) -> float:
        if not files.golden.features:
            raise CorruptArtefactError(f"checkpoint {self.version}: it has no golden {self.owner} examples")
        try:
            expected: NDArray[Any] = np.array(files.golden.embeddings, dtype=np.float64)
        except ValueError as error:
            raise CorruptArtefactError(
                f"checkpoint {self.version}: its golden {self.owner} embeddings differ in length"
            ) from error
        try:
            actual = self.embed_rows(files.golden.features)
        except TwoTowerError as error:
            raise GoldenDriftError(
                f"checkpoint {self.version}: golden {self.owner} examples do not encode: {error}"
            ) from error
        except Exception as error:  # As above: a graph whose inputs differ from the schema's fails in many ways.
            raise CorruptArtefactError(
                f"checkpoint {self.version}: the {self.owner} tower does not run: {error}"
            ) from error
        if actual.shape != (len(expected), self.dim) or expected.shape != actual.shape:
            raise CorruptArtefactError(
                f"checkpoint {self.version}: the {self.owner} tower gives {actual.shape}, "
                f"the golden embeddings are {expected.shape}, the manifest's dim is {self.dim}"
            )
        difference = float(np.abs(actual - expected).max())
        if not difference <= GOLDEN_TOLERANCE:
            raise GoldenDriftError(
                f"checkpoint {self.version}: golden {self.owner} embeddings differ by {difference:.2e}, "
                f"more than {GOLDEN_TOLERANCE:.0e}"
            )
        if np.abs(np.linalg.norm(actual, axis=1) - 1.0).max() > _UNIT_TOLERANCE:
            raise GoldenDriftError(
                f"checkpoint {self.version}: the {self.owner} tower's embeddings are not unit vectors"
            )
        return difference
