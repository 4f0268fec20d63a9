"""A union tokenizer numbers its tokens alike in every process, so that parts made in several fit together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.checkpoints import edit_tensors, make_suite, read_tensors, save_tokenizer
from tests.cli.conftest import Invoke
from tests.cli.test_merge import files

ADDED = (
    tuple(f"<left{index}>" for index in range(7)),
    (*(f"<right{index}>" for index in range(5)), "<left3>"),
)
WORDS = 85


def _write(folder: Path) -> Path:
    suite = make_suite("llama", folder / "models", experts=2)
    save_tokenizer(suite.base.path, WORDS)
    for expert, added in zip(suite.experts, ADDED, strict=True):
        save_tokenizer(expert.path, WORDS, added=added)
        with edit_tensors(expert.path / "model.safetensors") as tensors:
            for row in range(WORDS, WORDS + len(added)):  # rows of added tokens, told apart by their values
                tensors["lm_head.weight"][row] = row + 1000.0
                tensors["model.embed_tokens.weight"][row] = row + 2000.0
    recipe = folder / "recipe.yml"
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe.write_text(
        yaml.safe_dump(
            {
                "merge_method": "task_arithmetic",
                "base_model": str(suite.base.path),
                "models": models,
                "parameters": {"weight": 0.5},
                "tokenizer": {"source": "union"},
            }
        )
    )
    return recipe


def _run(seed: int, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "mergekit_ace", *map(str, arguments)],
        env={**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )


def test_parts_of_several_processes_join_to_the_unsplit_merge(tmp_path: Path, invoke: Invoke) -> None:
    recipe = _write(tmp_path)
    options = ("--quiet", "--out-shard-size", "15K")
    for part in (1, 2):
        _run(part, "merge", recipe, tmp_path / f"part{part}", "--part", f"{part}/2", *options)
    joined = tmp_path / "joined" / "model"
    result = invoke("join", joined, tmp_path / "part1", tmp_path / "part2")
    assert result.exit_code == 0, result.output
    assert invoke("merge", recipe, tmp_path / "whole" / "model", *options).exit_code == 0
    assert files(joined) == files(tmp_path / "whole" / "model")
    # Every row is that of its token: rows of both tables agree with the tokenizer.
    tokenizer, tensors = transformers.AutoTokenizer.from_pretrained(joined), read_tensors(joined)
    assert len(tokenizer) == WORDS + 12
    for token in ADDED[0][:3] + ADDED[1][:5]:
        number = tokenizer.convert_tokens_to_ids(token)
        row = WORDS + (ADDED[0].index(token) if token in ADDED[0] else ADDED[1].index(token))
        assert torch.all(tensors["lm_head.weight"][number] == row + 1000.0), token
        assert torch.all(tensors["model.embed_tokens.weight"][number] == row + 2000.0), token


@pytest.mark.parametrize("source", ["union", "base"])
def test_the_plan_knows_the_size_of_the_tables(source: str, tmp_path: Path) -> None:
    from mergekit.options import MergeOptions

    from mergekit_ace.recipe.planning import planned
    from mergekit_ace.recipe.reading import read_recipe

    recipe = _write(tmp_path)
    document = yaml.safe_load(recipe.read_text())
    document["tokenizer"] = {"source": source, "pad_to_multiple_of": 16}
    recipe.write_text(yaml.safe_dump(document))
    with planned(read_recipe(recipe), MergeOptions()) as plan:
        shapes = {tensor.name: tensor.output.shape for tensor in plan.tensors if tensor.output}
    assert shapes["lm_head.weight"][0] == (112 if source == "union" else 96)
