"""Embeds the catalogue with the item tower, builds FAISS shards and serves them by checkpoint version.

Deliberately knows neither torch nor queries' features.
"""
