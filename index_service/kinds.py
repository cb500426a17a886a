"""The kinds of index that a build chooses among, and how each is built from the items.

Deliberately does not know which is the best, nor how an index is searched.
"""

import math
import re
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.ann import AnnIndex, base_type, vectors_of
from index_service.plan import EXACT, IndexPlan
from towers.errors import InvalidInputError

GRAPH = "HNSW32"
_VECTORS_PER_LIST = 39
"""Fewest that a list is trained with; with fewer items there are fewer lists."""
_TRAINING_ROUNDS = 8
_TRAINING_VECTORS = 65_536
"""For what codes are trained with."""


def built(index_type: str, exact: Any) -> AnnIndex:
    """An index of any type that FAISS knows, without search settings.

    Raises:
        InvalidInputError: FAISS does not know the type, or cannot build it from these items.
    """
    if index_type == EXACT:
        return AnnIndex(IndexPlan(index_type=EXACT, settings=()), None, exact)
    ivf = re.fullmatch(r"IVF(\d+),(SQ8|SQfp16|Flat|PQ\d+x4fs,Refine\(Flat\))", index_type)
    if ivf and int(ivf.group(1)) <= exact.ntotal:
        return TrainedLists(exact, trained_quantizer(exact, int(ivf.group(1)))).built(index_type)
    try:
        base = faiss.index_factory(exact.d, base_type(index_type), faiss.METRIC_INNER_PRODUCT)
        if isinstance(base, faiss.IndexNSG | faiss.IndexNNDescent):
            raise RuntimeError("such a graph cannot be searched behind a filter")  # And building it may not end.
        base.train(vectors_of(exact))
        base.add(vectors_of(exact))
        ann = AnnIndex(IndexPlan(index_type=index_type, settings=()), base, exact)
        every_row = faiss.IDSelectorRange(0, exact.ntotal)
        ann.search(vectors_of(exact)[:1], 1, selector=every_row)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise InvalidInputError(
            f"index_type {index_type!r} cannot be built from {exact.ntotal} items of dimension {exact.d}: {reason}; "
            'give a FAISS factory string, for example "IVF1024,SQ8"'
        ) from error
    return ann


class TrainedLists:
    """Lists of an IVF index that are trained, and the list of each item: what all kinds with lists share."""

    def __init__(self, exact: Any, quantizer: Any) -> None:
        self._exact = exact
        self._quantizer = quantizer
        self.num_lists: int = quantizer.ntotal
        self._numbers: NDArray[np.int64] | None = None

    def built(self, index_type: str) -> AnnIndex:
        """An index with these lists; its type is one of `encoded_types`."""
        vectors, dim = vectors_of(self._exact), self._exact.d
        if self._numbers is None:
            self._numbers = self._quantizer.search(vectors, 1)[1].reshape(-1)  # [N]
        encoding = index_type.split(",")[1]
        index = _empty_ivf(faiss.clone_index(self._quantizer), dim, encoding)
        index.train(sampled(vectors, _TRAINING_VECTORS))
        index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(self._numbers))
        if encoding.startswith("PQ"):
            index = faiss.IndexIVFPQFastScan(index)
        index = faiss.clone_index(index)  # It owns its lists, and has no room to spare.
        return AnnIndex(IndexPlan(index_type=index_type, settings=()), index, self._exact)


def encoded_types(num_lists: int, dim: int) -> list[str]:
    """Kinds with lists, small ones first."""
    half = next(size for size in range(max(1, dim // 2), 0, -1) if dim % size == 0)
    return [f"IVF{num_lists},{encoding}" for encoding in (f"PQ{half}x4fs,Refine(Flat)", "SQ8", "SQfp16", "Flat")]


def _empty_ivf(quantizer: Any, dim: int, encoding: str) -> Any:
    """An IVF index as FAISS's factory makes it, with a quantizer that is trained."""
    num_lists, metric = quantizer.ntotal, faiss.METRIC_INNER_PRODUCT
    if encoding == "Flat":
        return faiss.IndexIVFFlat(quantizer, dim, num_lists, metric)
    if encoding.startswith("SQ"):
        kinds = {"SQ8": faiss.ScalarQuantizer.QT_8bit, "SQfp16": faiss.ScalarQuantizer.QT_fp16}
        return faiss.IndexIVFScalarQuantizer(quantizer, dim, num_lists, kinds[encoding], metric, True)
    return faiss.IndexIVFPQ(quantizer, dim, num_lists, int(encoding[2:].partition("x")[0]), 4, metric)


def num_lists_for(num_items: int, per_root: float) -> int:
    """So many times the root of the number of items, unless that leaves too few items to train a list with."""
    return max(1, min(int(per_root * math.sqrt(num_items)), num_items // _VECTORS_PER_LIST))


def trained_quantizer(exact: Any, num_lists: int) -> Any:
    """`IndexFlatIP` of the centroids of so many lists of the items."""
    clustering = faiss.Clustering(exact.d, num_lists)
    clustering.niter = _TRAINING_ROUNDS
    clustering.spherical = True
    clustering.min_points_per_centroid = 1
    clustering.seed = 1
    quantizer = faiss.IndexFlatIP(exact.d)
    clustering.train(sampled(vectors_of(exact), _VECTORS_PER_LIST * num_lists), quantizer)
    return quantizer


def sampled(vectors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Up to so many of the vectors, each at most once, always the same ones."""
    if size >= len(vectors):
        return vectors
    rows = np.random.default_rng(0).choice(len(vectors), size=size, replace=False)
    return vectors[np.sort(rows)]
