"""Adapters in, one adapter out: merges of low-rank updates that never form a matrix of the base's size.

Two halves. Below `methods`, which read the factors of `base+adapter` experts: tensors, model -> conversion ->
formats -> opening, and core_space. Above `recipe`: request -> truncation -> merge -> result -> write, from_recipe.

Axis letters as in the rest of the package: an update `D = left @ right` of a weight `[m, n]`, with `left` `[m, r]` and
`right` `[r, n]`; `T` adapters. The base's weights are never read.
"""
