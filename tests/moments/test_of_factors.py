"""A full merge of adapters by measured moments is made of their factors, as the merge to an adapter is."""

import torch

from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.expert import Expert, MeasuredMoment
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.presets import ACE
from mergekit_ace.methods.tensors.matrices import Matrix
from mergekit_ace.moments.statistics import second_moment

SIDE, RANK, TOKENS = 32, 2, 12


def test_what_is_rounding_is_not_refined() -> None:
    """The rounding of stored weights and of an ill-conditioned solve has directions of its own in a full matrix."""
    draw = torch.Generator().manual_seed(3)
    base = 1000 * torch.randn(SIDE, SIDE, generator=draw)
    experts, factors = [], []
    for name in ("one", "two"):
        factor = Factors(
            left=torch.randn(SIDE, RANK, generator=draw), right=torch.randn(RANK, SIDE, generator=draw) / SIDE
        )
        scales = torch.logspace(0, -1, SIDE)
        rows = [scales * torch.randn(TOKENS, SIDE, generator=draw) for _ in range(3)]
        moment = second_moment(rows)
        measured = MeasuredMoment(factor=moment.factor, error=moment.error, tokens=moment.tokens)
        experts.append(Expert(name=name, tensor=base + factor.left @ factor.right, measured=measured))
        factors.append(factor)
    matrix = Matrix(name="x", place=(), base=base, experts=tuple(experts), factors=tuple(factors))
    space = matrix.cores()
    assert space is not None
    assert space.right is None  # the merge has rows beyond those of the updates
    merged = space.matrix(merge_by_covariance(matrix.task_vectors(space), ACE).task_vector)
    values = torch.linalg.svdvals(merged.double())
    assert int((values > 1e-5 * values[0]).sum()) == 2 * RANK
    # In a full matrix, directions that are none of the updates' are lifted to the level of the others.
    full = merge_by_covariance(matrix.task_vectors(None), ACE).task_vector.double()
    assert int((torch.linalg.svdvals(full) > 1e-5 * values[0]).sum()) > 2 * RANK
