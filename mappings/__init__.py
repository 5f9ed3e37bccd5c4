"""Tables of model families, shipped as data."""
