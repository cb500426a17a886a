"""One immutable FAISS index with its exact vectors beside it: searched approximately, exactly, or among some rows.

Deliberately does not know items, checkpoints or how the index was chosen. The one place that knows how FAISS spells
the search parameters of each kind of index.
"""

import math
import re
from functools import cached_property
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index_service.lists import Lists, is_numbered_by_list, number_by_list
from index_service.plan import IndexPlan, SearchSetting
from towers.errors import InvalidInputError

_REFINED = re.compile(r"(.+),(?:RFlat|Refine\(Flat\))")
_BYTES_PER_FLOAT = 4
_BYTES_PER_ID = 8
_UNMEASURED_RECALL = 0.95
NPROBE = "nprobe"
EF_SEARCH = "efSearch"
K_FACTOR = "k_factor_rf"

Knobs = dict[str, int]
"""Values of search parameters by FAISS's names."""


class AnnIndex:
    """An index of N vectors `[N, D]`. Never changes, so any number of threads may search it.

    The exact vectors stay in memory whatever the index: exact scans, refinement and an HNSW graph share them.
    """

    def __init__(self, plan: IndexPlan, base: Any | None, exact: Any) -> None:
        """Puts the parts together.

        Args:
            plan: What the index is and how it is searched.
            base: The FAISS index, as `stored_part` describes it; None where the exact vectors are the index.
            exact: `IndexFlatIP` of the same vectors in the same order.
        """
        self.plan = plan
        self.base = base
        self.exact = exact = _shared_storage(base, exact)
        self.dim: int = exact.d
        self.num_items: int = exact.ntotal
        self._index: Any = exact if base is None else base
        self.is_refined = base is not None and _REFINED.fullmatch(plan.index_type) is not None
        """Whether the best `k_factor_rf` times k rows of the base are always scored again with the exact vectors."""
        self.can_refine = self.is_refined or _is_lossy(self._index)
        """Whether a search with `k_factor_rf` does so."""
        self._refined: Any = faiss.IndexRefine(base, exact) if self.can_refine else None
        self._knobs = [(setting.k, parsed_parameters(setting.parameters)) for setting in plan.settings]
        self._nprobes = [(k, knobs[NPROBE]) for k, knobs in self._knobs if NPROBE in knobs]
        self._limits = _limits(self._index)
        self._prepared = [self._search_of(knobs, None) for _, knobs in self._knobs]

    @property
    def settings(self) -> tuple[SearchSetting, ...]:
        """By rising k."""
        return self.plan.settings

    @property
    def vectors(self) -> NDArray[np.float32]:
        """`[N, D]` the exact vectors; a view, not a copy."""
        return vectors_of(self.exact)

    @property
    def size_bytes(self) -> int:
        """Memory of the index and its vectors."""
        base_bytes = 0 if self.base is None else index_size_bytes(self.base)
        lists_bytes = 0 if self.lists is None else self.lists.size_bytes
        return self.num_items * self.dim * _BYTES_PER_FLOAT + base_bytes + lists_bytes

    @cached_property
    def lists(self) -> Lists | None:
        """The lists of an IVF index whose rows are numbered list by list; None for any other."""
        is_ordered = isinstance(self.base, faiss.IndexIVF) and is_numbered_by_list(self.base)
        return Lists(self.base, self.vectors) if is_ordered else None

    @property
    def usually_missed(self) -> float:
        """The share of the best rows that searches do not find, as it was measured at the build; the largest."""
        return 1.0 - min((setting.recall for setting in self.plan.settings), default=_UNMEASURED_RECALL)

    def num_scanned(self, k: float) -> int:
        """How many rows a search for k looks at, on average; all where there are no lists to choose from."""
        if not self._nprobes:
            return self.num_items
        last_k, last_nprobe = self._nprobes[-1]
        nprobe = self._nprobes[0][1] if k <= self._nprobes[0][0] else last_nprobe * k / last_k
        for (below, fewer), (above, more) in pairwise(self._nprobes):
            if below < k <= above:
                # Between two settings it grows with a power of k.
                nprobe = fewer * (more / fewer) ** (math.log(k / below) / math.log(above / below))
        return min(self.num_items, math.ceil(nprobe * self.num_items / self._limits[NPROBE]))

    def num_rescored(self, k: int) -> int:
        """How many hits with quantised scores hold the k best, as was measured; k where they are scored well enough."""
        return k * self._effort(k).get(K_FACTOR, 1)

    def usual_latency_s(self, k: int) -> float:
        """Of a search for one query, as it was measured at the build; infinite where it was not."""
        return next((setting.latency_s for setting in self.settings if k <= setting.k), math.inf)

    def search(
        self, embeddings: NDArray[np.float32], k: int, effort_k: int | None = None, selector: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds about the k best rows of each query.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            effort_k: Searches as widely as was measured to be right for so many items, k when left out. Beyond the
                largest k measured the effort grows in proportion, until everything is searched.
            selector: FAISS selector of the rows that may be returned; all when left out.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where fewer were found.
        """
        if self.num_items == 0:
            return _nothing(len(embeddings), k)
        effort = k if effort_k is None else effort_k
        index, parameters = self._widened(effort, selector)
        return index.search(embeddings, k, params=parameters)  # type: ignore[no-any-return]

    def search_at(
        self, knobs: Knobs, embeddings: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Like `search`, but with these search parameters and not with those of the plan."""
        index, parameters = self._search_of(knobs, None)
        return index.search(embeddings, k, params=parameters)  # type: ignore[no-any-return]

    @property
    def limits(self) -> Knobs:
        """The search parameters that widen a search, and from where on that changes nothing."""
        return self._limits

    def search_exactly(
        self, embeddings: NDArray[np.float32], k: int, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Finds exactly the k best of these rows, or of all; touches no other row.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            rows: Each at most once; all when left out.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where fewer were found.
        """
        if self.num_items == 0 or (rows is not None and len(rows) == 0):
            return _nothing(len(embeddings), k)
        if rows is None:
            return self.exact.search(embeddings, k)  # type: ignore[no-any-return]
        if len(embeddings) == 1:
            return self._best_of_rows(embeddings, k, rows)
        # The selector holds only a pointer to the rows, which must outlive the search.
        selector = faiss.IDSelectorArray(rows)
        return self.exact.search(  # type: ignore[no-any-return]
            embeddings,
            k,
            params=faiss.SearchParameters(sel=selector),
        )

    def _best_of_rows(
        self, embeddings: NDArray[np.float32], k: int, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`search_exactly` for one query; a partition of all scores takes a third of the time of FAISS's heap."""
        rows = np.ascontiguousarray(rows)  # [C]
        scores = np.empty(len(rows), dtype=np.float32)
        self.exact.compute_distance_subset(
            1, faiss.swig_ptr(embeddings), len(rows), faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        )
        num_more = len(rows) - k
        if num_more > 0:
            best = np.argpartition(scores, num_more)[num_more:]
            scores, rows = scores.take(best), rows.take(best)
        order = np.argsort(-scores)
        scores, rows = scores.take(order), rows.take(order)
        if num_more < 0:
            scores = np.append(scores, np.full(-num_more, -np.inf, dtype=np.float32))
            rows = np.append(rows, np.full(-num_more, -1, dtype=np.int64))
        return scores[None], rows[None]

    def rescored(
        self, embeddings: NDArray[np.float32], k: int, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best by exact score of some rows for each query.

        Args:
            embeddings: `[B, D]`, contiguous.
            k: At least 1.
            rows: `[B, C]`, contiguous, at least k; -1 for none.

        Returns:
            `[B, K]` scores, falling, and rows; row -1 where there are fewer.
        """
        scores = np.empty(rows.shape, dtype=np.float32)
        self.exact.compute_distance_subset(
            len(rows), faiss.swig_ptr(embeddings), rows.shape[1], faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        )
        best = np.argsort(-scores, axis=1)[:, :k] + np.arange(len(rows))[:, None] * rows.shape[1]  # [B, K]
        return scores.take(best), rows.take(best)

    def empty_like(self) -> Any | None:
        """An empty FAISS index with the same lists, vectors kept whole; None where this one has no lists.

        It needs no training, and shares no memory with this one: an `AnnIndex` of what is added to it can be searched
        with the settings of this one.
        """
        if not isinstance(self.base, faiss.IndexIVF):
            return None
        quantizer = faiss.clone_index(self.base.quantizer)
        return faiss.IndexIVFFlat(quantizer, self.dim, self.base.nlist, faiss.METRIC_INNER_PRODUCT)

    def _widened(self, effort_k: int, selector: Any) -> tuple[Any, Any]:
        """The FAISS index and the parameters that are right for so many items."""
        for i, (k, knobs) in enumerate(self._knobs):
            if effort_k <= k:
                return self._prepared[i] if selector is None else self._search_of(knobs, selector)
        return self._search_of(self._effort(effort_k), selector)

    def _search_of(self, knobs: Knobs, selector: Any) -> tuple[Any, Any]:
        index = self._refined if self.is_refined or (self.can_refine and K_FACTOR in knobs) else self._index
        return index, _parameters(index, knobs, selector)

    def _effort(self, effort_k: int) -> Knobs:
        """The knobs of the setting for so many items; beyond the last one they grow in proportion."""
        for k, knobs in self._knobs:
            if effort_k <= k:
                return knobs
        if not self._knobs:
            return {}
        k, knobs = self._knobs[-1]
        return {
            name: min(self._limits[name], -(-value * effort_k // k)) if name in self._limits else value
            for name, value in knobs.items()
        }


def in_order_of_lists(ann: AnnIndex) -> tuple[AnnIndex, NDArray[np.int64]]:
    """The same index with its rows numbered list by list, where it has lists; the one given is then used up.

    Returns:
        The index, and `[N]` the old number of each row.
    """
    if not isinstance(ann.base, faiss.IndexIVF):
        return ann, np.arange(ann.num_items)
    order = number_by_list(ann.base)
    return AnnIndex(ann.plan, ann.base, exact_index(ann.vectors[order])), order


def exact_index(vectors: NDArray[np.float32]) -> Any:
    """`IndexFlatIP` of `[N, D]` vectors, copied."""
    exact = faiss.IndexFlatIP(vectors.shape[1])
    exact.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return exact


def exact_index_of_size(num_items: int, dim: int) -> Any:
    """`IndexFlatIP` of N zero vectors, to be filled through `vectors_of`."""
    exact = faiss.IndexFlatIP(dim)
    exact.codes.resize(num_items * dim * _BYTES_PER_FLOAT)
    exact.ntotal = num_items
    return exact


def vectors_of(exact: Any) -> NDArray[np.float32]:
    """`[N, D]` the vectors of an `IndexFlatIP`: a view that is valid as long as the index."""
    if exact.ntotal == 0:
        return np.empty((0, exact.d), dtype=np.float32)
    codes = faiss.rev_swig_ptr(exact.codes.data(), exact.ntotal * exact.d * _BYTES_PER_FLOAT)
    return codes.view(np.float32).reshape(exact.ntotal, exact.d)  # type: ignore[no-any-return]


def base_type(index_type: str) -> str:
    """The factory string of what is stored: without a refinement, which the exact vectors do."""
    refined = _REFINED.fullmatch(index_type)
    return refined.group(1) if refined else index_type


def stored_part(base: Any) -> bytes:
    """What is stored of an index beside its exact vectors: everything but vectors that it shares with them."""
    writer = faiss.VectorIOWriter()
    faiss.write_index(base, writer, faiss.IO_FLAG_SKIP_STORAGE if _shares_storage(base) else 0)
    return faiss.vector_to_array(writer.data).tobytes()  # type: ignore[no-any-return]


def parsed_parameters(parameters: str) -> Knobs:
    """FAISS search parameters such as "nprobe=8,k_factor_rf=4".

    Raises:
        InvalidInputError: it is not of this form.
    """
    if not re.fullmatch(r"(\w+=\d+(,\w+=\d+)*)?", parameters):
        raise InvalidInputError(f'search parameters {parameters!r}: expected for example "nprobe=16"')
    return {name: int(value) for name, _, value in (part.partition("=") for part in parameters.split(",") if part)}


def written_parameters(knobs: Knobs) -> str:
    """The reverse of `parsed_parameters`."""
    return ",".join(f"{name}={value}" for name, value in knobs.items())


def index_size_bytes(base: Any) -> int:
    """Memory of a FAISS index beside the exact vectors."""
    inner = _innermost(base)
    if isinstance(inner, faiss.IndexIVF):
        lists = inner.nlist * inner.d * _BYTES_PER_FLOAT
        return int(lists + inner.ntotal * (inner.code_size + _BYTES_PER_ID))
    if isinstance(inner, faiss.IndexHNSW):
        graph = inner.hnsw
        links = graph.neighbors.size() * 4 + graph.offsets.size() * 8 + graph.levels.size() * 4
        return int(links) + (0 if _shares_storage(base) else _codes_size_bytes(faiss.downcast_index(inner.storage)))
    return _codes_size_bytes(inner)


def _codes_size_bytes(index: Any) -> int:
    if isinstance(index, faiss.IndexFlatCodes):
        return int(index.ntotal * index.code_size)
    return len(stored_part(index))


def _shares_storage(base: Any) -> bool:
    """Whether an index keeps nothing but a graph, over the exact vectors."""
    return isinstance(base, faiss.IndexHNSWFlat)


def _shared_storage(base: Any | None, exact: Any) -> Any:
    """The exact vectors that a graph and exact search share: the graph's own where it has them, else those given."""
    if base is None or not _shares_storage(base):
        return exact
    if base.storage is not None:
        # To free it instead and put `exact` in its place breaks SWIG's types for the whole process.
        return faiss.downcast_index(base.storage)
    base.own_fields = False
    base.storage = exact
    exact.this.own(True)  # SWIG takes an assignment for a gift.
    return exact


def _innermost(index: Any) -> Any:
    """The index below refinement and transformation."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _is_lossy(index: Any) -> bool:
    """Whether an index scores anything but the exact vectors."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner = faiss.downcast_index(inner.storage)
    return not isinstance(inner, faiss.IndexFlat | faiss.IndexIVFFlat)


def _limits(index: Any) -> Knobs:
    """What each knob that widens a search can reach at most."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return {NPROBE: inner.nlist}
    if isinstance(inner, faiss.IndexHNSW):
        return {EF_SEARCH: max(1, inner.ntotal)}
    return {}


def _parameters(index: Any, knobs: Knobs, selector: Any) -> Any:
    """FAISS's search parameters for an index; knobs that it does not have are left out.

    What no knob limits is searched whole. The parameters hold only a pointer to the selector, which must outlive them.
    """
    chosen: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(faiss.downcast_index(index.base_index), knobs, selector)
        return faiss.IndexRefineSearchParameters(k_factor=knobs.get(K_FACTOR, 1), base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(faiss.downcast_index(index.index), knobs, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=knobs.get(NPROBE, index.nlist), **chosen)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=knobs.get(EF_SEARCH, index.ntotal), **chosen)
    return faiss.SearchParameters(**chosen) if chosen else None


def _nothing(num_queries: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return np.full((num_queries, k), -np.inf, dtype=np.float32), np.full((num_queries, k), -1, dtype=np.int64)
