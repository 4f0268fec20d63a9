"""How large an update is for its weight: by the base's weights where they are at hand, otherwise small."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ace import merge_adapters
from mergekit_ace.adapters.base_norms import BaseNorms
from mergekit_ace.factors.model import Place
from mergekit_ace.factors.opening import open_adapter
from mergekit_ace.factors.tensors import AdapterError
from tests.checkpoints import Suite, add_adapter, make_suite
from tests.reference.ace_default import balanced, without_moments

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("suite"), experts=1)


@pytest.fixture(scope="module")
def adapters(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """About a tenth as large as their base, or more."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        add_adapter(suite.base.path, folder / f"a{t}", rank=1, targets=["q_proj"], seed=t, scale=0.05) for t in range(2)
    ]


def q_proj(folder: Path) -> Tensor:
    """The update, of exactly its factors' rank: a product in float32 would be of full rank by its rounding."""
    factors = open_adapter(folder).updates[NAME].read()
    return factors.left.double() @ factors.right.double()


def base_without_weights(suite: Suite, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(suite.base.path / "config.json", folder)
    return folder


def test_large_updates_are_averaged_where_the_base_is_at_hand(
    suite: Suite, adapters: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updates = [q_proj(folder) for folder in adapters]
    norm = float(suite.base.tensors[NAME].double().norm())
    parameters = {"correlation_threshold": 1.0}  # none of them correlates so much
    merge_adapters(adapters, base=str(suite.base.path), parameters=parameters, out=tmp_path / "known")
    assert "count as small" not in caplog.text
    known = q_proj(tmp_path / "known")
    torch.testing.assert_close(known, without_moments(updates, [1.0, 1.0], norm), atol=1e-5, rtol=1e-4)
    away = base_without_weights(suite, tmp_path / suite.base.path.name)
    caplog.clear()
    merge_adapters(adapters, base=str(away), parameters=parameters, out=tmp_path / "unknown")
    (record,) = (record for record in caplog.records if "count as small" in record.getMessage())
    assert str(away) in record.getMessage()
    unknown = q_proj(tmp_path / "unknown")
    torch.testing.assert_close(unknown, balanced(updates, [1.0, 1.0]), atol=1e-5, rtol=1e-4)
    assert float((known - unknown).norm()) > 0.2 * float(unknown.norm())


def test_a_method_that_does_not_ask_reads_no_base(adapters: list[Path], suite: Suite, tmp_path: Path) -> None:
    damaged = base_without_weights(suite, tmp_path / suite.base.path.name)
    (damaged / "model.safetensors").write_bytes(b"\x00" * 16)
    for options in ({"method": "tsv_m"}, {"parameters": {"preset": "0.1"}}):
        merge_adapters(adapters, base=str(damaged), out=tmp_path / "out", overwrite=True, **options)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"must be readable for their norms.*Repair the model"):
        merge_adapters(adapters, base=str(damaged), out=tmp_path / "out", overwrite=True)


def test_of_whole_and_stacked_weights(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]),
        "experts.weight": torch.stack([torch.ones(2, 2), 2 * torch.ones(2, 2)]),
        "packed.weight": torch.ones(3, 2, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    norms = BaseNorms(str(tmp_path))
    assert norms.of(Place(module="a", kind="linear", shape=(3, 2))) == 5
    assert norms.of(Place(module="a", kind="linear", shape=(2, 3), transposed=True)) == 5
    stack = Place(module="experts", kind="stack", shape=(2, 2, 2))
    assert [norms.of(stack, index) for index in range(2)] == [2, 4]
    for unknown in (
        Place(module="a", kind="linear", shape=(2, 3)),
        Place(module="b", kind="linear", shape=(3, 2)),
        Place(module="packed", kind="linear", shape=(3, 2)),
    ):
        assert norms.of(unknown) is None
    assert BaseNorms(None).of(stack, 0) is None
    assert BaseNorms("an-owner/a-model").of(stack, 0) is None


@pytest.mark.parametrize("complete", [True, False])
def test_a_base_in_the_cache_of_the_hub(complete: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--an-owner--a-model"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    files = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name, file in list(files.items())[: 2 if complete else 1]:
        save_file({name: torch.ones(2, 2)}, snapshot / file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    norms = BaseNorms("an-owner/a-model")
    assert norms.known is complete
    assert norms.of(Place(module="a", kind="linear", shape=(2, 2))) == (2 if complete else None)
