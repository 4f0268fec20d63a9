"""The numbers of one matrix layer: from its task vectors, and from the merge itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.decision import heterogeneity
from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import RegularizedMoment, fixed_ridge, relative_ridge
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.report.interference import losses
from mergekit_ace.report.model import Branch, ExpertReport, Gate, LeftOut, Merged
from mergekit_ace.report.spectrum import effective_rank, singular_values, thinned, top_energy


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measured fields of a `LayerReport`, under the same names."""

    branch: Branch
    experts: tuple[ExpertReport, ...]
    heterogeneity: float | None = None
    heterogeneity_scale_free: float | None = None
    gate: Gate | None = None
    ridge: float | None = None
    condition: float | None = None
    refined_directions: int | None = None
    effective_experts: float | None = None
    shortening: float | None = None
    retention: float | None = None
    low_rank: bool | None = None
    correlation: float | None = None
    merged: Merged | None = None


def measure_norms(task_vectors: TaskVectors, options: CovarianceOptions | None) -> Measured:
    """What norms and traces say: one pass over the task vectors, which `TaskVectors` has made already.

    Args:
        task_vectors: of one matrix.
        options: of ACE; None for a method without a gate.
    """
    traces = [measured.centered_energy for measured in task_vectors.statistics]
    experts = expert_reports(task_vectors, traces)
    if len(task_vectors) < 2:
        return Measured(branch="single expert" if len(task_vectors) else "frozen", experts=experts)
    published = heterogeneity(task_vectors.energies, "published")
    scale_free = heterogeneity(task_vectors.energies, "scale_free")
    measured = Measured(branch="method", experts=experts, heterogeneity=published, heterogeneity_scale_free=scale_free)
    if options is None:
        return measured
    heterogeneous = None
    if options.gate is not None:
        gate = Gate(statistic=options.gate.statistic, threshold=options.gate.threshold)
        heterogeneous = {"published": published, "scale_free": scale_free}[gate.statistic] > gate.threshold
        measured = replace(measured, branch="heterogeneous" if heterogeneous else "homogeneous", gate=gate)
    moment = options.second_moment
    if moment.epsilon == "auto":  # needs the second moments themselves
        return measured
    own = traces if moment.centered else list(task_vectors.energies)
    if not all(own):
        return measured
    normalize = moment.trace_normalized and heterogeneous is not False
    proxies = [fixed_ridge(moment.epsilon, trace=trace, normalize=normalize) for trace in own]
    return with_ridge(measured, proxies, task_vectors.shares, task_vectors)


def measure_merge(measured: Measured, task_vectors: TaskVectors, layer: MatrixMerge, scale: float) -> Measured:
    """Add what takes the solve and the spectra.

    Args:
        measured: by `measure_norms`.
        task_vectors: of one matrix, at least one expert.
        layer: its merge, made within `diagnostics()`.
        scale: `lambda`.
    """
    if layer.moments:
        measured = with_ridge(measured, layer.moments, task_vectors.shares, task_vectors)
    merged = layer.task_vector * scale
    experts = []
    for t, (expert, loss) in enumerate(zip(measured.experts, losses(task_vectors, merged), strict=True)):
        values = singular_values(task_vectors.task_vector(t))
        experts.append(
            replace(
                expert,
                effective_rank=effective_rank(values),
                top_energy=top_energy(values),
                spectrum=thinned(values),
                loss=loss,
            )
        )
    return replace(
        measured,
        branch="uncorrelated" if layer.averaged == 1 else measured.branch,
        experts=tuple(experts),
        condition=layer.condition,
        refined_directions=layer.refinement.directions if layer.refinement else None,
        effective_experts=layer.decision.effective_experts if layer.decision else None,
        shortening=layer.scale_factor if layer.decision is not None and layer.averaged < 1 else None,
        retention=layer.retention,
        low_rank=None if layer.decision is None or layer.decision.low_rank is None else layer.decision.low_rank > 0,
        correlation=layer.correlation,
        merged=_merged(task_vectors, merged, layer, scale),
    )


def with_ridge(
    measured: Measured, proxies: Sequence[RegularizedMoment], shares: Sequence[float], task_vectors: TaskVectors
) -> Measured:
    """Add the relative ridge of the system and of each expert's second moment."""
    n = task_vectors.shape[1]
    experts = tuple(
        replace(expert, ridge=relative_ridge([proxy], [1.0], n))
        for expert, proxy in zip(measured.experts, proxies, strict=True)
    )
    return replace(measured, experts=experts, ridge=relative_ridge(proxies, shares, n))


def expert_reports(task_vectors: TaskVectors, traces: Sequence[float]) -> tuple[ExpertReport, ...]:
    """Weight, norm and share of each expert with information."""
    total = sum(traces)
    return tuple(
        ExpertReport(
            expert=expert.name,
            weight=expert.weight,
            norm=statistics.energy**0.5,
            trace_share=trace / total if total else 0.0,
        )
        for expert, statistics, trace in zip(task_vectors.experts, task_vectors.statistics, traces, strict=True)
    )


def left_out(task_vectors: TaskVectors) -> tuple[LeftOut, ...]:
    """The experts that have no part in the merge, and why."""
    return tuple(LeftOut(expert=expert, reason=reason) for expert, reason in task_vectors.left_out.items())


def _merged(task_vectors: TaskVectors, merged: Tensor, layer: MatrixMerge, scale: float) -> Merged:
    values = singular_values(merged)
    before = None
    if layer.refinement is not None:
        before = singular_values(merged - scale * layer.refinement.update)
    norm = float(values.square().sum().sqrt())
    mean_square = sum(task_vectors.energies) / len(task_vectors)
    weights = squared_norm(task_vectors.base) ** 0.5
    return Merged(
        norm=norm,
        relative_norm=norm / mean_square**0.5,
        relative_change=norm / weights if weights else None,
        top_energy=top_energy(values),
        top_energy_before=None if before is None else top_energy(before),
        spectrum=thinned(values),
        spectrum_before=None if before is None else thinned(before),
    )
