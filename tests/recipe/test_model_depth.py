"""Over how many blocks what is noise to an expert adds up: as many as the base's configuration has."""

import json
from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference

from mergekit_ace import merge
from mergekit_ace.adapters.base_norms import BaseNorms
from mergekit_ace.adapters.merge import AdapterMerge
from mergekit_ace.adapters.request import Request
from mergekit_ace.factors.opening import open_adapter
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.methods.ace import Ace
from mergekit_ace.methods.tensors.matrices import matrices
from mergekit_ace.methods.tensors.model_depth import blocks_of, depth_of, model_in_memory
from tests.checkpoints import add_adapter, make_suite
from tests.reference.ace_default import share_of_large

# What the families' configurations call it.
NAMES = {"llama": "num_hidden_layers", "gpt2": "n_layer", "roberta": "num_hidden_layers"}


def deepened(folder: Path, family: str, depth: object) -> Path:
    """A base whose configuration has another depth than any default."""
    base = make_suite(family, folder, experts=1).base.path
    config = json.loads((base / "config.json").read_text())
    assert NAMES[family] in config
    (base / "config.json").write_text(json.dumps({**config, NAMES[family]: depth}))
    return base


@pytest.mark.parametrize("family", NAMES)
def test_the_depth_is_that_of_the_base(family: str, tmp_path: Path) -> None:
    base = deepened(tmp_path, family, 7)
    other = ModelReference.model_validate(str(tmp_path / "other"))
    assert depth_of([ModelReference.model_validate(str(base)), other]) == 7
    assert BaseNorms(str(base)).depth == 7


def test_where_the_depth_is_not_known(tmp_path: Path) -> None:
    base = deepened(tmp_path, "llama", 7)
    assert depth_of([]) is None
    assert depth_of(["base", ModelReference.model_validate(str(base))]) is None  # state dicts
    missing = ModelReference.model_validate(str(tmp_path / "missing"))
    assert depth_of([missing, ModelReference.model_validate(str(base))]) is None
    assert BaseNorms(None).depth is None
    (base / "model.safetensors").unlink()
    assert BaseNorms(str(base)).depth is None


def test_a_base_without_a_depth_has_the_blocks_of_its_tensors(tmp_path: Path) -> None:
    base = deepened(tmp_path, "llama", 0)
    blocks = blocks_of(make_suite("llama", tmp_path / "same", experts=1).base.tensors)
    assert blocks is not None
    file = base / "model.safetensors"  # as mergekit-pytorch names it
    for path in (base, file):
        assert depth_of([ModelReference.model_validate(str(path))]) == blocks
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:20])
    assert depth_of([ModelReference.model_validate(str(damaged))]) is None


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        ([f"model.layers.{block}.mlp.experts.{e}.w1.weight" for block in range(3) for e in range(8)], 3),
        (["encoder.0.a", "encoder.1.a", "decoder.0.a", "decoder.1.a", "decoder.2.a"], 3),
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.11.attn.c_attn.weight", "transformer.wte.weight"], 2),
        (["weight", "lm_head.weight"], None),
        ([], None),
    ],
)
def test_the_blocks_that_names_show(names: list[str], blocks: int | None) -> None:
    assert blocks_of(names) == blocks
    with model_in_memory(names):
        assert depth_of(["base", "expert"]) == blocks
    assert depth_of(["base", "expert"]) is None


def test_a_merge_in_memory_is_that_of_the_folders(tmp_path: Path) -> None:
    """Also of updates that are large in a model of 32 blocks, and less so in one of a few."""
    suite = make_suite("llama", tmp_path, experts=3, scale=0.02)
    of_folders = merge([str(expert.path) for expert in suite.experts], base=str(suite.base.path))
    in_memory = merge([expert.tensors for expert in suite.experts], base=suite.base.tensors)
    sizes = [t.merge.decision.large for t in in_memory.report.tensors if t.merge and t.merge.decision]
    assert 0.01 < min(sizes) < 0.9
    name = "model.layers.0.self_attn.q_proj.weight"
    (report,) = (tensor for tensor in in_memory.report.tensors if tensor.name == name)
    assert report.merge is not None
    assert report.merge.decision is not None
    base, *experts = (model.tensors[name].double() for model in (suite.base, *suite.experts))
    depth = blocks_of(suite.base.tensors)
    assert depth is not None
    expected = share_of_large([expert - base for expert in experts], [1.0] * 3, float(base.norm()), depth)
    assert report.merge.decision.large == pytest.approx(expected, rel=1e-4)
    for name, weight in in_memory.weights.items():
        assert torch.equal(of_folders.weights[name], weight), name
    assert sizes == [t.merge.decision.large for t in of_folders.report.tensors if t.merge and t.merge.decision]


def test_adapters_are_merged_at_the_depth_of_their_base(tmp_path: Path) -> None:
    base = deepened(tmp_path, "llama", 7)
    adapters = tuple(
        open_adapter(add_adapter(base, tmp_path / f"a{t}", rank=2, targets=["q_proj"], seed=t)) for t in range(2)
    )
    request = Request(adapters=adapters, method=Ace(), own=[{"weight": 1.0}] * 2, base=str(base))
    (place, *_) = request.places.values()
    (cores,) = AdapterMerge(request).cores(place, request.parameters(place.weight), solved=True)
    assert cores.task_vectors.depth == 7


def test_a_matrix_and_its_cores_have_one_depth() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        Factors(left=torch.randn(6, 2, generator=generator), right=torch.randn(2, 5, generator=generator))
        for _ in range(2)
    ]
    base = torch.randn(6, 5, generator=generator)
    experts = [Expert(name=str(t), tensor=base + each.left @ each.right) for t, each in enumerate(factors)]
    (matrix,) = matrices("q_proj.weight", base, experts, {"input_axis": "last"}, factors, 7)
    assert matrix.task_vectors(None).depth == 7
    assert matrix.task_vectors(matrix.cores()).depth == 7
