"""The names that the package offers, and its answer to a method of the same name that is not ours."""

import pytest
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from torch import Tensor

import mergekit_ace


def first(group: TensorGroup) -> Tensor:
    return group.entries[0].tensor


def test_a_method_of_the_same_name_that_is_not_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = merge_method(first, name="ace", pretty_name="Somebody's ACE")
    monkeypatch.setattr(registry, "_METHODS", {"ace": foreign})
    with pytest.raises(ValueError, match="'ace', which mergekit knows as Somebody's ACE"):
        mergekit_ace.register()
    assert registry.registered_methods() == (foreign,)


def test_public_names_are_there_and_no_others() -> None:
    from mergekit_ace.methods import METHODS

    assert mergekit_ace.METHODS is METHODS
    assert set(mergekit_ace.__all__) <= set(dir(mergekit_ace))
    assert all(hasattr(mergekit_ace, name) for name in mergekit_ace.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mergekit_ace.nothing  # noqa: B018
