"""Checkpoints that lie in pieces on many ranks: how each layout lies on disk, read as one logical checkpoint."""
