"""Published tables, run again: ours, the peers' runs beside it where they install, and the published rows."""
