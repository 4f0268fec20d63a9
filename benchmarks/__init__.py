"""Measurements: quality, speed and memory of the merges."""
