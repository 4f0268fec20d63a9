"""What every merge method of this package keeps, whatever its formula.

A method that is added to `METHODS` is tested here without a line of its own: under its defaults, and under each word
that one of its parameters can take.
"""

import math

import pytest
import torch
from torch import Tensor

import mergekit_ace
from mergekit_ace.methods.ace import Ace
from tests.family.cases import Case, cases, drawn
from tests.reference.ace_default import share_of_large

EVERY = pytest.mark.parametrize("case", list(cases()), ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
FLOATS = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)

# Two float64 evaluations of one formula, in another order, on matrices whose condition the draws keep below 1e4.
ROUNDING = 1e-9

LAYERS = {
    "wide": (3, (6, 20), None),
    "tall": (3, (20, 6), None),
    "square": (3, (12, 12), None),
    "one row": (3, (1, 9), None),
    "one column": (3, (9, 1), None),
    "one number": (3, (1, 1), None),
    "two by two": (3, (2, 2), None),
    "rank one": (3, (10, 14), 1),
    "rank two, tall": (4, (16, 9), 2),
    "two experts": (2, (12, 8), None),
    "more experts than rows": (7, (4, 9), None),
    "more experts than columns": (7, (9, 4), None),
    "more experts than rank": (5, (8, 8), 1),
}


def error(actual: Tensor, expected: Tensor, base: Tensor) -> float:
    """Relative error of the merged task vector."""
    expected = expected.double() - base.double()
    return float((actual.double() - base.double() - expected).norm() / expected.norm())


@EVERY
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_merged(case: Case, layer: str) -> None:
    """Finite, of the base's shape, and something: no update is lost."""
    count, shape, rank = LAYERS[layer]
    base, experts = drawn(count, *shape, rank=rank)
    merged = case.merge(base, experts)
    assert merged.shape == base.shape
    assert bool(torch.isfinite(merged).all())
    updates = [float((expert - base).norm()) for expert in experts]
    assert 1e-3 * min(updates) < float((merged - base).norm()) < 10 * sum(updates)


@EVERY
@DTYPES
def test_the_output_has_the_dtype_of_the_base_and_is_rounded_once(case: Case, dtype: torch.dtype) -> None:
    base, experts = drawn(3, 10, 8, dtype=dtype)
    merged = case.merge(base, experts)
    assert merged.dtype == dtype
    precise = case.merge(base.double(), [expert.double() for expert in experts])
    # One rounding of the result, and float32 steps before it.
    torch.testing.assert_close(merged.double(), precise, rtol=torch.finfo(dtype).eps / 2, atol=2e-5)


@EVERY
@DTYPES
def test_a_frozen_layer_stays_the_base_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    base, _ = drawn(0, 7, 5, dtype=dtype)
    merged = case.merge(base, [base.clone(), base.clone()])
    assert torch.equal(merged, base)
    assert merged.data_ptr() != base.data_ptr()


@EVERY
@DTYPES
def test_one_informative_expert_is_that_expert_exactly(case: Case, dtype: torch.dtype) -> None:
    base, (alpha, beta) = drawn(2, 7, 5, dtype=dtype)
    assert torch.equal(case.merge(base, [alpha]), alpha)
    assert torch.equal(case.merge(base, [base.clone(), alpha, base.clone()]), alpha)
    assert torch.equal(case.merge(base, [alpha, beta], weights=[0, 2]), beta)


@EVERY
def test_an_expert_without_information_changes_nothing(case: Case) -> None:
    base, experts = drawn(3, 9, 12)
    expected = case.merge(base, experts)
    assert torch.equal(case.merge(base, [experts[0], base.clone(), *experts[1:]]), expected)
    assert torch.equal(case.merge(base, [*experts, 3 * experts[0]], weights=[1, 1, 1, 0]), expected)


@EVERY
def test_reduced_precision_of_products_is_refused(case: Case) -> None:
    base, experts = drawn(3, 6, 5)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="full precision"):
            case.merge(base, experts)
    finally:
        torch.set_float32_matmul_precision("highest")


