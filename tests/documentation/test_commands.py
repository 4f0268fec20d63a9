"""The page of commands names every command, and every option that is not mergekit's."""

import re

import click
import pytest
from mergekit.options import add_merge_options

from mergekit_ace.cli import main
from tests.documentation.pages import ROOT

PAGE = (ROOT / "docs" / "commands.md").read_text()


@click.command()
@add_merge_options
def _mergekit_yaml(**options: object) -> None:
    """A command with mergekit's options alone."""


THEIRS = {option for parameter in _mergekit_yaml.params for option in parameter.opts}
COMMANDS = main.list_commands(click.Context(main))


def section(name: str) -> str:
    found = re.search(rf"^## (?:\w+, )*{name}(?:, \w+)*$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return found[1] if found else ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_the_page_and_no_other(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert re.search(rf"^\| `{name}[ `]", PAGE, re.M), "no row in the first table"
    own = [p for p in command.params if isinstance(p, click.Option) and not THEIRS & {*p.opts}]
    options = {option for parameter in own for option in (*parameter.opts, *parameter.secondary_opts)}
    rows = [row for row in section(name).splitlines() if row.startswith(("| `", "`"))]
    named = {option for row in rows for option in re.findall(r"`(--[a-z-]+)", row.rpartition("| ")[0] or row)}
    assert named | {"--out-shard-size"} == options | {"--out-shard-size"}
