"""Asks for one query, for a stream of them, and why an item is not in an answer: python retrieve.py 127.0.0.1:50051."""

import sys

from retrieval_client import InvalidRequestError, RetrievalClient, RetrievalError

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"

with RetrievalClient(address, timeout_s=5.0) as client:
    query = {"user_id": "3", "history": ["21", "4"]}

    # One query.
    answer = client.retrieve(query, 5, attribute_names=["title"])
    for place, item in enumerate(answer.items, start=1):
        print(f"{place}. {item.item_id} {item.score:.4f} {item.attributes['title']}")
    print(f"version {answer.checkpoint_version}, {answer.shards_answered} of {answer.shards_total} shards")

    # Many queries: answers come in their order, and one that fails fails alone.
    queries = [*({"user_id": user} for user in ("1", "2", "3")), {"shoe_size": "42"}]
    for index, outcome in enumerate(client.stream_retrieve(queries, 3, excluded_item_ids=["21"])):
        if isinstance(outcome, RetrievalError):
            print(f"query {index}: {outcome}")
        else:
            print(f"query {index}: {' '.join(item.item_id for item in outcome.items)}")

    # Why is this item not here?
    why = client.explain(query, "no such item", 5)
    print(f"{why.finding}: {why.reason}")

    # What is wrong is named.
    try:
        client.retrieve(query, 0)
    except InvalidRequestError as error:
        print(error)
