"""Output folders that are whole or not there.

A folder `OUT` is written as `OUT.partial/new/OUT`, beside it, and renamed at the end. A run holds a lock on
`OUT.partial/lock` for as long as it runs; what a run that was killed has left behind is removed by the next one for
the same target. A folder that is replaced stays whole until its successor is, as `OUT.partial/previous` for the moment
between the two renames; should a run end in that moment, the next one puts it back.

A merge of hours is made in pieces, and each that is finished leaves a receipt in `OUT.partial/receipts`. While there
is one, nothing is removed that the next run could go on with.

The lock is `flock` itself: the lock file lies in a folder that goes away with it, which filelock does not allow for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

LOG = logging.getLogger("mergekit_ace")

# Files that tell a model, or a part of one, from a folder that somebody needs: only the former may be replaced.
_OURS = ("config.json", "part.json", "adapter_config.json", "merge_report.json")

_REMOVAL_ATTEMPTS = 5


RECEIPTS = "receipts"


@dataclass(frozen=True)
class Stage:
    """Where a run writes."""

    folder: Path
    """What becomes the output folder; it has its name."""
    receipts: Path
    """Where finished pieces leave their receipts."""


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool = False, inputs: Collection[Path] = ()) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `target` if the block ends well, and vanishes if it does not.

    Args:
        target: The output folder; new or empty, unless `overwrite`.
        overwrite: Replace a model, or a part of one, that is there already, once the new one is whole.
        inputs: Files and folders that the block reads, which the target must not hold.

    Raises:
        FileExistsError: The target is not empty and may not be replaced, or is no folder, or an unfinished merge lies
            beside it.
        BlockingIOError: Another process is writing to the target.
        ValueError: The target is a mount point, or one of the inputs is the target or lies within.
    """
    with staged_in_pieces(target, overwrite=overwrite, inputs=inputs) as stage:
        yield stage.folder


@contextlib.contextmanager
def staged_in_pieces(
    target: Path, *, overwrite: bool = False, inputs: Collection[Path] = (), resume: bool | None = None
) -> Iterator[Stage]:
    """As `staged`, for a folder that is made in pieces: a block that ends badly keeps those that have a receipt.

    Args:
        target: As in `staged`.
        overwrite: As in `staged`.
        inputs: As in `staged`.
        resume: What to do with the pieces that an earlier run left: go on with them (True), remove them (False), or
            raise (None).

    Raises:
        FileExistsError, BlockingIOError, ValueError: As in `staged`.
    """
    target = target.resolve()
    partial = target.with_name(target.name + ".partial")
    with _locked(partial, target):
        _recover(partial, target, resume)
        _check(target, overwrite, inputs)
        stage = Stage(folder=partial / "new" / target.name, receipts=partial / RECEIPTS)
        stage.folder.mkdir(parents=True, exist_ok=True)
        yield stage
        _synchronize(stage.folder)
        # Again, for what may have come to be there during a merge of hours.
        _check(target, overwrite, inputs)
        _publish(stage.folder, target, partial / "previous")
        _remove(stage.receipts)


def _check(target: Path, overwrite: bool, inputs: Collection[Path]) -> None:
    if os.path.ismount(target):
        raise ValueError(
            f"output folder must not be a mount point, for it is put in place by a rename; got {target}. "
            "Give a folder inside it"
        )
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise ValueError(f"output folder must not hold what the merge reads; got {target}, which holds {path}")
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"output folder must be new or an empty folder; got {target}, which is a file")
    names = sorted(entry.name for entry in target.iterdir())
    if not names:
        return
    if not overwrite:
        raise FileExistsError(
            f"output folder must be new or empty; got {target}, which holds {names[0]}. "
            "Pass --overwrite (in Python overwrite=True) to replace it once the merge is done"
        )
    if not any(name in _OURS for name in names):
        raise FileExistsError(
            f"output folder to overwrite must hold a model ({' or '.join(_OURS)}); got {target}, which does not"
        )


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    lock = partial / "lock"
    try:
        descriptor = _acquire(lock, target)
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: its writer runs
            partial.rmdir()
        raise
    try:
        yield
    finally:
        if (partial / "new" / target.name).exists() and (pieces := _pieces(partial)):
            LOG.warning("Kept %d finished shards in %s; --resume goes on with them.", pieces, partial)
        else:
            _remove(partial / "new")
            _remove(partial / RECEIPTS)
        # Its predecessor stays in `previous` only if it could not be put back: then it is not ours to remove.
        with contextlib.suppress(OSError):
            lock.unlink()
            partial.rmdir()
        os.close(descriptor)


def _acquire(lock: Path, target: Path) -> int:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run that held it has just ended, and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed, by the run that held it, between opening and locking.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BlockingIOError(f"output folder must have one writer; got {target}, written by {holder}") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _recover(partial: Path, target: Path, resume: bool | None) -> None:
    """Undo what a run that was killed has left behind, but for what may be gone on with."""
    previous = partial / "previous"
    if previous.exists():
        if target.exists():
            _remove(previous)
        else:
            LOG.warning("Putting %s back, which a run that was killed had moved aside.", target)
            previous.rename(target)
    unfinished = (partial / "new" / target.name).exists()
    if unfinished and (pieces := _pieces(partial)) and resume is not False:
        if resume is None:
            raise FileExistsError(
                f"output folder must not be half made; got {target}, of which an earlier run left {pieces} shards in "
                f"{partial}. Pass --resume to go on with them, or --no-resume to start over"
            )
        return
    if (partial / "new").exists():
        LOG.warning("Removing %s, left behind by a run that was killed.", partial / "new")
        _remove(partial / "new")
    _remove(partial / RECEIPTS)


def _pieces(partial: Path) -> int:
    """How many finished pieces have a receipt."""
    return len(list((partial / RECEIPTS).glob("*.json")))


def _publish(new: Path, target: Path, previous: Path) -> None:
    replaces = target.is_dir() and any(target.iterdir())
    if replaces:
        target.rename(previous)
    try:
        new.rename(target)
    except BaseException:
        if replaces:
            previous.rename(target)
        raise
    _synchronize_entry(target.parent)
    _remove(previous)


def _synchronize(folder: Path) -> None:
    """Have everything on the disk before the rename is: else a power cut could leave a whole folder of empty files."""
    for directory, _, files in os.walk(folder):
        for name in files:
            _synchronize_entry(Path(directory, name))
        _synchronize_entry(Path(directory))


def _synchronize_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    for _ in range(_REMOVAL_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)  # a thread of mergekit's may still be writing its last shard
    LOG.warning("Could not remove %s; it is safe to delete.", folder)
