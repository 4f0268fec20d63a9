"""The precision that a recipe's parameters ask for."""

import pytest

from mergekit_ace.methods.ace import Ace


@pytest.mark.parametrize(("scale", "expected"), [(0.5, "auto"), (1.0, "auto"), (1.5, "full"), (-2.0, "full")])
def test_a_scale_above_one_is_no_part_of_the_budget_of_errors(scale: float, expected: str) -> None:
    method = Ace()
    parameters = {item.name: item.default for item in method.parameters} | {"lambda": scale}
    assert method.options(parameters).precision == expected
