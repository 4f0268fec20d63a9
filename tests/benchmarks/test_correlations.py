"""Agreement of estimated second moments with measured ones, on matrices small enough to work out by hand."""

import math

import pytest
import torch
from torch import nn

from benchmarks.correlations import agreements, watched
from mergekit_ace.matrix.second_moment import shrunk_ridge


def test_agreement_by_hand() -> None:
    # D^T D = diag(4, 1, 0); its cosine with diag(1, 1, 0) is 5 / (sqrt(17) sqrt(2)), the identity's 2 / sqrt(3 * 2).
    update = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    moment = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    found = agreements(update, moment)
    assert found["identity"] == pytest.approx(2 / math.sqrt(6))
    assert found["estimate"] == pytest.approx(5 / math.sqrt(34))
    shrunk = shrunk_ridge(trace=5.0, squared_norm=17.0, samples=2, dimensions=3, normalize=False)
    diagonal = torch.tensor([4.0, 1.0, 0.0]) * shrunk.scale + shrunk.ridge
    expected = float(diagonal[:2].sum() / diagonal.norm()) / math.sqrt(2)
    assert found["shrunk estimate"] == pytest.approx(expected)
    assert shrunk.ridge > 0


def test_inputs_and_output_gradients_are_summed_over_all_calls_but_for_first_tokens() -> None:
    module = nn.Linear(2, 3, bias=False)
    sums = [torch.zeros(2, 2), torch.zeros(3, 3)]
    hooks = list(watched(module, sums))
    given = [torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[[9.0, 9.0], [1.0, 2.0]]])]
    pulled = torch.tensor([1.0, -2.0, 3.0])
    for inputs in given:
        (module(inputs.requires_grad_()) * pulled).sum().backward()
    flat = torch.cat([inputs.detach()[:, 1:].flatten(0, 1) for inputs in given])
    torch.testing.assert_close(sums[0], flat.mT @ flat)
    torch.testing.assert_close(sums[1], 17 * torch.outer(pulled, pulled))
    for hook in hooks:
        hook.remove()
    module(given[0])
    torch.testing.assert_close(sums[0], flat.mT @ flat)
