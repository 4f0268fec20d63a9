"""Estimates from the task vectors held against measured second moments, and what a merge costs under these."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.expert import MeasuredMoment


@dataclass(frozen=True, kw_only=True)
class AgainstMeasured:
    """One expert of one matrix.

    Attributes:
        loss: `tr((W - D) C (W - D)^T) / tr(D C D^T)`; None where the update does not respond to `C`.
        correlation: of `D^T D` and `C` about the identity, from -1 to 1; None where either is a multiple of it.
    """

    loss: float | None
    correlation: float | None


def against_measured(measured: MeasuredMoment, update: Tensor, missed: Tensor, *, squared: float) -> AgainstMeasured:
    """Hold an update and a merge against the measured second moment `C = F^T F` of the expert's inputs.

    The correlation is `<E, M> / (||E|| ||M||)` of `E = D^T D / tr(D^T D) - I/n` and `M = C / tr(C) - I/n`. Shrinkage
    of an estimate towards the identity does not change it. `<D^T D, C> = ||D F^T||_F^2`, which the loss needs too.

    Args:
        measured: `F`, `[r, n]`.
        update: `D`, `[m, n]`.
        missed: `W - D`, `[m, n]`.
        squared: `||D^T D||_F^2`.
    """
    factor = measured.factor.to(update)
    n = factor.shape[1]
    response = squared_norm(update @ factor.mT)
    energy, trace = squared_norm(update), squared_norm(factor)
    loss = squared_norm(missed @ factor.mT) / response if response > 0 else None
    of_update = squared / energy**2 - 1 / n if energy > 0 else 0.0
    of_inputs = squared_norm(gram(factor.mT)) / trace**2 - 1 / n if trace > 0 else 0.0
    correlation = None
    if of_update > 0 and of_inputs > 0:
        shared = response / (energy * trace) - 1 / n
        correlation = min(1.0, max(-1.0, shared / math.sqrt(of_update * of_inputs)))
    return AgainstMeasured(loss=loss, correlation=correlation)
