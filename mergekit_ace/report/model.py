"""What an inspection found: a report, its tensors, and their experts.

The JSON, its schema and `docs/report-schema.md` follow from these classes. A change that could break a reader of the
JSON raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mergekit_ace.matrix.merge import MergeFacts
from mergekit_ace.matrix.options import Gate

SCHEMA_VERSION = 2

Kind = Literal["merged", "single expert", "unchanged", "average", "base", "copied", "failed"]
Mode = Literal["fast", "full"]
Setting = bool | float | str


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Spectrum(_Record):
    """Singular values of one matrix, descending: at most 64 of them, evenly spaced by the logarithm of their rank."""

    ranks: tuple[int, ...]
    """Position of each value in the full spectrum, from 1."""
    values: tuple[float, ...]
    """The singular values."""


class ExpertReport(_Record):
    """One expert in one tensor; `D` is its task vector, `[m, n]`."""

    expert: str
    """The model."""
    weight: float
    """As in the recipe."""
    norm: float
    """`||D||_F`."""
    energy_share: float
    """`||D||_F^2` over the sum of all experts' `||D||_F^2`."""
    ridge: float | None = None
    """Ridge of its second moment, relative to the mean eigenvalue; above 1 it exceeds the second moment itself."""
    effective_rank: float | None = None
    """`(tr G)^2 / tr(G^2)` with `G = D^T D`: the participation ratio of the squared singular values."""
    loss: float | None = None
    """`||(W - D) D^T||_F^2 / ||D D^T||_F^2` with the merged task vector `W`: the interference with this expert (the
    objective of WUDI), relative to that of the base. 0: the expert's outputs are kept; 1: as far as the base."""
    measured_loss: float | None = None
    """The same under the measured second moment `C` of its inputs, `tr((W - D) C (W - D)^T) / tr(D C D^T)`; null where
    it was not measured."""
    estimate_correlation: float | None = None
    """Correlation of `G = D^T D` with the measured second moment of its inputs, about the identity: 1 where the
    estimate is right, 0 where it holds no information on the inputs; null where it was not measured."""
    rounding_share: float | None = None
    """Share of `||D||_F^2` that rounding to its 16-bit format is expected to have added; 0 of what is stored in more
    bits, and null where it was not estimated."""
    spectrum: Spectrum | None = None
    """Singular values of `D`, where they were asked for."""


class LeftOut(_Record):
    """An expert that has no part in the merge of a tensor."""

    expert: str
    """The model."""
    reason: str
    """Why: its weight is 0, it equals the base, or it differs from it by the rounding of its storage format only."""


class Merged(_Record):
    """The merged task vector `W` of a matrix, `lambda` included."""

    norm: float
    """`||W||_F`."""
    relative_norm: float
    """`||W||_F` over the root mean square of the experts' norms."""
    relative_to_mean: float | None = None
    """`||W||_F` over the norm of the experts' weighted mean; null where that is zero."""
    relative_change: float | None = None
    """`||W||_F` over the norm of the base's weight; null where that is zero."""
    effective_rank: float
    """Participation ratio of its squared singular values, as for an expert."""
    spectrum: Spectrum | None = None
    """Singular values of `W`, where they were asked for."""
    spectrum_before: Spectrum | None = None
    """The same before spectral refinement; null where nothing was refined."""


class Interference(_Record):
    """How the experts of a tensor stand to each other; matrices in the order of its `experts`, as lists of rows."""

    overlap: tuple[tuple[float, ...], ...]
    """`tr(G_s G_t) / (||G_s||_F ||G_t||_F)` with `G = D^T D`: 0 for disjoint input subspaces, 1 for equal ones."""
    alignment: tuple[tuple[float, ...], ...]
    """Cosine between task vectors; negative where two updates oppose each other."""


class TensorReport(_Record):
    """One tensor of the merged model, or one matrix of a stack of them."""

    name: str
    """The tensor's name; `name[i]` for matrix i of a stack."""
    depth: int | None
    """Number of the transformer layer it is in; null outside the layers."""
    kind: str
    """Layer type: the name without prefix and numbers, such as `self_attn.q_proj`."""
    shape: tuple[int, ...]
    """As stored."""
    treatment: Kind
    """`merged` by the method, `single expert` (that expert's update, as it is), `unchanged` (no expert changed it),
    `average`, `base`, `copied` (a buffer), or `failed` (see `error`)."""
    reason: str
    """Why."""
    dtype: Literal["float32", "float64"] | None = None
    """In which a matrix is merged; null for what is not a matrix."""
    experts: tuple[ExpertReport, ...] = ()
    """Those with information in this tensor, in the order of the recipe."""
    left_out: tuple[LeftOut, ...] = ()
    """The others."""
    heterogeneity: float | None = None
    """`Var(l)` with `l = log ||D||_F^2` over the experts, scale-free; null for fewer than two experts."""
    heterogeneity_published: float | None = None
    """`Var(l) / Mean(l)^2`, the published statistic."""
    gate: Gate | None = None
    """The statistic and the threshold by which heterogeneous matrices are found; null where there is no gate."""
    parameters: Mapping[str, Setting] = {}
    """The method's parameters for this tensor, as far as a matrix asks for them."""
    merge: MergeFacts | None = None
    """What the merge recorded of itself; null where nothing was merged, and in a fast pass."""
    merged: Merged | None = None
    """The result; null where nothing was merged, and in a fast pass."""
    interference: Interference | None = None
    """Of the experts; null for fewer than two, and in a fast pass."""
    seconds: float = 0.0
    """What measuring took, reading included."""
    error: str | None = None
    """What stops the merge at this tensor."""


class Report(_Record):
    """A recipe, inspected."""

    schema_version: int = SCHEMA_VERSION
    """Raised by every change that could break a reader; new fields may be added without."""
    producer: str
    """Program and version."""
    recipe: str
    """Path of the recipe."""
    method: str
    """Its `merge_method`."""
    mode: Mode
    """`fast`: norms and heterogeneity; `full`: merges too."""
    complete: bool
    """False where the inspection was interrupted: `tensors` then ends early."""
    base: str | None
    """The base model."""
    experts: tuple[str, ...]
    """The other models, in the order of the recipe."""
    note: str | None = None
    """What the report cannot show of its method."""
    planned: int
    """Number of tensors of the merged model."""
    selection: str | None = None
    """Which of them were measured, in words; null: all."""
    tensors: tuple[TensorReport, ...]
    """In the order of the model."""
