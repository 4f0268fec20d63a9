"""What an inspection says: a report, its layers, and their experts.

Plain dataclasses; the JSON schema follows from them. A change that could break a reader of the JSON raises
`SCHEMA_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

SCHEMA_VERSION = 1

Branch = Literal[
    "heterogeneous",
    "homogeneous",
    "method",
    "uncorrelated",
    "single expert",
    "frozen",
    "average",
    "base",
    "copied",
    "failed",
]
Mode = Literal["fast", "full"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one matrix, descending, at most 64 of them: the largest, then ever wider apart."""

    ranks: tuple[int, ...]
    """Position of each value in the full spectrum, from 1."""
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One expert in one layer. With `D` its task vector and `G = C^T C` its second moment (`C` is `D`, centered)."""

    expert: str
    weight: float
    """As in the recipe."""
    norm: float
    """`||D||_F`."""
    trace_share: float
    """`tr G` over the sum of all experts' traces, 0 where all are 0; with `||D||_F^2` for `tr G` where nothing but a
    mean is taken."""
    ridge: float | None = None
    """Ridge relative to the mean eigenvalue of the expert's second moment. Above 1 it outweighs what was measured."""
    effective_rank: float | None = None
    """Exponential of the entropy of the normalized singular values of `D` (Roy and Vetterli, 2007)."""
    top_energy: float | None = None
    """Share of `||D||_F^2` in the largest 5 percent of the singular values."""
    loss: float | None = None
    """`tr((W - D) G (W - D)^T) / tr(D G D^T)`: how far the merged task vector `W` is from the expert's own outputs
    under its own second moment. 0: nothing lost; 1: as far as the base model."""
    spectrum: Spectrum | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An expert that has no say in a layer."""

    expert: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The merged task vector `W` of a layer, `lambda` included."""

    norm: float
    """`||W||_F`."""
    relative_norm: float
    """`||W||_F` over the root mean square of the experts' norms."""
    relative_change: float | None = None
    """`||W||_F` over the norm of the base's weight; None where that is zero."""
    top_energy: float
    """Share of `||W||_F^2` in the largest 5 percent of the singular values."""
    top_energy_before: float | None = None
    """The same before spectral refinement; None where nothing was refined."""
    spectrum: Spectrum
    spectrum_before: Spectrum | None = None


@dataclass(frozen=True, kw_only=True)
class Interference:
    """How the experts of a layer stand to each other; matrices in the order of `LayerReport.experts`."""

    overlap: tuple[tuple[float, ...], ...]
    """`tr(G_s G_t) / (||G_s||_F ||G_t||_F)`: 0 for disjoint input subspaces, 1 for equal ones."""
    alignment: tuple[tuple[float, ...], ...]
    """Cosine between task vectors; negative where two experts pull against each other."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What decides whether a layer is heterogeneous."""

    statistic: Literal["published", "scale_free"]
    threshold: float


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One tensor of the merged model, or one slice of a stack of matrices."""

    name: str
    """The tensor's name; `name[i]` for slice i of a stack."""
    depth: int | None
    """Number of the layer it is in; None outside the layers."""
    kind: str
    """Layer type: the name without prefix and numbers, such as `self_attn.q_proj`."""
    shape: tuple[int, ...]
    """As stored."""
    branch: Branch
    """What the merge does: `heterogeneous` or `homogeneous` (ACE, by its gate), `method` (a method without a gate),
    `uncorrelated` (second moments without anything in common: averaged),
    `single expert` (its task vector as it is), `frozen` (no expert changed it), `average`, `base`, `copied` (a
    buffer) or `failed` (see `error`)."""
    reason: str
    """Why."""
    experts: tuple[ExpertReport, ...] = ()
    """Those with information in this tensor, in recipe order."""
    left_out: tuple[LeftOut, ...] = ()
    heterogeneity: float | None = None
    """The published statistic; None for fewer than two experts."""
    heterogeneity_scale_free: float | None = None
    gate: Gate | None = None
    """What it is compared with; None for a method without a gate."""
    ridge: float | None = None
    """Ridge of the system that is solved, relative to the mean eigenvalue of the sum of second moments."""
    condition: float | None = None
    """Estimated condition number of that system."""
    refined_directions: int | None = None
    """How many singular directions are lifted to a common level."""
    effective_experts: float | None = None
    """How many independent updates the experts' amount to; None where the method does not ask."""
    shortening: float | None = None
    """What the bounds of retention and length multiplied the merged task vector by; None where there was no solve."""
    retention: float | None = None
    """How much of the experts' own outputs it would keep in the mean before; None where the method does not ask."""
    low_rank: bool | None = None
    """The experts' updates are of low rank, as adapters are; None where the method does not ask."""
    correlation: float | None = None
    """Of the experts' second moments; the method averages the layer where it is below its threshold."""
    merged: Merged | None = None
    interference: Interference | None = None
    seconds: float = 0.0
    """What measuring took, reading included."""
    error: str | None = None
    """What stops the merge at this tensor."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A recipe, inspected."""

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    producer: str
    """Program and version."""
    recipe: str
    method: str
    mode: Mode
    """`fast`: norms, traces and heterogeneity; `full`: also solves and spectra."""
    complete: bool
    """False where the inspection was interrupted."""
    base: str | None
    experts: tuple[str, ...]
    note: str | None = None
    """What this report cannot say about its method."""
    layers: tuple[LayerReport, ...]
    """In the order of the model."""
