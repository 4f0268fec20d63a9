"""The help texts, as people read them."""

import os
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("command", "statuses"),
    [
        ("check", "012"),
        ("inspect", ("0", "1", "2", "130")),
        ("merge", ("0", "1", "2", "130")),
        ("moments", ("0", "1", "2", "130")),
    ],
)
def test_help_lists_the_exit_statuses_one_a_line(command: str, statuses: tuple[str, ...]) -> None:
    section = CliRunner().invoke(main, [command, "--help"]).output.partition("Exit status:\n")[2]
    lines = [line for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
    assert [line.split()[0] for line in lines] == list(statuses)


_COMPLETED = """
import sys
from mergekit_ace.cli import main
try:
    main(prog_name="mergekit-ace")
finally:
    print("imported:", *sorted({"torch", "mergekit", "transformers"} & set(sys.modules)))
"""


def completed(words: str) -> list[str]:
    """What bash is given for the last word, and which slow packages were imported for it."""
    asked = {
        "_MERGEKIT_ACE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    run = subprocess.run(
        [sys.executable, "-c", _COMPLETED], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    return run.stdout.splitlines()


def test_commands_are_completed_without_importing_them() -> None:
    assert completed("mergekit-ace ") == [*(f"plain,{name}" for name in COMMANDS), "imported:"]
    assert completed("mergekit-ace m") == ["plain,merge", "plain,moments", "plain,methods", "imported:"]


def test_options_are_completed() -> None:
    assert "plain,--fast" in completed("mergekit-ace inspect --f")
    assert "plain,--version" in completed("mergekit-ace --v")
