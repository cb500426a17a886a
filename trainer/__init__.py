"""Trains both towers and publishes versioned checkpoints. The only room that knows torch."""
