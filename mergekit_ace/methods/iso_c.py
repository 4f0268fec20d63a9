"""`merge_method: iso_c`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_ace.layer.isotropic import merge_isotropic
from mergekit_ace.layer.merge import LayerMerge
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod


class IsoC(LayerwiseMethod):
    """Iso-C: the sum of the task vectors with every singular value replaced by their mean.

    `weight` scales the expert's task vector in the sum. `lambda` is the paper's alpha.

    Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML
    2025, arXiv:2502.04959.
    """

    name = "iso_c"
    pretty_name = "Iso-C"
    reference_url = "https://arxiv.org/abs/2502.04959"

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> LayerMerge:
        """One matrix by Iso-C."""
        return LayerMerge(task_vector=merge_isotropic(task_vectors))
