"""mergekit's commands, run as a person would run them, in this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.scripts.merge_raw_pytorch import main as pytorch_command
from mergekit.scripts.multimerge import main as multi_command
from mergekit.scripts.run_yaml import main as yaml_command

import mergekit_ace

Document = Mapping[str, Any]

mergekit_ace.register()  # a no-op where the startup hook has run


def mergekit_yaml(recipe: Document | str, out: Path, *flags: str) -> Path:
    """`mergekit-yaml RECIPE OUT`; returns the output folder."""
    return _run(yaml_command, [_written(recipe, out), str(out), *_quiet(flags)], out)


def mergekit_pytorch(recipe: Document | str, out: Path, *flags: str) -> Path:
    """`mergekit-pytorch RECIPE OUT`; returns the output folder."""
    return _run(pytorch_command, [_written(recipe, out), str(out), *flags], out)


def mergekit_multi(recipes: Sequence[Document] | str, out: Path, *flags: str) -> Path:
    """`mergekit-multi RECIPES --out-path OUT`, intermediate merges beside it; returns the output folder."""
    between = out.with_name(out.name + "-between")
    arguments = [_written(recipes, out), "--out-path", str(out), "-I", str(between), *_quiet(flags)]
    return _run(multi_command, arguments, out)


def _run(command: click.Command, arguments: Sequence[str], out: Path) -> Path:
    command.main(list(arguments), standalone_mode=False)
    return out


def _quiet(flags: Sequence[str]) -> list[str]:
    return [*flags] if "--copy-tokenizer" in flags else ["--no-copy-tokenizer", *flags]


def _written(recipe: Document | Sequence[Document] | str, out: Path) -> str:
    """The recipe as a file beside the output."""
    file = out.with_name(out.name + ".yml")
    if isinstance(recipe, str):
        file.write_text(recipe)
    elif isinstance(recipe, Mapping):
        file.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    else:
        file.write_text(yaml.safe_dump_all([dict(document) for document in recipe], sort_keys=False))
    return str(file)
