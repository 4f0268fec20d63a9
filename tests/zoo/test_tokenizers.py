"""Vocabularies that differ: mergekit aligns them, the tables are then merged like any other."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from tests.checkpoints import Suite, make_suite, read_tensors, save_tokenizer
from tests.checkpoints.decoders import TABLES
from tests.checkpoints.family import VOCABULARY
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import assert_merged, assert_tensor, recipe_for, reference_for
from tests.zoo.forward import load_and_run

ADDED = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """The second expert has two tokens more than the others, and rows for eight."""
    suite = make_suite("llama", tmp_path, experts=2)
    wider = transformers.AutoModelForCausalLM.from_pretrained(suite.experts[1].path)
    wider.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    wider.save_pretrained(tmp_path / "wider")
    for folder in (suite.base.path, suite.experts[0].path):
        save_tokenizer(folder, VOCABULARY)
    save_tokenizer(tmp_path / "wider", VOCABULARY, added=ADDED)
    experts = [suite.experts[0], Checkpoint(tmp_path / "wider", read_tensors(tmp_path / "wider"))]
    return Suite(suite.family, suite.base, experts, suite.updates)


def assert_everything_but_tables(merged: dict[str, torch.Tensor], suite: Suite) -> None:
    rest = {name: tensor for name, tensor in merged.items() if name not in TABLES}
    assert_merged(rest, suite.base, suite.experts, reference_for(suite.family), torch.float64)


def inputs(suite: Suite, name: str) -> list[torch.Tensor]:
    """The rows that all three share."""
    return [c.tensors[name][:VOCABULARY].double() for c in (suite.base, *suite.experts)]


def test_without_alignment_the_error_names_the_table_and_the_remedy(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head).*tokenizer"):
        mergekit_yaml(recipe_for(suite), tmp_path / "out")


@pytest.mark.parametrize("embeddings", ["average", "base", "ace"])
def test_base(embeddings: str, suite: Suite, tmp_path: Path) -> None:
    """The base's vocabulary: the expert's own tokens are dropped."""
    recipe = {**recipe_for(suite, dtype="float64", embeddings=embeddings), "tokenizer": {"source": "base"}}
    out = mergekit_yaml(recipe, tmp_path / "out")
    merged = read_tensors(out)
    assert_everything_but_tables(merged, suite)
    for name in TABLES:
        assert_tensor(name, merged[name], inputs(suite, name), reference_for(suite.family, embeddings=embeddings))
    assert len(AutoTokenizer.from_pretrained(out)) == VOCABULARY
    load_and_run(suite.family, out)


def test_union(suite: Suite, tmp_path: Path) -> None:
    """A token that one expert alone has starts from its row in every model, so averaging keeps it."""
    recipe = {**recipe_for(suite, dtype="float64"), "tokenizer": {"source": "union"}}
    out = mergekit_yaml(recipe, tmp_path / "out")
    merged = read_tensors(out)
    assert_everything_but_tables(merged, suite)
    for name in TABLES:
        table = merged[name]
        assert table.shape == (VOCABULARY + 2, 32)
        assert_tensor(name, table[:VOCABULARY], inputs(suite, name), reference_for(suite.family))
        own = suite.experts[1].tensors[name][VOCABULARY : VOCABULARY + 2].double()
        torch.testing.assert_close(table[VOCABULARY:], own)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(ADDED) == [VOCABULARY, VOCABULARY + 1]
    load_and_run(suite.family, out)


def test_settings_of_one_token(suite: Suite, tmp_path: Path) -> None:
    """A token forced to one expert's row, one to zeros, one to another token's row."""
    expert = str(suite.experts[0].path)
    settings = {
        "word5": {"source": expert, "force": True},
        ADDED[0]: {"source": {"kind": "zero"}, "force": True},
        ADDED[1]: {"source": {"kind": "model_token", "model": expert, "token": "word7"}, "force": True},
    }
    recipe = {
        **recipe_for(suite, dtype="float64"),
        "tokenizer": {"source": "union", "tokens": settings, "pad_to_multiple_of": 16},
    }
    out = mergekit_yaml(recipe, tmp_path / "out")
    words = AutoTokenizer.from_pretrained(out).get_vocab()
    merged = read_tensors(out)
    for name in TABLES:
        theirs = suite.experts[0].tensors[name].double()
        assert merged[name].shape == (112, 32)
        torch.testing.assert_close(merged[name][words["word5"]], theirs[words["word5"]])
        assert not merged[name][words[ADDED[0]]].any()
        torch.testing.assert_close(merged[name][words[ADDED[1]]], theirs[words["word7"]])
    load_and_run(suite.family, out)
