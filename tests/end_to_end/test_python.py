"""`merge_tensors` and `merge_state_dicts`: shapes, dtypes, limits and invariances, against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from torch import Tensor

import mergekit_ace
from tests.end_to_end.comparison import FLOAT64_TOLERANCE, PUBLISHED, assert_tensor, task_vector_error
from tests.reference import AceOptions, Recipe, ace, merge_tensor

mergekit_ace.register()

SHAPES = [(12, 40), (40, 12), (24, 24), (1, 16), (16, 1), (2, 2), (3, 64), (64, 3), (5, 7)]
NEVER, ALWAYS = math.inf, 0.0


def drawn(count: int, m: int, n: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """A base and `count` experts around it, float64, energies a factor of four apart."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(m, n, dtype=torch.float64, generator=generator)
    updates = [torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [base, *(base + scale * 2**t * update for t, update in enumerate(updates))]


def merged(tensors: list[Tensor], **parameters: object) -> Tensor:
    """The first tensor is the base."""
    return merge_tensors(tensors, "ace", base_index=0, name="layer.weight", parameters={**PUBLISHED, **parameters})


@pytest.mark.parametrize("threshold", [NEVER, ALWAYS], ids=["homogeneous", "heterogeneous"])
@pytest.mark.parametrize("prior", [True, False], ids=["prior", "no prior"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], prior: bool, threshold: float) -> None:
    tensors = drawn(3, *shape)
    result = merged(tensors, heterogeneity_threshold=threshold, structural_prior=prior)
    options = AceOptions(heterogeneity_threshold=threshold, structural_prior=prior)
    assert_tensor("layer.weight", result, tensors, Recipe(options=options))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(2, 24),
    n=st.integers(1, 24),
    count=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([NEVER, 0.3, ALWAYS]),
    fraction=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    prior=st.booleans(),
    log_epsilon=st.floats(-4, 2),
)
def test_any_layer(
    m: int, n: int, count: int, seed: int, threshold: float, fraction: float, prior: bool, log_epsilon: float
) -> None:
    tensors = drawn(count, m, n, seed)
    options = {
        "epsilon": 10**log_epsilon,
        "heterogeneity_threshold": threshold,
        "spectral_fraction": fraction,
        "structural_prior": prior,
    }
    reference = merge_tensor("layer.weight", tensors[0], tensors[1:], Recipe(options=AceOptions(**options)))
    assert task_vector_error(merged(tensors, **options), tensors[0], reference) <= 10 * FLOAT64_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [NEVER, ALWAYS], ids=["homogeneous", "heterogeneous"])
def test_dtypes_and_strides(dtype: torch.dtype, threshold: float) -> None:
    """A transposed, an expanded, a strided and a read-only view: read in place, never written."""
    base, first, second, third = (tensor.to(dtype) for tensor in drawn(3, 20, 30))
    tensors = [base, first.T.contiguous().T, second.repeat_interleave(2, dim=1)[:, ::2], third[:1].expand(20, 30)]
    before = [tensor.clone() for tensor in tensors]
    result = merged(tensors, heterogeneity_threshold=threshold)
    assert result.dtype == dtype
    assert_tensor("layer.weight", result, tensors, Recipe(options=AceOptions(heterogeneity_threshold=threshold)))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert result.data_ptr() not in [tensor.data_ptr() for tensor in tensors]


