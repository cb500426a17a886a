"""Asks a deployment that serves the toy data, again and again, until it answers as expected.

Deliberately knows only the client: what is judged here is what a caller sees.
"""

import argparse
import sys
import time

from toy_data import ITEMS_PER_GENRE

from retrieval_client import Retrieval, RetrievalClient, RetrievalError

GENRE = 3
K = 10
FEWEST_OF_THE_GENRE = 8
PAUSE_S = 0.1


def problem_of(answer: Retrieval, version: int, shards: int) -> str:
    """What is not as expected; empty when all is well."""
    titled = [item for item in answer.items if item.attributes.get("title", "")]
    liked = [item for item in answer.items if int(item.item_id) // ITEMS_PER_GENRE == GENRE]
    if answer.checkpoint_version != version:
        return f"answered at version {answer.checkpoint_version}"
    if (answer.shards_answered, answer.shards_total) != (shards, shards):
        return f"{answer.shards_answered} of {answer.shards_total} shards answered: {answer.degraded_reasons}"
    if not answer.embedding_cached:
        return "the embedding did not come from the cache"
    if len(titled) != K:
        return f"{len(titled)} of {K} items came with a title"
    if len(liked) < FEWEST_OF_THE_GENRE:
        return f"{len(liked)} of {K} items are of the genre that the user likes"
    return ""


def main() -> int:
    """Asks until the answer is as expected.

    Returns:
        0 then; 1 when it took too long or, with `--serving`, when a single request failed on the way.
    """
    parser = argparse.ArgumentParser(description="Asks until a full answer of a version comes.")
    parser.add_argument("address")
    parser.add_argument("--version", type=int, required=True, help="checkpoint version expected")
    parser.add_argument("--shards", type=int, default=2, help="number of shards expected")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds")
    parser.add_argument("--serving", action="store_true", help="some version is live: no request may fail")
    arguments = parser.parse_args()
    history = [str(GENRE * ITEMS_PER_GENRE + offset) for offset in range(4)]
    query = {"history": history, "country": "fr"}
    start_s = time.monotonic()
    problem, num_answers = "not asked yet", 0
    with RetrievalClient(arguments.address, timeout_s=5.0) as client:
        while time.monotonic() - start_s < arguments.timeout:
            try:
                answer = client.retrieve(query, k=K, excluded_item_ids=history, attribute_names=["title"])
            except RetrievalError as error:
                problem = f"{type(error).__name__}: {error}"
                if arguments.serving:
                    break
            else:
                num_answers += 1
                problem = problem_of(answer, arguments.version, arguments.shards)
                if not problem:
                    sys.stdout.write(
                        f"version {arguments.version}, {arguments.shards} of {arguments.shards} shards, "
                        f"answer {num_answers}, after {time.monotonic() - start_s:.1f} s: "
                        f"{', '.join(str(item.attributes['title']) for item in answer.items[:3])}, …\n"
                    )
                    return 0
            time.sleep(PAUSE_S)
    sys.stderr.write(f"{problem}, after {num_answers} answers and {time.monotonic() - start_s:.1f} s\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
