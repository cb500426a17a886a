"""The demonstration: the whole system on MovieLens-100K, with every answer checked against exact search.

Deliberately uses only what users have: the `twotower` commands, the client and the published towers.
"""
