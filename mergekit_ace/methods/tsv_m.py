"""`merge_method: tsv_m`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.peers.task_singular_vectors import merge_task_singular_vectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod


class TsvM(LayerwiseMethod):
    """TSV-Merge: each expert's top singular directions, made orthogonal to the others'.

    `weight` scales the expert's singular values. `lambda` is the paper's alpha, picked there on validation data. Its
    default 1 is the formula as it stands: each expert's kept directions at their own strength.

    Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
    arXiv:2412.00081.
    """

    name = "tsv_m"
    pretty_name = "TSV-Merge"
    reference_url = "https://arxiv.org/abs/2412.00081"

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """One matrix by TSV-Merge."""
        return MatrixMerge(task_vector=merge_task_singular_vectors(task_vectors))
