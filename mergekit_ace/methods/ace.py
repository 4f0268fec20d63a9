"""`merge_method: ace`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from mergekit_ace.matrix.merge import MatrixMerge, merge_by_covariance, takes_measured
from mergekit_ace.matrix.options import (
    Bounds,
    CovarianceOptions,
    Gate,
    LengthBound,
    RetentionBound,
    SpectralRefinement,
)
from mergekit_ace.matrix.presets import ACE, ACE_0_1, ACE_HEAD, ACE_PUBLISHED
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.parameters import MOMENTS, Fraction, Positive, Threshold, parameter

Preset = Literal["preset"]

PRESETS: Mapping[str, CovarianceOptions] = {"default": ACE, "0.1": ACE_0_1, "published": ACE_PUBLISHED}
_RETENTION_BOUNDS: Mapping[object, RetentionBound] = {False: False, True: True, "auto": "by_size"}
_LENGTH_BOUNDS: Mapping[object, LengthBound] = {False: "none", True: "orthogonal"}


_HEAD = "output_head"
"""Stands among the parameters in force of an output head; no recipe has it."""


class Ace(LayerwiseMethod):
    """ACE-Merging: least interference under each expert's own estimated input covariance.

    `preset: published` is the paper's method at its program's epsilon. The default differs in what it takes from the
    task vectors instead of from a person: see `mergekit_ace.matrix.presets.ACE`.

    Source: Xu et al., "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation", CVPR 2026,
    arXiv:2603.02945.
    """

    name = "ace"
    pretty_name = "ACE-Merging"
    reference_url = "https://arxiv.org/abs/2603.02945"
    merges_heads = True
    own_parameters = (
        MOMENTS,
        parameter(
            "preset",
            Literal["default", "0.1", "published"],
            default="default",
            requirement="'default', '0.1' (in quotes) or 'published'",
            description="where the parameters below get their values from when the recipe does not give them",
        ),
        parameter(
            "epsilon",
            Positive | Literal["auto"] | Preset,
            default="preset",
            requirement="a finite number above 0, or 'auto'",
            description="ridge of the second moments, absolute, or 'auto'",
        ),
        parameter(
            "heterogeneity",
            Literal["published", "scale_free"] | Preset,
            default="preset",
            requirement="'published' or 'scale_free'",
            description="statistic that decides whether a layer's experts are heterogeneous",
        ),
        parameter(
            "heterogeneity_threshold",
            Threshold | Preset,
            default="preset",
            requirement="a number of at least 0 (.inf: no layer is heterogeneous; 0: all are)",
            description="heterogeneous above it: second moments are trace-normalized and the spectrum is refined",
        ),
        parameter(
            "spectral_fraction",
            Fraction | Preset,
            default="preset",
            requirement="a number from 0 to 1",
            description="share of singular directions refined; 0 switches refinement off",
        ),
        parameter(
            "structural_prior",
            bool | Preset,
            default="preset",
            requirement="true or false",
            description="add the collective structural prior",
        ),
        parameter(
            "correlation_threshold",
            Fraction | Preset,
            default="preset",
            requirement="a number from 0 to 1",
            description="merge a layer of adapters whose second moments correlate by less without them; 0: none",
        ),
        parameter(
            "retention_bound",
            bool | Literal["auto"] | Preset,
            default="preset",
            requirement="true, false or 'auto'",
            description="the mean response under the experts' second moments is at most the experts' own; 'auto': as "
            "far as the updates are large for the base, or of low rank",
        ),
        parameter(
            "length_bound",
            bool | Literal["auto"] | Preset,
            default="preset",
            requirement="true, false or 'auto'",
            description="norm of the merged update at most that of the sum of independent updates; 'auto': half the "
            "way from one to that sum, as far as updates are large for the base, and at most twice the sum of their "
            "norms. For adapters both are smaller",
        ),
        parameter(
            "precision",
            Literal["auto", "full"] | Preset,
            default="preset",
            requirement="'auto' or 'full'",
            description="'auto': weights stored in 16 bits are merged to an eighth of their rounding error, 'full' for "
            "a lambda above 1",
        ),
    )

    def options(self, parameters: Mapping[str, Any]) -> CovarianceOptions:
        """The options of one matrix: the preset's, with what the recipe gives in their place."""
        preset = ACE_HEAD if parameters.get(_HEAD) else PRESETS[parameters["preset"]]

        def given(name: str, otherwise: Any) -> Any:
            return otherwise if parameters[name] == "preset" else parameters[name]

        gate = preset.gate or Gate(statistic="scale_free", threshold=0.0)
        threshold = given("heterogeneity_threshold", gate.threshold)
        refinement = preset.refinement or SpectralRefinement(fraction=0.0)
        return replace(
            preset,
            second_moment=replace(preset.second_moment, epsilon=given("epsilon", preset.second_moment.epsilon)),
            # A threshold of 0 is no gate: every matrix, also one whose experts are equally strong.
            gate=Gate(statistic=given("heterogeneity", gate.statistic), threshold=threshold) if threshold else None,
            structural_prior=given("structural_prior", preset.structural_prior),
            refinement=replace(refinement, fraction=given("spectral_fraction", refinement.fraction)),
            bounds=Bounds(
                retention=_RETENTION_BOUNDS.get(parameters["retention_bound"], preset.bounds.retention),
                length=_length_bound(parameters, preset),
            ),
            correlation_threshold=given("correlation_threshold", preset.correlation_threshold),
            # A scale above 1 multiplies the error too, which the budget does not know.
            precision="full" if abs(self.scale(parameters)) > 1 else given("precision", preset.precision),
        )

    def settings(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters in force, what the preset gives in the place of the word."""
        options = self.options(parameters)
        gate, refinement = options.gate, options.refinement
        in_force = {
            "epsilon": options.second_moment.epsilon,
            "heterogeneity": gate.statistic if gate else "scale_free",
            "heterogeneity_threshold": gate.threshold if gate else 0.0,
            "spectral_fraction": refinement.fraction if refinement else 0.0,
            "structural_prior": options.structural_prior,
            "precision": options.precision,
            "correlation_threshold": options.correlation_threshold,
            "retention_bound": _word(_RETENTION_BOUNDS, options.bounds.retention),
            "length_bound": _word(_LENGTH_BOUNDS, options.bounds.length),
        }
        return {**super().settings(parameters), **in_force}

    def head_parameters(self, parameters: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Those of the default, which has a composition of its own for heads; the other presets average them."""
        return {**parameters, _HEAD: True, "spectral_fraction": 0.0} if parameters["preset"] == "default" else None

    def gate(self, parameters: Mapping[str, Any]) -> Gate | None:
        """ACE's, where its threshold is above 0."""
        return self.options(parameters).gate

    def takes_moments(self, parameters: Mapping[str, Any]) -> bool:
        """Not where it asks for what is defined of estimates only."""
        return takes_measured(self.options(parameters))

    def needs_base_norm(self, parameters: Mapping[str, Any]) -> bool:
        """Where adapters are added up as far as they are small: second moments do not correlate, or were measured."""
        options = self.options(parameters)
        if parameters["moments"]:
            return options.bounds.length != "none"
        return options.needs_size or (options.uncorrelated == "balanced" and options.correlation_threshold > 0)

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """One matrix by ACE."""
        return merge_by_covariance(task_vectors, self.options(parameters))


def _word(bounds: Mapping[object, object], bound: object) -> object:
    """What a recipe writes for a bound."""
    return next((word for word, of_word in bounds.items() if of_word == bound), "auto")


def _length_bound(parameters: Mapping[str, Any], preset: CovarianceOptions) -> LengthBound:
    """That of the recipe; `auto`: the preset's own, where it has one that follows the updates."""
    given = parameters["length_bound"]
    if given == "auto":
        return preset.bounds.length if preset.bounds.length == "by_size" else "end_to_end"
    return preset.bounds.length if given == "preset" else _LENGTH_BOUNDS[given]
