"""The `twotower` command, on top of everything."""
