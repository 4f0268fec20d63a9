"""The merge of one weight matrix, from its task vectors to the merged task vector.

One direction: task_vectors -> decision, budget -> second_moment -> refinement -> normal_equations (dense,
from_reference, matrix_weights or stacked_rows) -> bounds -> merge. `presets` composes the covariance-based methods
of these parts; `peers` holds the other formulas.
Axis letters: `T` experts, weights stored `[m, n]` with `m` outputs and `n` inputs.
Nothing here knows mergekit, a recipe or a file.
"""
