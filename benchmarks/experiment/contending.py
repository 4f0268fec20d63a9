"""The contenders' formulas as merge methods of mergekit, registered for the benchmark's own process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import mergekit.merge_methods.registry as registry
import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.parameters import MOMENTS, Number, parameter

from .contenders import (
    calibrated_sum,
    consensus_sum,
    knots_ties,
    norm_weighted_mean,
    regression_mean,
    spectral_truncated_mean,
)


class Contender(LayerwiseMethod):
    """A formula of task vectors of equal weights."""

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """One matrix by the formula."""
        merged = self.formula([task_vectors.task_vector(t) for t in range(len(task_vectors))], parameters)
        return MatrixMerge(task_vector=merged)

    @abstractmethod
    def formula(self, updates: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
        """Of the task vectors."""


class CalibratedSum(Contender):
    """Singular Value Calibration of task arithmetic."""

    name, pretty_name, reference_url = "svc", "Singular Value Calibration", "https://arxiv.org/abs/2602.05536"

    def formula(self, updates: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
        """Of the task vectors."""
        return calibrated_sum(updates)


class ConsensusSum(Contender):
    """Consensus task arithmetic."""

    name, pretty_name, reference_url = "consensus_ta", "Consensus TA", "https://arxiv.org/abs/2405.07813"

    def formula(self, updates: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
        """Of the task vectors."""
        return consensus_sum(updates)


class NormWeightedMean(Contender):
    """A mean weighted by a power of the updates' norms."""

    name, pretty_name, reference_url = "norm_weights", "FroM, MetaGPT, NAN", "https://arxiv.org/abs/2506.02478"
    own_parameters = (
        parameter("exponent", Number, default=-1.0, requirement="a finite number", description="of the norms"),
    )

    def formula(self, updates: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
        """Of the task vectors."""
        return norm_weighted_mean(updates, exponent=parameters["exponent"])


class KnotsTies(Contender):
    """TIES in common directions."""

    name, pretty_name, reference_url = "knots_ties", "KnOTS-TIES", "https://arxiv.org/abs/2410.19735"

    def formula(self, updates: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
        """Of the task vectors."""
        return knots_ties(updates)


class SpectralTruncatedMean(Contender):
    """STAR."""

    name, pretty_name, reference_url = "star", "STAR", "https://arxiv.org/abs/2502.10339"

    def formula(self, updates: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
        """Of the task vectors."""
        return spectral_truncated_mean(updates)


class RegressionMean(LayerwiseMethod):
    """RegMean, by moments that `mergekit-ace moments` measured; a matrix without is averaged."""

    name, pretty_name, reference_url = "regmean", "RegMean", "https://arxiv.org/abs/2212.09849"
    own_parameters = (MOMENTS,)

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """One matrix by the formula."""
        updates = [task_vectors.task_vector(t) for t in range(len(task_vectors))]
        measured = [expert.measured for expert in task_vectors.experts]
        moments = [m.tokens * gram(m.factor.to(updates[0])) for m in measured if m is not None]
        if len(moments) < len(updates):
            moments = [torch.eye(updates[0].shape[1]) for _ in updates]
        return MatrixMerge(task_vector=regression_mean(updates, moments))


CONTENDERS = (CalibratedSum(), ConsensusSum(), NormWeightedMean(), KnotsTies(), SpectralTruncatedMean())


def register_contenders() -> None:
    """Register those that mergekit does not have yet."""
    known = {method.spec.name for method in registry.registered_methods()}
    for method in (*CONTENDERS, RegressionMean()):
        if method.spec.name not in known:
            registry.register(method)
