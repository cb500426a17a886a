"""Encodes queries, caches their embeddings, fans out to the shards, merges.

Deliberately knows neither torch nor FAISS.
"""
