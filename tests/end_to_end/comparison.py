"""A merged checkpoint held against the reference, tensor by tensor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.checkpoints import Family, Suite, read_tensors
from tests.checkpoints.suite import Checkpoint
from tests.reference import Recipe, merge_tensor

# Of the merged task vector, for float64 inputs: conditioning up to 1e5 times float64's 1e-16, and a margin.
FLOAT64_TOLERANCE = 1e-9
# For float32 inputs an error below this is as good as none: a handful of roundings. Above it, the literal steps in
# float32 on the same tensor are the measure; on a single tensor the roundings of either may fall better or worse than
# usual, so that "no worse" is asked of the mean over many (`test_float32.py`) and twice the error allowed of each.
FLOAT32_FLOOR = 1e-6
FLOAT32_LUCK = 2.0
# A result computed in float32 and rounded to 16 bits may differ from the rounded float64 result where the latter lies
# this close to the middle of two numbers, relative to the tensor's largest entry.
BEFORE_ROUNDING = 1e-5

# Every parameter as published, so that these tests do not depend on what the defaults are.
PUBLISHED = {
    "preset": "published",
    "epsilon": 0.01,
    "heterogeneity_threshold": 0.3,
    "spectral_fraction": 0.3,
    "structural_prior": True,
}


def recipe_for(suite: Suite, *, weights: Sequence[float] | None = None, dtype: str | None = None, **parameters: object):
    """The mergekit recipe of a suite, with all parameters as published except those given."""
    models: list[dict[str, object]] = [{"model": str(expert.path)} for expert in suite.experts]
    for model, weight in zip(models, weights or (), strict=False):
        model["parameters"] = {"weight": weight}
    recipe: dict[str, object] = {
        "merge_method": "ace",
        "base_model": str(suite.base.path),
        "models": models,
        "parameters": {**PUBLISHED, **parameters},
    }
    if dtype is not None:
        recipe["dtype"] = dtype
    return recipe


def reference_for(family: Family, **fields: object) -> Recipe:
    """The reference's view of a recipe: which tensors of this family are tables or kernels, and the options given."""
    return Recipe(tables=family.tables, averaged=family.averaged, **fields)  # type: ignore[arg-type]


def assert_merged(
    merged: Mapping[str, Tensor],
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    recipe: Recipe,
    dtype: torch.dtype | None = None,
) -> None:
    """Every tensor of the output is the reference's; `dtype` is the one the inputs were cast to, if they were."""
    assert merged
    for name, tensor in merged.items():
        inputs = [checkpoint.tensors[name] for checkpoint in (base, *experts)]
        if tensor.is_floating_point():
            assert_tensor(name, tensor, [i if dtype is None else i.to(dtype) for i in inputs], recipe)
        else:
            assert torch.equal(tensor, inputs[0]), name


def assert_suite_merged(
    out: Mapping[str, Tensor], suite: Suite, recipe: Recipe, dtype: torch.dtype | None = None
) -> None:
    """As `assert_merged`, and nothing that the base has is missing (in one of its two layouts)."""
    assert_merged(out, suite.base, suite.experts, recipe, dtype)
    on_disk = read_tensors(suite.base.path).keys()
    in_memory = suite.base.tensors.keys() - on_disk
    assert out.keys() == on_disk or out.keys() > in_memory


def assert_tensor(name: str, merged: Tensor, inputs: Sequence[Tensor], recipe: Recipe) -> None:
    """One tensor, at the tolerance of its dtype."""
    base, *experts = inputs
    exact = merge_tensor(name, base, experts, recipe)
    assert merged.shape == base.shape
    assert bool(merged.isfinite().all()), f"{name} holds NaN or infinity"
    if torch.equal(exact, base.double()):
        kept = torch.equal(merged, base.to(merged.dtype))
        assert kept, f"{name}: no expert changed it, so it must be the base's, bit for bit"
    elif merged.dtype == torch.float64:
        assert task_vector_error(merged, base, exact) <= FLOAT64_TOLERANCE, name
    elif merged.dtype == torch.float32:
        literal = merge_tensor(name, base, experts, recipe, torch.float32)
        error, allowed = (task_vector_error(result, base, exact) for result in (merged, literal))
        assert error <= FLOAT32_LUCK * max(allowed, FLOAT32_FLOOR), (
            f"{name}: error {error:.2e}, the literal steps have {allowed:.2e}"
        )
    else:
        assert_one_rounding(name, merged, exact)


def task_vector_error(merged: Tensor, base: Tensor, exact: Tensor) -> float:
    """`||merged - exact||_F / ||exact - base||_F`, in float64."""
    return float((merged.double() - exact.double()).norm() / (exact.double() - base.double()).norm())


def assert_one_rounding(name: str, merged: Tensor, exact: Tensor) -> None:
    """Within half a unit in the last place of the float64 result."""
    limits = torch.finfo(merged.dtype)
    magnitude = exact.abs().clamp(min=limits.smallest_normal)
    half_unit = limits.eps / 2 * torch.exp2(magnitude.log2().floor())
    slack = BEFORE_ROUNDING * exact.abs().max()
    excess = float(((merged.double() - exact).abs() - half_unit).max())
    assert excess <= slack, f"{name}: {excess:.2e} beyond half a unit in the last place"
