"""Rows of embedding tables that a tokenizer source asks of models that lack them: named before the merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_ace.cli import main
from tests.checkpoints import Suite, Update, edit_tensors, make_suite, save_tokenizer
from tests.checks.test_check import edit_config
from tests.report.recipes import document, write

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Three models of 96 tokens; the first expert has `<a>` too."""
    suite = make_suite("llama", tmp_path / "models", experts=2, update=Update.EVEN, scale=0.05)
    for model in (suite.base, *suite.experts):
        save_tokenizer(model.path, 96)
    resize(suite.experts[0].path, 97)
    save_tokenizer(suite.experts[0].path, 96, added=["<a>"])
    return suite


def resize(model: Path, rows: int) -> None:
    with edit_tensors(model / "model.safetensors") as tensors:
        for name in TABLES:
            tensors[name] = torch.cat([tensors[name], torch.ones(1, tensors[name].shape[1])])[:rows]
    edit_config(model, vocab_size=rows)


def run(command: str, suite: Suite, tmp_path: Path, tokenizer: dict[str, Any]) -> tuple[int, str]:
    recipe = write(document(suite, tokenizer=tokenizer), tmp_path / "recipe.yml")
    out = [str(tmp_path / "out")] if command == "merge" else []
    result = CliRunner().invoke(main, [command, str(recipe), *out])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["check", "merge"])
def test_a_table_shorter_than_its_tokenizer(command: str, suite: Suite, tmp_path: Path) -> None:
    expert = suite.experts[1].path
    resize(expert, 94)
    status, output = run(command, suite, tmp_path, {"source": "union"})
    assert status == 1
    assert f"{expert} has 94 rows in {TABLES[0]}, and its tokenizer has 'word91', 'word92' beyond them" in output
    assert "resize_token_embeddings" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["check", "merge"])
@pytest.mark.parametrize(
    ("token", "expert", "words"),
    [
        ("<a>", None, "takes its row from {1}, whose tokenizer has no token '<a>'"),
        ("<new>", None, "takes its row from {1}, whose tokenizer has no token '<new>'"),
        ("<a>", {"token": "<b>"}, "takes its row from {1}, whose tokenizer has no token '<b>'"),
        ("<a>", {"token_id": 96}, "takes row 96 of {1}, which has 96 rows in model.embed_tokens.weight"),
    ],
)
def test_a_token_whose_source_lacks_it(
    token: str, expert: dict[str, Any] | None, words: str, command: str, suite: Suite, tmp_path: Path
) -> None:
    folders = [str(expert.path) for expert in suite.experts]
    source = folders[1] if expert is None else {"kind": "model_token", "model": folders[1], **expert}
    status, output = run(command, suite, tmp_path, {"source": "union", "tokens": {token: {"source": source}}})
    assert status == 1
    assert f"tokenizer.tokens: {token} {words.format(*folders)}" in output
    assert (f"Take it from {folders[0]}, which has it." in output) == (token == "<a>" and expert is None)
    assert not (tmp_path / "out").exists()


def test_sources_that_have_the_row_are_merged(suite: Suite, tmp_path: Path) -> None:
    entries = {
        "<a>": {"source": str(suite.experts[0].path)},
        "<zero>": {"source": {"kind": "zero"}},
        "<copy>": {"source": {"kind": "model_token", "model": str(suite.base.path), "token": "word5"}},
        # All have it, so that no row is asked for.
        "word3": {"source": {"kind": "model_token", "model": str(suite.base.path), "token": "<none>"}},
    }
    status, output = run("check", suite, tmp_path, {"source": "union", "tokens": entries})
    assert status == 0, output
    status, output = run("merge", suite, tmp_path, {"source": "union", "tokens": entries})
    assert status == 0, output
    merged = load_file(tmp_path / "out" / "model.safetensors")[TABLES[0]]
    assert merged.shape[0] == 99
    assert torch.equal(merged[96], torch.ones(32))
