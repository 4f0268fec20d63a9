"""Which models have an output head that is tied to their token table."""

from pathlib import Path

import pytest
from mergekit.common import ModelReference

from mergekit_ace.methods.tensors.output_head import heads_of
from tests.checkpoints import add_adapter, make_suite


def reference(path: Path) -> ModelReference:
    return ModelReference.model_validate(str(path))


@pytest.mark.parametrize(
    ("family", "heads"), [("llama", "named"), ("llama-tied", "tied"), ("gpt2", "tied"), ("roberta", "named")]
)
def test_by_the_base_s_configuration(family: str, heads: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, experts=1)
    models = [reference(suite.base.path), reference(suite.experts[0].path)]
    assert heads_of(models) == heads
    assert heads_of(["base", "expert"]) == "named"  # state dicts tell nothing of what is tied


def test_tables_of_adapters_are_averaged(tmp_path: Path) -> None:
    suite = make_suite("llama-tied", tmp_path, experts=1)
    adapter = add_adapter(suite.base.path, tmp_path / "adapter", rank=2, targets=["q_proj"])
    base = reference(suite.base.path)
    assert heads_of([base, reference(suite.experts[0].path)]) == "tied"
    assert heads_of([base, ModelReference.model_validate(f"{suite.base.path}+{adapter}")]) == "none"
    assert heads_of([]) == "named"