@EVERY
@FLOATS
def test_what_is_not_finite_is_named_with_its_tensor(case: Case, value: float) -> None:
    base, experts = drawn(2, 6, 4)
    experts[1][3, 2] = value
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*finite.*expert beta"):
        case.merge(base, experts)
    base[0, 0] = value
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*finite.*the base"):
        case.merge(base, experts)


@EVERY
def test_inputs_are_read_through_any_view_and_never_written(case: Case) -> None:
    base, (alpha, beta, gamma) = drawn(3, 8, 6)
    views = [alpha.T.contiguous().T, beta.repeat_interleave(2, dim=1)[:, ::2], gamma[:1].expand(8, 6)]
    before = [view.clone() for view in (base, *views)]
    merged = case.merge(base, views)
    assert all(torch.equal(view, copy) for view, copy in zip((base, *views), before, strict=True))
    assert merged.data_ptr() not in [view.data_ptr() for view in (base, *views)]
    assert error(merged, case.merge(base, before[1:]), base) < ROUNDING


@EVERY
def test_parameters_of_a_module_may_be_merged(case: Case) -> None:
    base, experts = drawn(3, 8, 6)
    expected = case.merge(base, experts)
    trainable = [torch.nn.Parameter(tensor) for tensor in (base, *experts)]
    assert torch.equal(case.merge(trainable[0], trainable[1:]).detach(), expected)


@EVERY
@pytest.mark.parametrize("shape", [(9, 16), (16, 9)], ids=["wide", "tall"])
def test_the_order_of_the_experts_does_not_matter(case: Case, shape: tuple[int, int]) -> None:
    base, experts = drawn(4, *shape)
    expected = case.merge(base, experts, weights=[1, 2, 3, 4])
    assert error(case.merge(base, experts[::-1], weights=[4, 3, 2, 1]), expected, base) < ROUNDING


@EVERY
def test_permuted_outputs_permute_the_merge(case: Case) -> None:
    base, experts = drawn(3, 14, 9)
    rows = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    merged = case.merge(base[rows], [expert[rows] for expert in experts])
    assert error(merged, case.merge(base, experts)[rows], base[rows]) < ROUNDING


@EVERY
@DTYPES
def test_repeated_runs_give_the_same_bytes(case: Case, dtype: torch.dtype) -> None:
    base, experts = drawn(3, 10, 14, dtype=dtype)
    assert torch.equal(case.merge(base, experts), case.merge(base, experts))


@EVERY
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_the_size_of_the_updates_does_not_break_it(case: Case, scale: float) -> None:
    """An update of the last bits, and one that dwarfs the base."""
    base, experts = drawn(3, 10, 12, dtype=torch.float32)
    base.zero_()
    merged = case.merge(base, [scale * expert for expert in experts])
    assert bool(torch.isfinite(merged).all())
    assert 0 < float(merged.norm()) < 10 * scale * sum(float(expert.norm()) for expert in experts)


@EVERY
def test_only_the_ratios_of_weights_count(case: Case) -> None:
    base, experts = drawn(3, 10, 7)
    expected = case.merge(base, experts, weights=[1, 2, 3])
    assert error(case.merge(base, experts, weights=[10, 20, 30]), expected, base) < ROUNDING
    assert error(case.merge(base, experts, weights=[5, 5, 5]), case.merge(base, experts), base) < ROUNDING
    assert error(case.merge(base, experts), expected, base) > 1e-3


@EVERY
@pytest.mark.parametrize("weights", [[-1, 1], [math.nan, 1], [math.inf, 1], [0, 0]], ids=str)
def test_weights_must_be_finite_not_negative_and_not_all_zero(case: Case, weights: list[float]) -> None:
    base, experts = drawn(2, 6, 4)
    with pytest.raises(ValueError, match=r"parameter weight .*must be"):
        case.merge(base, experts, weights=weights)


@EVERY
def test_the_merge_is_affine_in_lambda(case: Case) -> None:
    base, experts = drawn(3, 10, 7)
    zero, one, two = (case.merge(base, experts, **{"lambda": scale}) for scale in (0, 1, 2))
    torch.testing.assert_close(two - one, one - zero, rtol=0, atol=ROUNDING)
    assert float((one - zero).norm()) > 0


