"""Benchmarks of the index service; each takes `--quick` and `--json FILE`."""
