"""`merge_method: ace`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from mergekit_ace.layer.covariance_methods import ACE, ACE_PUBLISHED
from mergekit_ace.layer.merge import LayerMerge, merge_by_covariance
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.parameters import Fraction, Positive, Threshold, parameter

Preset = Literal["preset"]

PRESETS: Mapping[str, CovarianceOptions] = {"default": ACE, "published": ACE_PUBLISHED}


class Ace(LayerwiseMethod):
    """ACE-Merging: least interference under each expert's own estimated input covariance.

    `preset: published` is the paper's method at its program's epsilon. The default differs in what it takes from the
    task vectors instead of from a person: see `mergekit_ace.layer.covariance_methods.ACE`.

    Source: Xu et al., "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation", CVPR 2026,
    arXiv:2603.02945.
    """

    name = "ace"
    pretty_name = "ACE-Merging"
    reference_url = "https://arxiv.org/abs/2603.02945"
    own_parameters = (
        parameter(
            "preset",
            Literal["default", "published"],
            default="default",
            requirement="'default' or 'published'",
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
            description="average a layer of adapters whose second moments correlate by less; 0: none",
        ),
        parameter(
            "retention_bound",
            bool | Preset,
            default="preset",
            requirement="true or false",
            description="answer to the experts' inputs no louder than they do themselves",
        ),
        parameter(
            "length_bound",
            bool | Literal["auto"] | Preset,
            default="preset",
            requirement="true, false or 'auto'",
            description="no farther from the base than the sum of independent updates would be; 'auto': than twice the "
            "sum of their norms. Adapters are held nearer by both",
        ),
    )

    def options(self, parameters: Mapping[str, Any]) -> CovarianceOptions:
        """The layer's options: the preset's, with what the recipe gives in their place."""
        known = {field.name for field in fields(CovarianceOptions)}
        given = {name: value for name, value in parameters.items() if name in known and value != "preset"}
        return replace(PRESETS[parameters["preset"]], **given)

    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> LayerMerge:
        """One matrix by ACE."""
        return merge_by_covariance(task_vectors, self.options(parameters))
