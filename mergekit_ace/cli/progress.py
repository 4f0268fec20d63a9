"""A merge as people and machines see it: a progress line, a log of JSON lines, a summary."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mergekit_ace.cli.counts import counted
from mergekit_ace.engine.driver import Outcome
from mergekit_ace.engine.dry_run import DryRun
from mergekit_ace.engine.events import Event, Noted, Planned, ShardMade, TensorMade, Warned, Watcher
from mergekit_ace.printable import printable

_MOST_FILES = 12


@contextlib.contextmanager
def progress_line(*, quiet: bool) -> Iterator[Watcher]:
    """One line for all workers, by cost, on a terminal; sentences and other processes' warnings anywhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    costs: dict[str, float] = {}
    elsewhere = False
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("planning", total=None)

        def watch(event: Event) -> None:
            nonlocal elsewhere
            if isinstance(event, Planned):
                elsewhere = event.elsewhere
                for shard in event.todo:
                    costs.update(zip((tensor.name for tensor in shard.tensors), shard.costs, strict=True))
                words = f"{counted(len(event.todo), 'file')} by {event.workers}"
                progress.update(task, description=words, total=sum(costs.values()))
                if event.taken:
                    click.echo(_taken(event), err=True)
            elif isinstance(event, TensorMade):
                progress.advance(task, costs.get(event.name, 0.0))
            elif isinstance(event, Noted):
                click.echo(printable(event.text), err=True)
            elif isinstance(event, Warned) and elsewhere:  # our own log has shown those of this process
                click.echo(f"WARNING: {printable(event.notice.text)}", err=True)

        yield watch


def _taken(event: Planned) -> str:
    names = sorted(receipt.file for receipt in event.taken)
    shown = ", ".join(names[:_MOST_FILES]) + (f" and {len(names) - _MOST_FILES} more" if names[_MOST_FILES:] else "")
    return f"Going on with {counted(len(names), 'finished file')}: {shown}; {len(event.todo)} are to be made."


@contextlib.contextmanager
def json_log(file: Path) -> Iterator[Watcher]:
    """Every event as a line of JSON; `-` is the standard output."""
    with contextlib.ExitStack() as stack:
        stream: TextIO = (
            sys.stdout if str(file) == "-" else stack.enter_context(file.open("w", encoding="utf-8", buffering=1))
        )

        def watch(event: Event) -> None:
            _write(stream, **_fields(event))

        yield watch


def log_end(file: Path, **content: Any) -> None:
    """Add the last line of a log."""
    if str(file) == "-":
        _write(sys.stdout, **content)
        return
    with file.open("a", encoding="utf-8") as stream:
        _write(stream, **content)


def _write(stream: TextIO, **content: Any) -> None:
    stream.write(json.dumps({"time": round(time.time(), 3), **content}) + "\n")
    stream.flush()


def _fields(event: Event) -> dict[str, Any]:
    if isinstance(event, Planned):
        return {
            "event": "planned",
            "workers": event.workers,
            "todo": [shard.file for shard in event.todo],
            "taken": [receipt.file for receipt in event.taken],
            "cost": round(sum(shard.cost for shard in event.todo), 3),
            "bytes": sum(shard.nbytes for shard in event.todo),
        }
    if isinstance(event, TensorMade):
        return {"event": "tensor", "name": event.name, "seconds": round(event.seconds, 4)}
    if isinstance(event, ShardMade):
        receipt = event.receipt
        return {
            "event": "file",
            "file": receipt.file,
            "tensors": len(receipt.tensors),
            "seconds": receipt.seconds,
            "reading_seconds": receipt.reading,
            "writing_seconds": receipt.writing,
            "host": receipt.maker.host,
            "sha256": receipt.sha256,
        }
    if isinstance(event, Noted):
        return {"event": "note", "text": event.text}
    return {"event": "warning", "cause": event.notice.cause, "text": event.notice.text}


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """The last line of a log of a merge that is done."""
    return {
        "event": "done",
        "out": str(outcome.out),
        "tensors": outcome.tensors,
        "bytes": outcome.nbytes,
        "files": outcome.files,
        "taken": outcome.taken,
        "treatments": outcome.treatments,
        "warnings": [notice.text for notice in outcome.warnings],
        "seconds": round(outcome.seconds, 3),
        "work_seconds": round(outcome.work, 3),
        "reading_seconds": round(outcome.reading, 3),
        "writing_seconds": round(outcome.writing, 3),
    }


def summary(outcome: Outcome) -> str:
    """A finished merge for people."""
    duration = str(datetime.timedelta(seconds=round(outcome.seconds)))
    kinds = ", ".join(f"{count} {_TREATMENTS[kind]}" for kind, count in sorted(outcome.treatments.items()))
    what = "a part of a model" if outcome.is_part else "a model"
    taken = f", {outcome.taken} of them from an earlier run" if outcome.taken else ""
    lines = [
        f"{outcome.out}: {what}, {decimal(outcome.nbytes)} in {counted(outcome.files, 'file')}{taken}",
        f"{counted(outcome.tensors, 'tensor')}{f' ({kinds})' if kinds and not outcome.is_part else ''} in {duration}",
    ]
    if outcome.work:
        waited = f"{outcome.reading:.1f} s for inputs and {outcome.writing:.1f} s for output to be written"
        lines.append(f"workers waited {waited}, of {outcome.work:.1f} s in all")
    if outcome.warnings:
        lines.append(f"{counted(len(outcome.warnings), 'warning')}:")
        lines += [f"  {notice.text}" for notice in outcome.warnings]
    lines.append(
        "Next: mergekit-ace join OUT_PATH with all parts"
        if outcome.is_part
        else f"Next: mergekit-ace verify {outcome.out}"
    )
    return printable("\n".join(lines))


_TREATMENTS = {
    "matrix": "merged as matrices",
    "stack": "merged as stacks of matrices",
    "head": "merged as output heads",
    "average": "averaged",
    "base": "taken from the base",
    "buffer": "copied",
}


def plan_text(run: DryRun) -> str:
    """A dry run for people."""
    total = sum(shard.cost for shard in run.shards) or 1.0
    rows = [
        f"  {shard.file}  {decimal(shard.nbytes):>9}  {len(shard.tensors):>4} tensors  "
        f"{shard.cost / total:>4.0%} of the work  reads {counted(len(shard.reads), 'file')}"
        for shard in run.shards
    ]
    part = f" of part {run.part.index}/{run.part.count}" if run.part else ""
    return printable(
        "\n".join(
            [
                f"{counted(len(run.shards), 'file')}{part}:",
                *rows,
                f"reads {decimal(run.read)}, writes {decimal(run.written)}",
                f"memory: about {decimal(run.memory)} a worker, {decimal(run.least_memory)} where --memory "
                "keeps it from reading ahead (estimates)",
            ]
        )
    )
