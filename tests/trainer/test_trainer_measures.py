"""Recall, NDCG and MRR are those of `ir-measures`, and so of trec_eval."""

import ir_measures
import numpy as np
import pytest
import torch

from trainer.evaluate import embedding_scores, evaluate
from trainer.questions import item_lists

NUM_QUERIES, NUM_ITEMS = 60, 300


@pytest.mark.parametrize("k", [1, 10, 100])
def test_figures_equal_those_of_ir_measures(k: int) -> None:
    random = np.random.default_rng(k)
    scores = torch.from_numpy(random.permuted(np.tile(np.arange(NUM_ITEMS), (NUM_QUERIES, 1)), axis=1)).float()
    # Some queries have more targets than k.
    targets = [sorted(random.permutation(NUM_ITEMS)[: random.integers(1, 15)].tolist()) for _ in range(NUM_QUERIES)]
    nothing = item_lists([[]] * NUM_QUERIES)
    found = evaluate(embedding_scores(scores, torch.eye(NUM_ITEMS)), item_lists(targets), nothing, [k])

    judgements = {str(query): {str(item): 1 for item in items} for query, items in enumerate(targets)}
    run = {
        str(query): {str(item): float(scores[query, item]) for item in range(NUM_ITEMS)} for query in range(NUM_QUERIES)
    }
    measures = {
        f"recall_at_{k}": ir_measures.R @ k,
        f"ndcg_at_{k}": ir_measures.nDCG @ k,
        f"mrr_at_{k}": ir_measures.RR @ k,
    }
    theirs = ir_measures.calc_aggregate(measures.values(), judgements, run)
    for name, measure in measures.items():
        assert found[name] == pytest.approx(theirs[measure], abs=1e-6), name
