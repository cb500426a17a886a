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
_QUANTISED_TOLERANCE = 2e-2
"""The same of a quantised tower: where a rounding falls the other way, a whole step is between both."""
_UNIT_TOLERANCE = 1e-3
QUANTISED = "twotower.quantised"
"""Key of an ONNX graph's metadata that a quantised tower has."""


def input_name(feature_name: str) -> str:
    """Name of a feature's input in the ONNX graph."""
    return f"feature_{feature_name}"


class Graph:
    """An ONNX tower over encoded features, in passes of rows that padding costs little."""

    def __init__(self, onnx: bytes, num_threads: int = 1, long: Sequence[str] = ()) -> None:
        """Builds the session.

        Args:
            onnx: The graph.
            num_threads: Threads of one pass.
            long: Features whose rows are worth sorting by length: tokens of a pretrained encoder.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._long = tuple(long)
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self.is_quantised = QUANTISED in self._session.get_modelmeta().custom_metadata_map

    def embed(self, arrays: Arrays) -> NDArray[np.float32]:
        """Embeds encoded features of B rows, `[B, D]`."""
        if not (self.is_quantised or self._long):
            return self._run(arrays)
        num_rows = len(next(iter(arrays.values())))
        lengths = {name: _lengths(array) for name, array in arrays.items() if self._is_list(name, array)}  # [B] each
        if self.is_quantised:
            # Activations are scaled by the largest of a pass: alone, so that an embedding is a function of its row.
            groups: Sequence[NDArray[np.int64]] = [*np.arange(num_rows)[:, None]]
        else:
            groups = groups_of_similar_length(np.sum([*lengths.values()], axis=0))
        passes = []
        for group in groups:
            of_group = {name: array[group] for name, array in arrays.items()}
            for name, of_rows in lengths.items():
                of_group[name] = of_group[name][:, : max(1, of_rows[group].max())]
            passes.append(self._run(of_group))
        if not passes:
            return self._run(arrays)
        return np.concatenate(passes)[np.argsort(np.concatenate(groups))]

    def _is_list(self, name: str, array: NDArray[Any]) -> bool:
        return name in self._long or (self.is_quantised and array.ndim == 2 and array.dtype.kind == "i")

    def _run(self, arrays: Arrays) -> NDArray[np.float32]:
        feeds = {input_name(name): array for name, array in arrays.items()}
        return self._session.run([OUTPUT_NAME], feeds)[0]  # type: ignore[no-any-return]


class Tower:
    """One tower of one checkpoint, verified and ready."""

    def __init__(self, files: TowerFiles, num_threads: int = 1) -> None:
        """Builds the session and replays the golden examples.

        Args:
            files: The verified files.
            num_threads: Threads of one pass.

        Raises:
            CorruptArtefactError: the ONNX graph does not load, or does not fit the schema.
            GoldenDriftError: the golden embeddings do not come out, or are neither unit vectors nor zero.
        """
        self.version = files.manifest.version
        self.owner = files.owner
        self.dim = files.manifest.dim
        try:
            self.encoder = FeatureEncoder(files.schema, files.owner, files.vocabularies, files.tokenizers)
        except InvalidFeatureError as error:
            raise CorruptArtefactError(f"checkpoint {self.version}: {error}") from error
        tokenised = files.schema.tokenizer_names(files.owner)
        try:
            self._graph = Graph(files.onnx, num_threads, tokenised)
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
            `[B, D]` unit embeddings. A row of which the tower makes nothing, such as an empty text, may be zero: it
            scores 0 with everything.
        """
        return self._graph.embed(arrays)

    def embed_rows(self, rows: Sequence[Mapping[str, RawValue]]) -> NDArray[np.float32]:
        """Embeds raw features, `[B, D]`.

        Raises:
            InvalidFeatureError: a feature that the schema does not allow.
        """
        return self.embed(self.encoder.encode_rows(rows))

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
        tolerance = _QUANTISED_TOLERANCE if self._graph.is_quantised else GOLDEN_TOLERANCE
        if not difference <= tolerance:
            raise GoldenDriftError(
                f"checkpoint {self.version}: golden {self.owner} embeddings differ by {difference:.2e}, "
                f"more than {tolerance:.0e}"
            )
        norms = np.linalg.norm(actual, axis=1)
        if (np.minimum(norms, np.abs(norms - 1.0)) > _UNIT_TOLERANCE).any():
            raise GoldenDriftError(
                f"checkpoint {self.version}: the {self.owner} tower's embeddings are neither unit vectors nor zero"
            )
        return difference


def _lengths(ids: NDArray[Any]) -> NDArray[np.int64]:
    """`[B]` entries of each row of ids `[B, L]` before its padding."""
    lengths: NDArray[np.int64] = ((ids != 0) * np.arange(1, ids.shape[1] + 1)).max(axis=1, initial=0)
    return lengths
