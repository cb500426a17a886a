"""Measurements that take longer than a test may; each prints a table and, with --json FILE, writes its figures."""
