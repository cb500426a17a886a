"""Servers that a user would pick, and ours, each behind the same few methods: start, fill, replace, and a client.

Deliberately imports the library of a server only when that server is started: whichever are installed are measured.
"""
