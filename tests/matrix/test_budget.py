"""The error of merged 16-bit weights before they are rounded, against the same merge in float64.

Literal steps hold that one: `tests/reference`, which knows nothing of storage formats and their rounding.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix.budget import SHARE_OF_ROUNDING, error_budget
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.linalg.matrices import of_spectrum

SHAPES = [(160, 160), (320, 128), (128, 320), (96, 512)]
# Relative to the base: of real fine-tunes of a language model, of an encoder, and ten times that.
SIZES = [0.001, 0.01, 0.1]
SPECTRA = {
    "of a fine-tune": lambda x, r: (1 + 77 * x) ** -0.8,
    "steep": lambda x, r: (1 + x * r) ** -1.5,
}


def task_vectors(shape: tuple[int, int], size: float, spectrum: str, dtype: torch.dtype, count: int = 3) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
    rank = min(shape)
    values = SPECTRA[spectrum](torch.arange(rank, dtype=torch.float64) / rank, rank)
    experts = []
    for t in range(count):
        update = of_spectrum(*shape, values, seed=t)
        update *= (1 + t / 2) * size * base.norm() / update.norm()
        experts.append(Expert(name=str(t), tensor=(base + update).to(dtype)))
    return StoredTaskVectors(base.to(dtype), experts)


def error_and_rounding(vectors: TaskVectors, merged: Tensor, options: CovarianceOptions = ACE) -> tuple[float, float]:
    base = vectors.base.double()
    experts = [replace(expert, tensor=expert.tensor.double()) for expert in vectors.experts]
    exact = merge_by_covariance(StoredTaskVectors(base, experts), options).task_vector
    rounded = (base + exact).to(vectors.base.dtype).double()
    return float((merged.double() - exact).norm()), float((rounded - base - exact).norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_within_an_eighth_of_the_rounding(
    shape: tuple[int, int], size: float, spectrum: str, dtype: torch.dtype
) -> None:
    vectors = task_vectors(shape, size, spectrum, dtype)
    merged = merge_by_covariance(vectors, ACE).task_vector
    error, rounding = error_and_rounding(vectors, merged)
    assert error <= SHARE_OF_ROUNDING * rounding
    assert 0.5 * rounding <= error_budget(vectors, "auto") / SHARE_OF_ROUNDING <= 1.05 * rounding


def test_a_fine_tune_is_refined_in_float32_where_its_weights_have_16_bits() -> None:
    merged = {
        dtype: merge_by_covariance(task_vectors((160, 160), 0.01, "of a fine-tune", dtype), ACE)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    assert {dtype: merge.eigendecomposition for dtype, merge in merged.items()} == {
        torch.bfloat16: "float32",
        torch.float32: "float64",
        torch.float64: "float64",
    }
    assert "refined by" in merged[torch.bfloat16].describe()
    assert "in float32" in merged[torch.bfloat16].describe()


@pytest.mark.parametrize("options", [replace(ACE, precision="full"), replace(ACE_PUBLISHED, gate=None)])
def test_full_precision_and_the_published_cut_are_taken_in_float64(options) -> None:  # type: ignore[no-untyped-def]
    vectors = task_vectors((160, 160), 0.01, "of a fine-tune", torch.bfloat16)
    assert error_budget(vectors, options.precision) == 0
    assert merge_by_covariance(vectors, options).eigendecomposition == "float64"


def test_a_common_factor_of_everything_changes_no_choice() -> None:
    vectors = task_vectors((160, 160), 0.01, "of a fine-tune", torch.bfloat16)
    budget = error_budget(vectors, "auto")
    larger = StoredTaskVectors(vectors.base * 8, [replace(e, tensor=e.tensor * 8) for e in vectors.experts])
    assert error_budget(larger, "auto") == pytest.approx(8 * budget)
