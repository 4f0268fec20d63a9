"""Each method against its literal formula in float64 (`tests/reference`), over shapes, ranks, weights and dtypes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

import mergekit_ace
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.presets import ACTMAT, WUDI
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from tests.family.cases import drawn
from tests.reference import actmat, cart, iso_c, iso_cts, tsv_m, wudi_adam, wudi_closed_form, wudi_flow

mergekit_ace.register()

# float64 steps in another order, through Gram matrices whose condition is the square of that of the draws (up to 1e3).
FLOAT64_TOLERANCE = 1e-9
# The literal float32 steps' own error varies by this much with the order of their sums.
FLOAT32_FACTOR = 2.0
# Rounding of float32 inputs (6e-8), times the condition of a small problem's polar factors and solves.
FLOAT32_ON_LOW_RANK = 1e-4

EPSILON = 1e-3


class Reference(Protocol):
    """A literal formula, on task vectors."""

    def __call__(self, D: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Formula:
    """A method as a recipe asks for it, and what it must compute."""

    method: str
    parameters: dict[str, Any]
    reference: Reference


def _wudi_ridges(D: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    """Divided by the trace, as the second moments are; of the experts that take part."""
    kept = [d for t, d in enumerate(D) if weights is None or weights[t] > 0]
    return [EPSILON / float(d.double().square().sum()) for d in kept]


def _rank(D: Sequence[Tensor], fraction: float) -> int:
    return max(1, int(fraction * min(D[0].shape)))


FORMULAS = {
    "actmat": Formula(
        "actmat", {"epsilon": EPSILON}, lambda D, weights, dtype: actmat(D, EPSILON, weights, dtype=dtype)
    ),
    "wudi": Formula(
        "wudi",
        {"epsilon": EPSILON},
        lambda D, weights, dtype: wudi_closed_form(D, _wudi_ridges(D, weights), weights, dtype=dtype),
    ),
    "wudi by Adam": Formula(
        "wudi",
        {"solver": "adam", "steps": 50, "learning_rate": 1e-3},
        lambda D, weights, dtype: wudi_adam(D, 50, 1e-3, weights, dtype=dtype),
    ),
    "wudi by its flow": Formula(
        "wudi", {"solver": "flow"}, lambda D, weights, dtype: wudi_flow(D, 300.0, "sum", weights, dtype=dtype)
    ),
    "wudi by its flow, briefly from the mean": Formula(
        "wudi",
        {"solver": "flow", "flow_time": 5, "start": "average"},
        lambda D, weights, dtype: wudi_flow(D, 5.0, "average", weights, dtype=dtype),
    ),
    "tsv_m": Formula("tsv_m", {}, lambda D, weights, dtype: tsv_m(D, weights, dtype=dtype)),
    "iso_c": Formula("iso_c", {}, lambda D, weights, dtype: iso_c(D, weights, dtype=dtype)),
    "iso_c, all": Formula(
        "iso_c", {"mean_over": "all"}, lambda D, weights, dtype: iso_c(D, weights, dtype=dtype, mean_over="all")
    ),
    "iso_cts, all": Formula(
        "iso_cts",
        {"mean_over": "all"},
        lambda D, weights, dtype: iso_cts(D, 0.8, weights, dtype=dtype, mean_over="all"),
    ),
    "iso_cts": Formula("iso_cts", {}, lambda D, weights, dtype: iso_cts(D, 0.8, weights, dtype=dtype)),
    "iso_cts, half": Formula(
        "iso_cts", {"common_fraction": 0.5}, lambda D, weights, dtype: iso_cts(D, 0.5, weights, dtype=dtype)
    ),
    "cart": Formula("cart", {}, lambda D, weights, dtype: cart(D, _rank(D, 0.08), 1.0, weights, dtype=dtype)),
    "cart, a third, tripled": Formula(
        "cart",
        {"rank_fraction": 1 / 3, "lambda": 3},
        lambda D, weights, dtype: cart(D, _rank(D, 1 / 3), 3.0, weights, dtype=dtype),
    ),
}

EVERY = pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
# The last is wide enough for symmetric products to be made in blocks.
SHAPES = pytest.mark.parametrize(
    "shape",
    [(12, 40), (40, 12), (24, 24), (16, 1), (2, 2), (3, 64), (130, 90), (20, 400)],
    ids=lambda shape: "x".join(map(str, shape)),
)


def merged(formula: Formula, base: Tensor, experts: Sequence[Tensor], **parameters: Any) -> Tensor:
    """The merged task vector, float64."""
    parameters = {**formula.parameters, **parameters}
    result = merge_tensors([base, *experts], formula.method, base_index=0, name="weight", parameters=parameters)
    return result.double() - base.double()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@EVERY
@SHAPES
@pytest.mark.parametrize("count", [3, 5])
def test_float64(formula: Formula, shape: tuple[int, int], count: int) -> None:
    base, experts = drawn(count, *shape)
    expected = formula.reference([expert - base for expert in experts], None, torch.float64)
    assert error(merged(formula, base, experts), expected) < FLOAT64_TOLERANCE


@EVERY
@SHAPES
def test_weights(formula: Formula, shape: tuple[int, int]) -> None:
    """Normalized over the experts that are left: the second one has weight 0."""
    base, experts = drawn(4, *shape)
    weights = [1.0, 0.0, 2.0, 4.0]
    expected = formula.reference([expert - base for expert in experts], weights, torch.float64)
    assert error(merged(formula, base, experts, weight=weights), expected) < FLOAT64_TOLERANCE


@EVERY
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=["wide", "tall"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_updates_of_low_rank(formula: Formula, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    """More directions are asked for than an expert has; those that do not exist take no part."""
    base, experts = drawn(3, *shape, rank=rank)
    updates = [expert - base for expert in experts]
    expected = formula.reference(updates, None, torch.float64)
    zero = torch.zeros(shape, dtype=dtype)
    tolerance = FLOAT64_TOLERANCE
    if dtype == torch.float32:
        # Of low rank to within their rounding, which must not be taken for directions; the literal solves lose more.
        literal = error(formula.reference(updates, None, dtype).double(), expected)
        tolerance = max(FLOAT32_ON_LOW_RANK, FLOAT32_FACTOR * literal)
    assert error(merged(formula, zero, [update.to(dtype) for update in updates]), expected) < tolerance


@EVERY
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("count", [3, 8])
def test_float32_loses_no_more_than_the_literal_steps(formula: Formula, shape: tuple[int, int], count: int) -> None:
    base, experts = drawn(count, *shape, dtype=torch.float32)
    updates = [expert.double() - base.double() for expert in experts]
    expected = formula.reference(updates, None, torch.float64)
    literal = error(formula.reference(updates, None, torch.float32).double(), expected)
    rounding = float(base.norm() / expected.norm()) * torch.finfo(torch.float32).eps  # of base + task vector
    assert error(merged(formula, base, experts), expected) < FLOAT32_FACTOR * literal + rounding


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_one_rounding(formula: Formula, dtype: torch.dtype) -> None:
    base, experts = drawn(3, 24, 32, dtype=dtype)
    expected = base.double() + formula.reference([e.double() - base.double() for e in experts], None, torch.float64)
    actual = merged(formula, base, experts) + base.double()
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)


@pytest.mark.parametrize("method", ["actmat", "wudi"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)], ids=["wide", "tall"])
def test_the_automatic_ridge_solves_the_regularized_equations(method: str, shape: tuple[int, int]) -> None:
    """`X sum_t a_t Sbar_t = sum_t a_t D_t Sbar_t`, with each expert's scale and ridge as the merge reports them."""
    base, experts = drawn(3, *shape)
    weights = [1.0, 2.0, 3.0]
    named = [Expert(name=str(t), tensor=e, weight=w) for t, (e, w) in enumerate(zip(experts, weights, strict=True))]
    layer = merge_by_covariance(StoredTaskVectors(base, named), {"actmat": ACTMAT, "wudi": WUDI}[method])
    D = [expert - base for expert in experts]
    identity = torch.eye(shape[1], dtype=torch.float64)
    S = [r.scale * d.T @ d + r.ridge * identity for d, r in zip(D, layer.moments, strict=True)]
    assert all(r.ridge > 0 for r in layer.moments)
    if method == "wudi":
        for s in S:  # trace normalization: shrinkage keeps the trace at 1
            assert float(s.trace()) == pytest.approx(1)
    left = layer.task_vector @ sum(w * s for w, s in zip(weights, S, strict=True))
    right = sum(w * (d @ s) for w, d, s in zip(weights, D, S, strict=True))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
    result = merge_tensors([base, *experts], method, base_index=0, parameters={"weight": weights})
    torch.testing.assert_close(result - base, layer.task_vector)


