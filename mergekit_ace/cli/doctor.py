"""`mergekit-ace doctor`: versions, the startup hook, devices and precision of this installation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import click
from rich.console import Console
from rich.text import Text

from mergekit_ace.installation import Fact, examine
from mergekit_ace.printable import printable

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, for a bug report")
def doctor(as_json: bool) -> None:
    """Show whether merges work on this machine: versions, the startup hook, devices, precision.

    Ends with status 1 if something keeps merges from working.
    """
    facts = list(examine())
    if as_json:
        click.echo(json.dumps([asdict(fact) for fact in facts], indent=2))
    else:
        _show(facts, Console(highlight=False))
    if any(fact.level == "error" for fact in facts):
        raise click.exceptions.Exit(1)


def _show(facts: Sequence[Fact], console: Console) -> None:
    for topic, group in groupby(facts, key=lambda fact: fact.topic):
        console.print(Text(topic, style="bold"))
        listed = list(group)
        width = max(len(fact.name) for fact in listed)
        for fact in listed:
            line = Text(f"  {fact.level:<7}  ", style=_COLOURS[fact.level])
            line.append(f"{fact.name:<{width}}  {printable(fact.value)}", style="not bold default")
            console.print(line, soft_wrap=True)
            if fact.remedy:
                console.print(Text(f"{'':<11}{fact.remedy}", style="dim"), soft_wrap=True)
    bad = sum(fact.level != "ok" for fact in facts)
    console.print(f"{bad} of {len(facts)} need attention." if bad else "Merges work here.")