@EVERY
def test_vectors_take_the_weighted_mean(case: Case) -> None:
    base, (alpha, beta) = drawn(2, 13)
    merged = case.merge(base, [alpha, beta], name="layers.0.bias", weights=[1, 3])
    torch.testing.assert_close(merged, (alpha + 3 * beta) / 4)


@EVERY
@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_embedding_tables_are_averaged_kept_or_merged(case: Case, table: str) -> None:
    base, experts = drawn(3, 12, 6)
    mean = sum(experts, torch.zeros(())) / 3
    torch.testing.assert_close(case.merge(base, experts, name=table, embeddings="average"), mean)
    assert torch.equal(case.merge(base, experts, name=table, embeddings="base"), base)
    merged = case.merge(base, experts, name=table, embeddings=case.method.name)
    assert torch.equal(merged, case.merge(base, experts))


@EVERY
@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_ace_alone_merges_heads_by_default(case: Case, table: str) -> None:
    """Without the refinement and all that concerns adapters, and averaged as far as the updates are large."""
    base, experts = drawn(3, 12, 6)
    merged = case.merge(base, experts, name=table)
    if case.method.name == "ace" and "preset" not in case.parameters and table == "lm_head.weight":
        average = case.merge(base, experts, name=table, embeddings="average")
        solve = {"spectral_fraction": 0.0, "correlation_threshold": 0.0, "length_bound": False}
        share = share_of_large([expert - base for expert in experts], [1.0] * 3, float(base.norm()))
        assert error(merged, average, base) > ROUNDING
        if "length_bound" not in case.parameters:
            expected = (1 - share) * case.merge(base, experts, **solve) + share * average
            assert error(merged, expected, base) < ROUNDING
    else:
        assert torch.equal(merged, case.merge(base, experts, name=table, embeddings="average"))


@EVERY
def test_matrices_may_be_averaged_or_kept(case: Case) -> None:
    base, experts = drawn(3, 12, 6)
    torch.testing.assert_close(case.merge(base, experts, matrices="average"), sum(experts, torch.zeros(())) / 3)
    assert torch.equal(case.merge(base, experts, matrices="base"), base)


@EVERY
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=["tall", "wide"])
def test_input_axis_first_is_the_merge_of_the_transposes(case: Case, shape: tuple[int, int]) -> None:
    base, experts = drawn(3, *shape)
    turned = case.merge(base.T.contiguous(), [expert.T.contiguous() for expert in experts], input_axis="first")
    assert error(turned.T, case.merge(base, experts), base) < ROUNDING


@EVERY
def test_stacked_experts_are_merged_slice_by_slice(case: Case) -> None:
    base, experts = drawn(2, 3, 6, 5)
    merged = case.merge(base, experts, name="mlp.experts.down_proj")
    for index in range(3):
        alone = case.merge(base[index], [expert[index] for expert in experts])
        torch.testing.assert_close(merged[index], alone)


@pytest.mark.parametrize("method", mergekit_ace.METHODS, ids=lambda method: method.name)
def test_every_parameter_says_what_it_must_be(method: object) -> None:
    case = next(case for case in cases() if case.method is method)
    base, experts = drawn(2, 6, 4)
    for parameter in case.method.parameters:
        assert parameter.description
        assert not parameter.required
        with pytest.raises(ValueError, match=f"parameter {parameter.name} must be .*; got '.*no such value'"):
            case.merge(base, experts, **{parameter.name: "no such value"})


@pytest.mark.parametrize(
    ("value", "bound", "word"),
    [("preset", "by_size", "auto"), ("auto", "by_size", "auto"), (True, True, True), (False, False, False)],
)
def test_the_retention_bound_is_what_the_recipe_says(value: object, bound: object, word: object) -> None:
    """Whatever it says of the length."""
    method = Ace()
    defaults = {item.name: item.default for item in method.parameters}
    for length, of_length in (("preset", "by_size"), (True, "orthogonal"), (False, "none")):
        given = {**defaults, "retention_bound": value, "length_bound": length}
        bounds = method.options(given).bounds
        assert bounds.retention is bound or bounds.retention == bound == "by_size"
        assert bounds.length == of_length
        assert method.settings(given)["retention_bound"] == word
    published = method.options({**defaults, "preset": "published", "retention_bound": value}).bounds.retention
    assert published == (False if value == "preset" else bound)
