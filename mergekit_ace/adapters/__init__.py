"""Adapters in, one adapter out: merges of low-rank updates that never form a matrix of the base's size.

One direction: tensors, model -> conversion -> formats -> opening; core_space -> truncation -> merge -> write.
Axis letters as in the rest of the package: an update `D = left @ right` of a weight `[m, n]`, with `left` `[m, r]` and
`right` `[r, n]`; `T` adapters. The base's weights are never read.
"""
