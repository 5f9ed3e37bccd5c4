"""Merging adapters into bases, and the ways back: plans, kernels and undo files."""
