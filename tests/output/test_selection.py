"""Parts of a merge: disjoint, complete, balanced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ace.output.selection import Part, PlannedTensor, select


def planned(sizes: list[int]) -> list[PlannedTensor]:
    return [PlannedTensor(name=f"layer.{index}.weight", nbytes=size) for index, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 1 << 40), max_size=60), st.integers(1, 20))
def test_every_tensor_is_in_one_part_and_parts_are_balanced(sizes: list[int], count: int) -> None:
    tensors = planned(sizes)
    parts = [select(tensors, part=Part(index=index, count=count)) for index in range(1, count + 1)]
    assert [tensor for part in parts for tensor in part] == tensors
    mean = sum(sizes) / count
    for part in parts:
        # Tensors of no known size count as one byte.
        assert sum(tensor.nbytes for tensor in part) <= mean + max(sizes, default=0) + len(sizes)


def test_patterns_select_by_name_and_parts_divide_what_they_select() -> None:
    tensors = planned([10] * 12)
    assert [tensor.name for tensor in select(tensors, ["layer.1*.weight"])] == [
        f"layer.{index}.weight" for index in (1, 10, 11)
    ]
    assert [t.name for t in select(tensors, ["layer.1*", "layer.0.*"], Part(index=1, count=2))] == [
        "layer.0.weight",
        "layer.1.weight",
    ]


def test_a_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got 'Layer.0.*', which matches none of 3, such as layer.0.weight"):
        select(planned([1, 2, 3]), ["layer.1.*", "Layer.0.*"])


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/2", "-1/2", "1/0", "a/b", "1.5/2", "1/2/3"])
def test_a_part_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="part must be I/N"):
        Part.parse(text)
