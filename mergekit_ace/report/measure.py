"""The numbers of one matrix: from its task vectors, and from its merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.decision import heterogeneity
from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.second_moment import relative_ridge
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.report.interference import compare, effective_rank
from mergekit_ace.report.model import ExpertReport, LeftOut, Merged
from mergekit_ace.report.spectrum import spectrum


def norms(task_vectors: TaskVectors) -> dict[str, Any]:
    """The fields of a `TensorReport` that need norms alone, which `TaskVectors` has taken already.

    Args:
        task_vectors: of one matrix, or of any tensor as a column.
    """
    several = len(task_vectors) > 1
    return {
        "experts": experts(task_vectors),
        "left_out": tuple(LeftOut(expert=name, reason=why) for name, why in task_vectors.left_out.items()),
        "heterogeneity": heterogeneity(task_vectors.energies, "scale_free") if several else None,
        "heterogeneity_published": heterogeneity(task_vectors.energies, "published") if several else None,
    }


def experts(task_vectors: TaskVectors) -> tuple[ExpertReport, ...]:
    """Weight, norm and share of each expert with information."""
    total = sum(task_vectors.energies)
    return tuple(
        ExpertReport(expert=expert.name, weight=expert.weight, norm=energy**0.5, energy_share=energy / total)
        for expert, energy in zip(task_vectors.experts, task_vectors.energies, strict=True)
    )


def merge_fields(
    task_vectors: TaskVectors, merge: MatrixMerge, scale: float, *, with_spectra: bool
) -> Mapping[str, Any]:
    """The fields of a `TensorReport` that need the merge.

    Args:
        task_vectors: of one matrix, at least one expert.
        merge: of them, made within `diagnostics()`.
        scale: `lambda`.
        with_spectra: also decompose every task vector and the merged one.
    """
    merged = merge.task_vector * scale
    comparison = compare(task_vectors, merged)
    n = task_vectors.shape[1]
    solved = [relative_ridge([moment], [1.0], n) for moment in merge.moments]
    ridges: Sequence[float | None] = solved or [None] * len(task_vectors)
    found = zip(
        experts(task_vectors),
        ridges,
        comparison.effective_ranks,
        comparison.losses,
        comparison.against_measured,
        task_vectors.rounding_energies(),
        strict=True,
    )
    return {
        "experts": tuple(
            expert.model_copy(
                update={
                    "ridge": ridge,
                    "effective_rank": rank,
                    "loss": loss,
                    "measured_loss": held and held.loss,
                    "estimate_correlation": held and held.correlation,
                    "rounding_share": rounding / expert.norm**2,
                    "spectrum": spectrum(task_vectors.task_vector(t)) if with_spectra else None,
                }
            )
            for t, (expert, ridge, rank, loss, held, rounding) in enumerate(found)
        ),
        "merge": merge.facts(),
        "merged": _merged(task_vectors, merged, merge, scale, with_spectra=with_spectra),
        "interference": comparison.interference,
    }


def _merged(
    task_vectors: TaskVectors, merged: Tensor, merge: MatrixMerge, scale: float, *, with_spectra: bool
) -> Merged:
    norm = squared_norm(merged) ** 0.5
    before = merge.refinement.update if with_spectra and merge.refinement is not None else None
    return Merged(
        norm=norm,
        relative_norm=norm / root_mean_square(task_vectors.energies),
        relative_to_mean=norm / task_vectors.energy_of_mean**0.5 if task_vectors.energy_of_mean > 0 else None,
        relative_change=norm / task_vectors.base_norm if task_vectors.base_norm else None,
        effective_rank=effective_rank(merged),
        spectrum=spectrum(merged) if with_spectra else None,
        spectrum_before=None if before is None else spectrum(merged - scale * before),
    )


def root_mean_square(energies: Sequence[float]) -> float:
    """Of norms, from their squares."""
    return math.sqrt(sum(energies) / len(energies))
