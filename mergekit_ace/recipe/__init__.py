"""A recipe before its merge: what mergekit plans from it, tensor by tensor, and what is wrong with it.

One direction: failures, headers -> plan -> findings and their checks. Only `plan` knows mergekit's internals.
"""
