"""`merge_method: actmat`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_ace.matrix.merge import MatrixMerge, merge_by_covariance
from mergekit_ace.matrix.presets import ACTMAT, with_epsilon
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.parameters import MOMENTS, RIDGE


class Actmat(LayerwiseMethod):
    """ACTMat: RegMean's solve, with `D_t^T D_t` of each task vector in place of the expert's input covariance.

    `(sum_t a_t D_t Sbar_t) (sum_t a_t Sbar_t)^-1` with `Sbar_t` the regularized `D_t^T D_t`; `weight` is `a_t`.

    Source: arXiv:2604.01329. The paper has no `lambda`; 1 is its result.
    """

    name = "actmat"
    pretty_name = "ACTMat"
    reference_url = "https://arxiv.org/abs/2604.01329"
    own_parameters = (RIDGE, MOMENTS)

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """One matrix by ACTMat."""
        return merge_by_covariance(task_vectors, with_epsilon(ACTMAT, parameters["epsilon"]))
