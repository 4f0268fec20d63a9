"""Tensors in files, as mergekit fills them, and files in parts: disjoint, complete, balanced."""

import fnmatch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.io import TensorWriter

from mergekit_ace.engine.part import Part
from mergekit_ace.engine.shards import OutputTensor, Shard, arranged, default_shard_size, grouped, of_part
from mergekit_ace.recipe.patterns import select_names


def tensors(sizes: list[int]) -> list[OutputTensor]:
    return [
        OutputTensor(name=f"layer.{index}.weight", dtype="uint8", shape=(size,)) for index, size in enumerate(sizes)
    ]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_files_are_filled_as_mergekit_fills_them(sizes: list[int], shard_size: int) -> None:
    groups: list[list[str]] = []

    class Noting(TensorWriter):
        def _write_shard_task(self, shard_data: dict[str, torch.Tensor], shard_index: int, shard_path: str) -> None:
            groups.append(list(shard_data))

    writer = Noting(".", max_shard_size=shard_size)
    for tensor in tensors(sizes):
        writer.save_tensor(tensor.name, torch.zeros(tensor.shape, dtype=torch.uint8))
    writer._flush_current_shard()
    assert [[tensor.name for tensor in group] for group in grouped(tensors(sizes), shard_size)] == groups


@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 20))
def test_every_file_is_in_one_part_and_parts_are_balanced(costs: list[float], count: int) -> None:
    shards = [Shard(file=f"model-{index:05d}", tensors=(), costs=(cost,), reads=()) for index, cost in enumerate(costs)]
    parts = [of_part(shards, Part(index=index, count=count)) for index in range(1, count + 1)]
    assert sorted(shard.file for part in parts for shard in part) == [shard.file for shard in shards]
    loads = [sum(shard.cost for shard in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def test_a_file_of_which_nothing_is_there_is_left_out() -> None:
    assert list(arranged(tensors([10, 10, 10]), 10, {"layer.1.weight"})) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert list(arranged(tensors([10]), 10, safetensors=False)) == ["pytorch_model.bin"]


def test_the_number_of_files_follows_from_the_size_of_the_model() -> None:
    assert default_shard_size(10**6) == 256_000_000
    assert default_shard_size(16 * 10**9) == 500_000_000
    assert default_shard_size(10**12) == 5_000_000_000


def test_patterns_select_by_name() -> None:
    names = [tensor.name for tensor in tensors([1] * 12)]
    assert select_names(names, ["layer.1*.weight"]) == set(fnmatch.filter(names, "layer.1*.weight"))
    assert select_names(names, []) == set(names)
    with pytest.raises(ValueError, match=r"got 'Layer.0.*', which matches none of 12, such as layer.0.weight"):
        select_names(names, ["layer.1.*", "Layer.0.*"])


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/2", "-1/2", "1/0", "a/b", "1.5/2", "1/2/3"])
def test_a_part_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="part must be I/N"):
        Part.parse(text)