def test_adam_moves_from_the_sum_towards_the_minimizer() -> None:
    base, experts = drawn(3, 12, 10)
    updates = [expert - base for expert in experts]
    minimizer = wudi_closed_form(updates)
    distances = []
    for steps in (0, 30, 1000):
        parameters = {"solver": "adam", "steps": steps, "learning_rate": 1e-3}
        result = merge_tensors([base, *experts], "wudi", base_index=0, parameters=parameters) - base
        if steps == 0:
            torch.testing.assert_close(result, sum(updates, torch.zeros(())))
        distances.append(float((result - minimizer).norm()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.2 * distances[0]


def test_the_flow_leads_from_its_start_to_the_minimizer_and_follows_the_unit() -> None:
    base, experts = drawn(3, 12, 10)
    updates = [expert - base for expert in experts]

    def after(time: float, unit: float = 1.0, **parameters: Any) -> Tensor:
        given = [torch.zeros_like(base), *(unit * update for update in updates)]
        parameters = {"solver": "flow", "flow_time": time, **parameters}
        return merge_tensors(given, "wudi", base_index=0, parameters=parameters) / unit

    torch.testing.assert_close(after(1e-12), sum(updates, torch.zeros(())))
    torch.testing.assert_close(after(1e-12, start="average"), sum(updates, torch.zeros(())) / 3)
    torch.testing.assert_close(after(1e9), wudi_closed_form(updates))
    torch.testing.assert_close(after(1e9, start="average"), wudi_closed_form(updates))
    torch.testing.assert_close(after(30.0, unit=1e-4), after(30.0))
    # No step of Euler's may be needed to be near: 3000 of them are.
    step, position = 30.0 / 3000, sum(updates, torch.zeros_like(base))
    for _ in range(3000):
        slope = sum(((position - d) @ d.mT @ d / d.square().sum() for d in updates), torch.zeros_like(base))
        position = position - step * slope
    torch.testing.assert_close(after(30.0), position, rtol=0, atol=2e-3 * float(position.abs().max()))


@pytest.mark.parametrize("method", ["actmat", "wudi", "tsv_m"])
def test_experts_that_do_not_meet_are_added_up(method: str) -> None:
    """Orthogonal inputs and outputs: there is no interference, so nothing to trade."""
    first, second = torch.zeros(2, 8, 8, dtype=torch.float64)
    first[:4, :4], second[4:, 4:] = torch.randn(2, 4, 4, dtype=torch.float64)
    base = torch.randn(8, 8, dtype=torch.float64)
    parameters = {} if method == "tsv_m" else {"epsilon": 1e-12}
    result = merge_tensors([base, base + first, base + second], method, base_index=0, parameters=parameters)
    torch.testing.assert_close(result, base + first + second)


@pytest.mark.parametrize("common_fraction", [0.0, 0.5, 1.0])
def test_isotropic_results_are_isotropic(common_fraction: float) -> None:
    base, experts = drawn(4, 10, 20)
    parameters = {"common_fraction": common_fraction}
    update = merge_tensors([base, *experts], "iso_cts", base_index=0, parameters=parameters) - base
    values = torch.linalg.svdvals(update)
    kept = {0.0: 8, 0.5: 9, 1.0: 10}[common_fraction]  # 4 experts share what the common part leaves of 10, evenly
    torch.testing.assert_close(values[:kept], values[0].expand(kept))
    assert float(values[kept:].sum()) < 1e-9 * float(values[0])
    if common_fraction == 1:
        iso_c = merge_tensors([base, *experts], "iso_c", base_index=0) - base
        torch.testing.assert_close(update, iso_c)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_directions_that_no_adapter_has_do_not_shorten_an_isotropic_merge(name: str) -> None:
    base, experts = drawn(3, 60, 48, rank=4)
    lengths = {}
    for mean_over in ("existing", "all"):
        update = merge_tensors([base, *experts], name, base_index=0, parameters={"mean_over": mean_over}) - base
        values = torch.linalg.svdvals(update)
        kept = int((values > 1e-6 * values[0]).sum())
        lengths[mean_over] = float(update.norm())
        if name == "iso_c":
            assert kept == 12
    total = torch.linalg.svdvals(sum((expert - base for expert in experts), torch.zeros(())))
    # The level is the mean of twelve values, or of all 48.
    assert lengths["existing"] > 3.5 * lengths["all"]
    if name == "iso_c":
        assert lengths["existing"] == pytest.approx(float(total.sum()) / 12 * 12**0.5, rel=1e-6)


def test_cart_lambda_scales_the_deviations_and_not_the_average() -> None:
    base, experts = drawn(3, 12, 9)
    mean = sum(experts, torch.zeros(())) / 3
    for parameters in ({"lambda": 0}, {"rank_fraction": 0}, {"rank_fraction": 1, "lambda": 5}):
        torch.testing.assert_close(merge_tensors([base, *experts], "cart", base_index=0, parameters=parameters), mean)
    # Vectors and layers of one expert have no deviations.
    doubled = {"lambda": 2}
    assert torch.equal(merge_tensors([base, experts[0]], "cart", base_index=0, parameters=doubled), experts[0])
    bias, biases = drawn(2, 5)
    merged_bias = merge_tensors([bias, *biases], "cart", base_index=0, parameters=doubled)
    torch.testing.assert_close(merged_bias, (biases[0] + biases[1]) / 2)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=["tall", "wide"])
def test_the_rounding_of_stored_weights_is_no_direction(name: str, shape: tuple[int, int]) -> None:
    """Adapters merged into float32 weights: what the addition rounds is of full rank, and above 1e-5 of the update."""
    base, experts = drawn(3, *shape, rank=2)
    updates = [1e-4 * (expert - base) for expert in experts]
    stored = base.float()
    merged_update = merged(FORMULAS[name], stored, [(stored.double() + update).float() for update in updates])
    expected = FORMULAS[name].reference(updates, None, torch.float64)
    noise = torch.linalg.matrix_norm((stored.double() + updates[0]).float().double() - stored - updates[0], 2)
    assert float(noise) > 1e-5 * float(torch.linalg.matrix_norm(updates[0], 2))
    # Rounded once more when the result is stored.
    assert error(merged_update, expected) < 1e-2
