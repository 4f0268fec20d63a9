"""Adapters in, one adapter out: merges of low-rank updates that never form a matrix of the base's size.

One direction: truncation, request -> merge -> others, result -> write. Axis letters as in `mergekit_ace.factors`.
"""
