"""Merges by mergekit's own commands, every tensor held against the float64 reference."""
