"""A base and two experts with a tokenizer, a recipe of them, and prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_ace.cli import main
from tests.checkpoints import Suite, make_suite, save_tokenizer


@dataclass(frozen=True)
class Scene:
    """What the command is given."""

    suite: Suite
    folder: Path
    recipe: Path

    def prompts(self, name: str, *, start: int = 0, lines: int = 6, words: int = 9) -> Path:
        """A file of prompts of invented words, others for another start."""
        file = self.folder / name
        text = [" ".join(f"word{(start + 7 * line + 3 * word) % 90}" for word in range(words)) for line in range(lines)]
        file.write_text("\n".join(text))
        return file

    def measure(self, *arguments: object, out: str = "moments") -> Result:
        """`mergekit-ace moments`."""
        command = ["moments", self.recipe, *arguments, "--out", self.folder / out, "--quiet"]
        return CliRunner().invoke(main, [str(argument) for argument in command])


def make_scene(folder: Path, family: str = "llama", *, method: str = "ace", **options: object) -> Scene:
    suite = make_suite(family, folder, experts=2, **options)  # type: ignore[arg-type]
    save_tokenizer(suite.base.path, 96)
    recipe = folder / "recipe.yml"
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe.write_text(yaml.safe_dump({"merge_method": method, "base_model": str(suite.base.path), "models": models}))
    return Scene(suite, folder, recipe)


Make = Callable[..., Scene]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return make_scene(tmp_path)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda family, **options: make_scene(tmp_path, family, **options)
