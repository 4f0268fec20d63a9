"""The help texts, as people read them."""

import click
import pytest
from click.testing import CliRunner

from mergekit_ace.cli import main

COMMANDS = main.list_commands(click.Context(main))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_escape_sequences(command: str) -> None:
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert text.startswith(f"Usage: main {command}")
    assert "\\" not in text
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(("command", "statuses"), [("check", "012"), ("inspect", ("0", "1", "2", "130"))])
def test_help_lists_the_exit_statuses_one_a_line(command: str, statuses: tuple[str, ...]) -> None:
    section = CliRunner().invoke(main, [command, "--help"]).output.partition("Exit status:\n")[2]
    lines = [line for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
    assert [line.split()[0] for line in lines] == list(statuses)
