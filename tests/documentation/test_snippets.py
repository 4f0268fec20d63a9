"""Every command and snippet of README and docs, run on small models under the names that the pages use."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mergekit_ace.cli import main
from mergekit_ace.recipe.reading import parse_recipe
from tests.checkpoints import add_adapter, make_suite, save_tokenizer
from tests.checkpoints.family import VOCABULARY
from tests.commands import mergekit_yaml
from tests.documentation.pages import PAGES, ROOT, Block, blocks, commands, indented_commands, links

REASONS = {
    "installs packages": "an environment of its own; tests/packaging installs the package in three ways",
    "makes environments": "`make test` runs this test; tests/demo runs the demo",
    "changes the shell": "a line for a shell's start file",
    "a benchmark": "hours of training or merging; tests/benchmarks runs the programs on tiny suites",
    "minutes of generating texts": "tests/moments runs the command with fewer texts",
    "needs a GPU": "no test machine has one; tests/device runs the paths on a pretended one",
    "needs several machines": "tests/engine runs workers and parts as processes",
    "needs models of the hub": "nothing is fetched in tests",
}
"""Why a block is not run here, and what stands for it."""
RUN_ELSEWHERE = {"docs/adding-a-method.md": "tests/family holds the example to the contract of all methods"}
LANGUAGES = {"sh", "console", "python", "yaml", "text", "bibtex", "json"}
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    suite = make_suite("llama", folder, experts=2)
    for name, found in {"maths": suite.experts[0], "code": suite.experts[1]}.items():
        found.path.rename(folder / name)
    for name in ("base", "maths", "code"):
        save_tokenizer(folder / name, VOCABULARY)
    for seed, name in enumerate(("law", "adapters/sql", "adapters/legal", "adapters/medical")):
        add_adapter(folder / "base", folder / name, rank=4, targets=["q_proj", "up_proj"], seed=seed)
    # Of the tokenizer's words, Qwen2's own class knows the special ones alone.
    lines = ["<s></s><unk>" * 3] * 8
    (folder / "code.txt").write_text("\n".join(lines))
    (folder / "maths.jsonl").write_text("\n".join(json.dumps({"prompt": line, "completion": line}) for line in lines))
    (folder / "Qwen").mkdir()
    shutil.copytree(folder / "base", folder / "Qwen" / "Qwen2.5-7B-Instruct")
    words = " ".join(f"word{index}" for index in range(40))
    (folder / "maths.jsonl").write_text("".join(f'{{"text": "{words} word{index}"}}\n' for index in range(40, 60)))
    (folder / "code.txt").write_text("".join(f"{words} word{index}\n" for index in range(60, 80)))
    (folder / "recipe.yml").write_text(first_recipe(ROOT / "docs" / "index.md"))
    return folder


def first_recipe(page: Path) -> str:
    return next(block.text for block in blocks(page) if block.language == "yaml")


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with links to the models."""
    for source in models.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_recipe(block: Block) -> bool:
    return block.language == "yaml" and block.reason is None and "merge_method" in yaml.safe_load(block.text)


def write(text: str, recipe: Path) -> None:
    """In place of the link; a recipe is understood, whether or not a command follows."""
    parse_recipe(text, recipe)
    recipe.unlink()
    recipe.write_text(text)


def run(words: Sequence[str]) -> None:
    program, *arguments = words
    if program == "mergekit-yaml":
        recipe, out, *flags = arguments
        mergekit_yaml(Path(recipe).read_text(), Path(out), *flags)
        return
    assert program == "mergekit-ace", f"mark the block `not run`, with a reason: {' '.join(words)}"
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}"


@pytest.mark.parametrize("name", NAMES)
def test_commands(name: str, place: Path) -> None:
    page = ROOT / name
    recipe = place / "recipe.yml"
    recipes = [block.text for block in blocks(page) if is_recipe(block)]
    if recipes:  # which commands above it mean, too
        write(recipes[0], recipe)
    for block in blocks(page):
        if block.reason is not None:
            continue
        if is_recipe(block):
            write(block.text, recipe)
        if block.language in ("sh", "console"):
            for words in commands(block):
                run(words)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RUN_ELSEWHERE])
def test_python(name: str, place: Path) -> None:
    for block in blocks(ROOT / name):
        if block.language == "python" and block.reason is None:
            exec(compile(block.text, name, "exec"), {})


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_known_and_reasons_listed(name: str) -> None:
    found: list[Block] = list(blocks(ROOT / name))
    assert {block.language for block in found} <= LANGUAGES
    assert {block.reason for block in found} <= {None, *REASONS}
    assert indented_commands(ROOT / name) == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    assert [target for target in links(page) if not (page.parent / target).exists()] == []
