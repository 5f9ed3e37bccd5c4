"""Arithmetic on tensors' bits: floating-point formats, low-rank products, rounding, and the coding of its residues."""
