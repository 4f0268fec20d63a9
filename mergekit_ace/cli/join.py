"""`mergekit-ace join`: the parts of a merge become one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mergekit_ace.cli.failures import reported
from mergekit_ace.cli.sizes import ShardSize
from mergekit_ace.engine import joining
from mergekit_ace.staging import staged


@click.command("join")
@click.argument("out_path", type=click.Path(path_type=Path))
@click.argument("parts", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a model in OUT_PATH, once the new one is whole")
@click.option(
    "--out-shard-size",
    type=ShardSize(),
    help="Number of bytes per output file  [default: as in the parts, whose files are then linked and not copied]",
)
@click.option("-v", "verbosity", count=True, help="Show the traceback of an error")
def join(out_path: Path, parts: Sequence[Path], overwrite: bool, out_shard_size: int | None, verbosity: int) -> None:
    """Write to OUT_PATH the model whose tensors are in the folders PARTS, made by `mergekit-ace merge --part`.

    Nothing is written unless the parts come from the same recipe, options, inputs and versions, every tensor is in one
    of them and in one only, and their files are as they were written.
    """
    with reported(traceback=verbosity > 0):
        manifests = joining.verify(parts)
        kinds = joining.makers(manifests)
        if len(kinds) > 1:
            click.echo(
                f"The parts were made by machines of several kinds ({'; '.join(kinds)}): the joined model may differ "
                "in rounding from one that was made by a single machine.",
                err=True,
            )
        with staged(out_path, overwrite=overwrite, inputs=parts) as folder:
            joining.write(parts, manifests, folder, out_shard_size)
