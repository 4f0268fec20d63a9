"""The merge of one weight matrix, from task vectors to merged task vector.

One direction: task_vectors -> branch (by heterogeneity and rank) -> normal_equations (with their ridge) ->
refinement -> bounds -> merge.
Axis letters, everywhere in this room: `T` experts, weights stored `[m, n]` with `m` outputs and `n` inputs.
Nothing here knows mergekit, a recipe or a file.
"""
