"""Benchmarks of the query service and of the index server; each takes `--quick` and `--json FILE`."""
