"""Whatever the experts hold, a merge is finite and near the base, or an error that names the tensor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from mergekit.merge_methods import merge_tensors

import mergekit_ace
from tests.fuzz.experts import Case, cases

mergekit_ace.register()

NAME = "model.layers.0.mlp.up_proj.weight"


def explore(examples: int) -> settings:
    """The same cases on every run, and no database to keep between runs."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def merged(case: Case, method: str, parameters: dict[str, Any]) -> torch.Tensor | None:
    """The merge; None where it is refused by a clear error, which only values beyond a dtype's range deserve."""
    inputs = [case.base, *case.experts]
    before = [tensor.clone() for tensor in inputs]
    try:
        result = merge_tensors(inputs, method, base_index=0, name=NAME, parameters=parameters)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert NAME in message, case.description
        assert "finite" in message, case.description
        assert case.base.dtype == torch.float16, case.description
        return None
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True) if not then.isnan().any())
    assert result.shape == case.base.shape
    assert result.dtype == case.base.dtype
    return result


@explore(1000)
@given(cases())
def test_the_default_is_finite_and_bounded(case: Case) -> None:
    result = merged(case, "ace", {})
    if result is None:
        return
    assert bool(torch.isfinite(result).all()), case.description
    distance = float(torch.linalg.norm(result.double() - case.base.double()))
    energies = [float(update.square().sum()) for update in case.updates]
    # Twice all updates laid end to end, or T_eff <= T^2 independent updates of mean squared length.
    reach = 2 * math.sqrt(len(energies) * sum(energies))
    assert distance <= reach * (1 + 1e-3) + case.rounding, case.description


@pytest.mark.filterwarnings("ignore:.*not positive definite:RuntimeWarning")
@pytest.mark.parametrize("method", ["ace", "actmat", "wudi", "tsv_m", "iso_c", "iso_cts", "cart"])
@explore(150)
@given(cases())
def test_every_method_is_finite(method: str, case: Case) -> None:
    parameters = {"preset": "published"} if method == "ace" else {}
    result = merged(case, method, parameters)
    assert result is None or bool(torch.isfinite(result).all()), case.description


@explore(300)
@given(cases())
def test_the_order_of_experts_does_not_matter(case: Case) -> None:
    result = merged(case, "ace", {})
    turned = merged(Case(case.base, case.experts[::-1], case.description), "ace", {})
    assert (result is None) == (turned is None)
    if result is None or turned is None:
        return
    reach = math.sqrt(sum(float(update.square().sum()) for update in case.updates))
    allowed = case.rounding + 1e-2 * reach
    assert float(torch.linalg.norm(result.double() - turned.double())) <= allowed, case.description
