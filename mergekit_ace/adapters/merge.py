"""The merge of adapters, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ace.adapters.base_norms import BaseNorms, norm_of
from mergekit_ace.adapters.cores import Changed, Cores, matrices
from mergekit_ace.adapters.effect import require_effect
from mergekit_ace.adapters.merged_weight import MergedMatrix, MergedWeight, WeightReport, joined
from mergekit_ace.adapters.request import Request
from mergekit_ace.adapters.truncation import Truncation, input_weight, outputs_kept
from mergekit_ace.factors.core_space import core_space, output_space
from mergekit_ace.factors.model import Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.factors import Factors, weighted_sum
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.methods.advice import log_messages
from mergekit_ace.methods.tensors.measured_moments import moments_for_adapters
from mergekit_ace.methods.tensors.warnings import MergeWarnings
from mergekit_ace.printable import printable
from mergekit_ace.tensor_treatment import Treatment


class AdapterMerge:
    """Merges the weights of a request, one after the other; nothing of a weight is kept once it is merged."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._warnings = MergeWarnings()
        self._base_norms = BaseNorms(request.base_name)

    @torch.no_grad()
    def weights(self) -> Iterator[MergedWeight]:
        """Every weight that an adapter updates.

        Raises:
            AdapterError: the method cannot be run on factors, or an adapter does nothing, or holds NaN or infinity.
            FactorizationError: a system that no jitter makes positive definite.
        """
        require_effect(self._request.adapters)
        for name, place in self._request.places.items():
            yield self._weight(place, self._request.parameters(name))

    def treat(self, place: Place, parameters: Mapping[str, Any]) -> Treatment:
        """How a weight is merged."""
        # kohya's names are one word, in which a table cannot be told from a layer beside one; it adapts no tables.
        named = "" if self._request.adapters[0].layout == "kohya" else place.weight
        vocabulary_axis = 0 if place.kind == "embedding" else None
        return self._request.method.treat(named, place.stored_shape, vocabulary_axis, parameters, heads="none")

    def read(self, place: Place, weights: Sequence[float]) -> list[Changed]:
        """The updates of one weight by the adapters of positive weight.

        Raises:
            AdapterError: a factor holds NaN or infinity, or no weight is positive.
        """
        name = printable(place.weight)
        require_weight(name, weights)
        changed = []
        for adapter, weight in zip(self._request.adapters, weights, strict=True):
            update = adapter.updates.get(place.weight)
            if update is None or weight == 0:
                continue
            factors = update.read()
            if not (bool(torch.isfinite(factors.left).all()) and bool(torch.isfinite(factors.right).all())):
                raise AdapterError(
                    f"{name}: every factor must be finite; adapter {adapter.name} holds NaN or infinity. "
                    "Repair or replace it; nothing was merged from it"
                )
            changed.append(Changed(adapter=adapter.name, weight=weight, factors=factors))
        return changed

    def cores(self, place: Place, parameters: Mapping[str, Any], *, solved: bool) -> Iterator[Cores]:
        """Every matrix of a weight that an adapter of positive weight updates: one, or one for each stacked expert.

        Args:
            place: the weight.
            parameters: for it.
            solved: the method merges it, by measured second moments where the recipe has some.

        Raises:
            AdapterError: a factor holds NaN or infinity, or no weight is positive.
        """
        name = printable(place.weight)
        turned = place.transposed != (parameters["input_axis"] == "first")
        sized = solved and self._request.method.needs_base_norm(parameters)
        weight = self.base_weight(place) if sized or (solved and parameters.get("moments")) else None
        if sized:
            self._warn_of_unknown_base()
        for matrix, index, updates in matrices(name, place, self.read(place, parameters["weight"])):
            factors = [each.factors.transposed if turned else each.factors for each in updates]
            moments = None
            if solved:
                having = self._request.having(place, parameters["weight"])
                found = moments_for_adapters(
                    matrix, place.stored_shape, having, parameters, self._warnings.warn, base=weight
                )
                moments = None if found is None else found.read(each.adapter for each in updates)
            norm = norm_of(weight, index) if weight is not None and sized else None
            if index is None:
                weight = None  # not held during the merge
            yield Cores(
                name=matrix,
                updates=tuple(updates),
                space=core_space(factors) if moments is None else output_space(factors),
                turned=turned,
                measured=None if moments is None else [moments[each.adapter] for each in updates],
                base_norm=norm,
                depth=self._base_norms.depth if sized else None,
            )

    def base_weight(self, place: Place) -> Tensor | None:
        """The base's weight, where it is on this machine.

        Raises:
            AdapterError: it is, and cannot be read.
        """
        return self._base_norms.weight(place)

    def _warn_of_unknown_base(self) -> None:
        if not self._base_norms.known:
            base = self._request.base_name or "the base"
            self._warnings.warn(
                "base norms",
                f"The weights of {base} are not on this machine, so the adapters' updates count as small for them, as "
                "those of language models are. If they are above a few percent, name the base's folder as base_model.",
            )

    def _weight(self, place: Place, parameters: Mapping[str, Any]) -> MergedWeight:
        treated = self.treat(place, parameters)
        having = [
            (adapter.name, adapter.updates[place.weight].rank)
            for adapter, weight in zip(self._request.adapters, parameters["weight"], strict=True)
            if weight > 0 and place.weight in adapter.updates
        ]
        report = WeightReport(
            name=printable(place.weight),
            shape=place.shape,
            treatment=treated.reason,
            adapters=tuple(adapter for adapter, _ in having),
            ranks=tuple(rank for _, rank in having),
        )
        if treated.kind in ("base", "buffer"):
            return MergedWeight(place=place, factors=None, report=report)
        solved = treated.kind in ("matrix", "stack")
        if solved and (reason := self._request.method.needs_entries(parameters)):
            raise AdapterError(f"{report.name}: {reason}")
        merge_one = self._merge if solved else self._average
        parts = [merge_one(cores, parameters) for cores in self.cores(place, parameters, solved=solved)]
        return joined(place, parts, report, self._request.rank)

    def _average(self, cores: Cores, parameters: Mapping[str, Any]) -> MergedMatrix:
        """`scale * sum_t w_t D_t / sum_t w_t`, over all adapters: those without the module did not change it."""
        scale = self._request.method.scale(parameters) / sum(parameters["weight"])
        merged = weighted_sum(cores.space.cores, [scale * each.weight for each in cores.updates])
        return self._finished(cores, merged, seen_by_inputs=False)

    def _merge(self, cores: Cores, parameters: Mapping[str, Any]) -> MergedMatrix:
        """One matrix by the method."""
        method, task_vectors = self._request.method, cores.task_vectors
        scale = method.scale(parameters)
        if len(task_vectors) == 0:
            return MergedMatrix(factors=None, note="no adapter changed it")
        if len(task_vectors) == 1:
            sole = task_vectors.experts[0].name
            part = self._finished(cores, task_vectors.task_vector(0).mul_(scale), note=f"only {sole} changed it")
            if self._request.rank is not None:
                return part
            own = next(each.factors for each in cores.updates if each.adapter == sole)
            return replace(part, factors=Factors(left=own.left * scale, right=own.right))
        layer = method.merge_matrix(task_vectors, parameters)
        for cause, message in log_messages(method.evidence(task_vectors, layer, parameters)):
            self._warnings.warn(cause, message)
        return self._finished(cores, layer.task_vector.mul_(scale), note=layer.describe())

    def _finished(self, cores: Cores, merged: Tensor, *, note: str = "", seen_by_inputs: bool = True) -> MergedMatrix:
        """Cut to the rank that is asked for, by what the experts' own inputs see."""
        rank, held, space = self._request.rank, merged, cores.space
        if rank is not None:
            weights = [each.weight for each in cores.updates]
            cut = Truncation(merged, input_weight(space.cores, weights) if seen_by_inputs else None)
            rank = cut.rank_to_keep() if rank == "auto" else rank
            held = cut.of_rank(rank)
        factors = space.factors(held, rank)
        return MergedMatrix(
            factors=factors.transposed if cores.turned else factors,
            energy=squared_norm(merged),
            energy_lost=squared_norm(merged - held),
            outputs_kept=tuple(outputs_kept(held, space.cores)),
            note=note,
        )


def require_weight(name: str, weights: Sequence[float]) -> None:
    """Refuse weights that are all 0.

    Raises:
        AdapterError: naming the weight of the model.
    """
    if not any(weight > 0 for weight in weights):
        raise AdapterError(f"{name}: parameter weight must be positive for at least one adapter; got 0 for all")
