"""The contract that trainer, index service and query service share.

Knows nothing of torch, FAISS, Redis or any one service.
"""
