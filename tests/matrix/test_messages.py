"""What the merge of a matrix refuses, word by word: the tensor, the expert, what was found, the remedy."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mergekit_ace.matrix.expert import (
    Expert,
    MeasuredMoment,
    require_finite_base,
    require_finite_update,
    voting_experts,
)
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import CovarianceOptions, Gate, SecondMoment, SpectralRefinement
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, with_epsilon
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from tests.matrix.experts import layer, steep_updates


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        work()
    return str(raised.value)


def expert(name: str, *values: float, weight: float = 1.0, dtype: torch.dtype = torch.float32) -> Expert:
    return Expert(name=name, tensor=torch.tensor([values], dtype=dtype), weight=weight)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights(weight: float) -> None:
    experts = [expert("one", 1.0), expert("two", 2.0, weight=weight)]
    assert refused(lambda: voting_experts(experts, name="w")) == (
        f"w: parameter weight of expert two must be a finite number of at least 0; got {weight}"
    )


def test_weights_of_zero() -> None:
    experts = [expert("one", 1.0, weight=0.0), expert("two", 2.0, weight=0.0)]
    assert refused(lambda: voting_experts(experts, name="w")) == (
        "w: parameter weight must be positive for at least one expert; got 0 for all of one, two"
    )
    heard = expert("three", 3.0, weight=0.5)
    assert voting_experts([*experts, heard], name="w") == [heard]


REPAIR = "Repair or replace that checkpoint; nothing was merged from it."


def test_what_is_not_finite() -> None:
    sound, broken = torch.tensor([[1.0]]), torch.tensor([[math.inf]])
    require_finite_base(sound, name="w")
    words = "w: every weight must be finite; "
    assert refused(lambda: require_finite_base(broken, name="w")) == f"{words}the base holds NaN or infinity. {REPAIR}"
    assert refused(lambda: require_finite_base(broken.half(), name="w")) == (
        f"{words}the base holds NaN or infinity. {REPAIR} If it is stored in another dtype, it may exceed the range of "
        "dtype: float16; set dtype: float32."
    )
    require_finite_update(1.0, sound, expert("one", 1.0), name="w")
    for base, other, culprit in (
        (broken, expert("one", 1.0), "the base"),
        (sound, expert("one", math.nan), "expert one"),
        (sound, expert("one", 1.0), "the difference of expert one and the base"),
    ):
        told = refused(lambda base=base, other=other: require_finite_update(math.nan, base, other, name="w"))  # type: ignore[misc]
        assert told == f"{words}{culprit} holds NaN or infinity. {REPAIR}"
    half = refused(lambda: require_finite_update(math.inf, sound.half(), expert("one", math.inf), name="w"))
    assert half.endswith("set dtype: float32.")


def test_options() -> None:
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        assert refused(lambda epsilon=epsilon: SecondMoment(epsilon=epsilon)) == (  # type: ignore[misc]
            f"epsilon must be a finite number above 0 or 'auto'; got {epsilon!r}"
        )
    for threshold in (-0.5, math.nan):
        assert refused(lambda threshold=threshold: Gate(statistic="published", threshold=threshold)) == (  # type: ignore[misc]
            f"heterogeneity_threshold must be at least 0; got {threshold!r}"
        )
    Gate(statistic="published", threshold=0.0)
    for share in (-0.5, 1.5, math.nan):
        assert refused(lambda share=share: SpectralRefinement(fraction=share)) == (  # type: ignore[misc]
            f"spectral_fraction must lie in [0, 1]; got {share!r}"
        )
        assert refused(
            lambda share=share: CovarianceOptions(second_moment=SecondMoment(), correlation_threshold=share)  # type: ignore[misc]
        ) == (f"correlation_threshold must lie in [0, 1]; got {share!r}")
    for share in (0.0, 1.0):
        assert SpectralRefinement(fraction=share).fraction == share
        assert (
            CovarianceOptions(second_moment=SecondMoment(), correlation_threshold=share).correlation_threshold == share
        )


def test_measured_moments_of_the_published_preset() -> None:
    vectors = layer(steep_updates(6, 5, 2))
    measured = MeasuredMoment(factor=torch.eye(5), error=0.1, tokens=5)
    experts = [replace(expert, measured=measured) for expert in vectors.experts]
    known = StoredTaskVectors(vectors.base, experts, name="w")
    told = (
        "w: measured second moments cannot be combined with preset: published or structural_prior: true, which are "
        "defined of estimated ones. Remove moments, or those"
    )
    for options in (ACE_PUBLISHED, replace(ACE, structural_prior=True)):
        assert refused(lambda options=options: merge_by_covariance(known, options)) == told  # type: ignore[misc]
    assert merge_by_covariance(known, ACE).measured == 2


def test_a_ridge_beyond_the_dtype() -> None:
    vectors = layer(steep_updates(6, 5, 2), dtype=torch.float32)
    options = with_epsilon(replace(ACE_PUBLISHED, gate=None), 1e38)
    told = refused(lambda: merge_by_covariance(vectors, options))
    start = "layers.0.up_proj.weight: epsilon must leave ridges that torch.float32 can hold; 1e+38 makes one of "
    assert told.startswith(start)
    assert told.endswith(". Set epsilon: auto, or a smaller one")
    smallest = min(statistics.centered_energy for statistics in vectors.statistics)
    assert float(told.removeprefix(start).partition(". Set")[0]) == pytest.approx(1e38 / smallest, rel=1e-2)


def test_the_rank_and_reason_of_what_is_left_out() -> None:
    base = torch.ones(2, 3)
    changed = Expert(name="changed", tensor=base + 1)
    found = StoredTaskVectors(base, [changed, Expert(name="same", tensor=base.clone())])
    assert found.left_out == {"same": "equal to the base here"}
    # One entry by its last bit: less than the rounding of the matrix.
    last_bit = base.clone()
    last_bit[0, 0] += torch.finfo(torch.float32).eps
    found = StoredTaskVectors(base, [changed, Expert(name="last bit", tensor=last_bit)])
    assert found.left_out == {"last bit": "equal to the base here"}
    last_bit += 4 * torch.finfo(torch.float32).eps
    assert StoredTaskVectors(base, [changed, Expert(name="last bits", tensor=last_bit)]).left_out == {}
    assert StoredTaskVectors(base, [Expert(name="same", tensor=base.clone())]).left_out == {
        "same": "equal to the base here"
    }
