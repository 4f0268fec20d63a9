"""A recipe of adapters, weight by weight, from the adapters alone: the report of the full merge, measured on cores."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from mergekit_ace import __version__
from mergekit_ace.adapters.merge import AdapterMerge
from mergekit_ace.adapters.request import Request
from mergekit_ace.factors.model import Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.recipe.failures import READING, message_of
from mergekit_ace.report.inspection import measure_matrix
from mergekit_ace.report.measure import norms
from mergekit_ace.report.model import Mode, Report, TensorReport
from mergekit_ace.report.naming import place as place_of


def inspect_adapters(
    request: Request, places: Sequence[Place], mode: Mode, *, spectra: Collection[str] = ()
) -> Iterator[TensorReport]:
    """The report of each weight that an adapter updates; one weight's factors are held at a time.

    Shares of the base's weights are left out where its weights are not on this machine, or the method needs none.

    Args:
        request: the merge.
        places: of its weights, those to measure.
        mode: `fast` for norms and heterogeneity; `full` for merges too.
        spectra: names of the weights whose singular values are measured.
    """
    merge = AdapterMerge(request)
    for place in places:
        yield from _inspect(merge, request, place, mode, with_spectra=place.weight in spectra)


def assemble_adapters(
    request: Request,
    recipe: str,
    tensors: Iterable[TensorReport],
    mode: Mode,
    *,
    selection: str | None = None,
    complete: bool = True,
) -> Report:
    """The report of the weights measured so far."""
    measured = tuple(tensors)
    note = "Measured on the adapters alone"
    if not any(tensor.merged and tensor.merged.relative_change is not None for tensor in measured):
        note += ": changes relative to the base's weights are not shown"
    return Report(
        producer=f"mergekit-ace {__version__}",
        recipe=recipe,
        method=request.method.name,
        mode=mode,
        complete=complete,
        base=request.base_name,
        experts=tuple(adapter.name for adapter in request.adapters),
        note=f"{note}.",
        planned=len(request.places),
        selection=selection,
        tensors=measured,
    )


@torch.no_grad()
def _inspect(
    merge: AdapterMerge, request: Request, place: Place, mode: Mode, *, with_spectra: bool
) -> Iterator[TensorReport]:
    started = time.perf_counter()
    where = place_of(place.weight)
    report = TensorReport(
        name=place.weight,
        depth=where.depth,
        kind=where.kind,
        shape=place.stored_shape,
        treatment="failed",
        reason="the merge stops here",
    )
    try:
        parameters = request.parameters(place.weight)
        treated = merge.treat(place, parameters)
        solved = treated.kind in ("matrix", "stack")
        if solved and (reason := request.method.needs_entries(parameters)):
            raise AdapterError(f"{place.weight}: {reason}")
        for cores in merge.cores(place, parameters, solved=solved):
            task_vectors = cores.task_vectors
            part = report.model_copy(update={"name": cores.name, "reason": treated.reason})
            if solved:
                part = part.model_copy(update={"shape": place.stored_shape[-2:]})
                part = measure_matrix(part, request.method, task_vectors, parameters, mode, with_spectra=with_spectra)
                with_spectra = False  # of a stack, the first matrix
            else:
                averaged = "average" if len(task_vectors) else "unchanged"
                treatment = averaged if treated.kind == "average" else "base"
                part = part.model_copy(update={"treatment": treatment, **norms(task_vectors)})
            yield part.model_copy(update={"seconds": time.perf_counter() - started})
            started = time.perf_counter()
    except READING as error:
        yield report.model_copy(update={"error": message_of(error), "seconds": time.perf_counter() - started})
