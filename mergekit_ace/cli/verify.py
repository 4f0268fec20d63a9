"""`mergekit-ace verify`: a model, a part of one or an adapter, read from end to end."""

from __future__ import annotations

from pathlib import Path

import click
from rich.filesize import decimal

from mergekit_ace.cli.counts import counted
from mergekit_ace.engine.verification import verify as verify_folder
from mergekit_ace.printable import printable


@click.command("verify")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify(folder: Path) -> None:
    """Check the model in FOLDER, or a part of one, or an adapter.

    Index, names, shapes, dtypes, values, vocabulary, digests; of an adapter, keys, shapes and values. Reads every
    weight once. For models that others wrote too; what only `mergekit-ace merge` writes is checked where it is there.
    Ends with status 1 if anything is wrong.
    """
    found = verify_folder(folder)
    for problem in found.problems:
        click.echo(printable(f"error: {problem}"))
    for note in found.notes:
        click.echo(printable(f"note: {note}"))
    click.echo(
        f"{counted(found.tensors, 'tensor')}, {decimal(found.nbytes)} in {counted(found.files, 'file')}: "
        + (counted(len(found.problems), "problem") if found.problems else "nothing wrong")
    )
    if found.problems:
        raise click.exceptions.Exit(1)
