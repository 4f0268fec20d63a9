"""Adapters as factors of low-rank updates: their layouts on disk, and the core space in which they are merged.

One direction: tensors, model -> conversion -> formats -> opening; core_space. The merge methods use these to merge
`base+adapter`, and `mergekit_ace.adapters` to make one adapter out of several.
Axis letters as in the rest of the package: an update `D = left @ right` of a weight `[m, n]`, with `left` `[m, r]` and
`right` `[r, n]`; `T` adapters. No weight of the base is needed.
"""