def test_a_large_ridge_averages_the_centered_updates() -> None:
    """Homogeneous: the plain mean; heterogeneous: weighted by `1 / tr(G_t)`."""
    base, *experts = drawn(3, 10, 8)
    centered = [(expert - base) - (expert - base).mean(dim=0) for expert in experts]
    shares = [1 / c.square().sum() for c in centered]
    weighted = sum(s * c for s, c in zip(shares, centered, strict=True)) / sum(shares)
    # At epsilon = 1e10 what the limit leaves out is of relative order tr(G_t) / epsilon = 1e-7; the residual of the
    # refinement grows with the ridge, so it is off.
    large = {"epsilon": 1e10, "spectral_fraction": 0}
    torch.testing.assert_close(
        merged([base, *experts], heterogeneity_threshold=NEVER, **large) - base, sum(centered) / 3, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        merged([base, *experts], heterogeneity_threshold=ALWAYS, **large) - base, weighted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("threshold", [NEVER, ALWAYS], ids=["homogeneous", "heterogeneous"])
def test_the_order_of_experts_and_rows_does_not_matter(threshold: float) -> None:
    base, *experts = drawn(4, 14, 9)
    result = merged([base, *experts], heterogeneity_threshold=threshold)
    turned = merged([base, *experts[::-1]], heterogeneity_threshold=threshold)
    torch.testing.assert_close(turned, result, rtol=1e-9, atol=1e-9)
    rows = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    permuted = merged([tensor[rows] for tensor in (base, *experts)], heterogeneity_threshold=threshold)
    torch.testing.assert_close(permuted, result[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threshold", [NEVER, ALWAYS], ids=["homogeneous", "heterogeneous"])
def test_without_the_prior_the_inputs_may_be_rotated(threshold: float) -> None:
    base, *experts = drawn(4, 14, 9)
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    options = {"heterogeneity_threshold": threshold, "structural_prior": False}
    result = merged([base, *experts], **options)
    rotated = merged([tensor @ rotation for tensor in (base, *experts)], **options)
    torch.testing.assert_close(rotated, result @ rotation, rtol=1e-9, atol=1e-9)


def test_identical_experts_give_the_centered_expert() -> None:
    base, expert = drawn(1, 11, 6)
    result = merged([base, expert, expert, expert], heterogeneity_threshold=NEVER, structural_prior=False)
    update = expert - base
    torch.testing.assert_close(result - base, update - update.mean(dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_informative_expert_is_returned_exactly(dtype: torch.dtype) -> None:
    base, expert, frozen = (tensor.to(dtype) for tensor in drawn(2, 9, 12))
    assert torch.equal(merged([base, expert, base, base]), expert)
    assert torch.equal(merged([base, expert, frozen], weight=[1.0, 0.0]), expert)
    assert torch.equal(merged([base, expert]), expert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 8), (2, 3, 4), (4, 3, 2, 2)], ids=str)
def test_no_informative_expert_gives_the_base_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = torch.randn(shape).to(dtype)
    result = merged([base, base.clone(), base.clone()])
    assert torch.equal(result, base)
    assert result.data_ptr() != base.data_ptr()


def test_an_expert_once_stored_in_another_dtype() -> None:
    """float16 cannot hold bfloat16's smallest numbers: rounding in a layer that was not trained is no update."""
    base = (0.02 * torch.randn(32, 24)).bfloat16()
    base[0, 0] = 2e-8
    frozen, trained = base.half(), base.float() + torch.randn(32, 24)
    assert frozen[0, 0] != base[0, 0]
    assert torch.equal(merged([base, frozen, trained]), trained)


def test_a_frozen_expert_does_not_change_the_merge_of_the_others() -> None:
    base, *experts = drawn(3, 10, 12)
    assert torch.equal(merged([base, experts[0], base, *experts[1:]]), merged([base, *experts]))


@pytest.mark.parametrize("threshold", [NEVER, ALWAYS], ids=["homogeneous", "heterogeneous"])
def test_weights_multiply_every_sum(threshold: float) -> None:
    tensors = drawn(3, 13, 10)
    weights = (0.5, 3.0, 1.5)
    recipe = Recipe(options=AceOptions(heterogeneity_threshold=threshold), weights=weights)
    result = merged(tensors, heterogeneity_threshold=threshold, weight=list(weights))
    assert_tensor("layer.weight", result, tensors, recipe)
    scaled = merged(tensors, heterogeneity_threshold=threshold, weight=[100 * weight for weight in weights])
    torch.testing.assert_close(scaled, result, rtol=1e-10, atol=1e-12)


def test_lambda_scales_the_merged_task_vector() -> None:
    base, *experts = drawn(3, 13, 10)
    result = merged([base, *experts])
    half = merged([base, *experts], **{"lambda": 0.5})
    torch.testing.assert_close(half - base, (result - base) / 2)


def test_input_axis_turns_the_matrix() -> None:
    tensors = drawn(3, 13, 10)
    turned = merged([tensor.T for tensor in tensors], input_axis="first")
    torch.testing.assert_close(turned.T, merged(tensors), rtol=1e-12, atol=1e-12)


def test_stacked_experts_are_merged_slice_by_slice() -> None:
    slices = [drawn(3, 8, 12, seed) for seed in range(4)]
    stacks = [torch.stack(tensors) for tensors in zip(*slices, strict=True)]
    result = merge_tensors(
        stacks, "ace", base_index=0, name="model.layers.0.mlp.experts.gate_up_proj", parameters=PUBLISHED
    )
    for slice_result, tensors in zip(result, slices, strict=True):
        torch.testing.assert_close(slice_result, merged(tensors), rtol=1e-12, atol=1e-12)


def test_state_dicts() -> None:
    """A module and two state dictionaries; the tables are known by name, a buffer that is not floating is copied."""

    def model(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"embed_tokens.weight": (20, 8), "up.weight": (12, 8), "up.bias": (12,), "conv.weight": (4, 3, 2, 2)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {**tensors, "position_ids": torch.arange(5)}

    models = {"base": model(0), "code": model(1), "maths": model(2)}
    result = merge_state_dicts(
        models, "ace", base="base", parameters={**PUBLISHED, "weight": {"code": 2.0, "maths": 1.0}}
    )
    assert result.keys() == models["base"].keys()
    assert torch.equal(result.pop("position_ids"), torch.arange(5))
    recipe = Recipe(tables=("embed_tokens.weight",), weights=(2.0, 1.0))
    for name, tensor in result.items():
        assert_tensor(name, tensor, [m[name] for m in models.values()], recipe)


def test_the_published_ridge_does_not_scale_with_the_updates() -> None:
    """The published ridge is absolute: updates a thousand times smaller are below it and the merge becomes a mean."""
    base, *experts = drawn(3, 10, 8, scale=1e-3)
    updates = [expert - base for expert in experts]
    result = merged([base, *experts], heterogeneity_threshold=NEVER) - base
    mean = sum(u - u.mean(dim=0) for u in updates) / 3
    torch.testing.assert_close(result, ace(updates, AceOptions(heterogeneity_threshold=NEVER)), rtol=1e-8, atol=1e-12)
    assert (result - mean).norm() < 0.05 * mean.norm()
