"""How commands end when they fail: one message, and the exit status that people expect.

0: done. 1: it failed, and a message names the reason (`-v` adds the traceback). 2: the command line is wrong. 128 + N:
stopped by signal N, as a shell reports it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import click

from mergekit_ace.printable import printable
from mergekit_ace.recipe.failures import message_of

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asks the process to end. No `Exception`, so that no `except Exception` on the way ends it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def reported(*, traceback: bool = False) -> Iterator[None]:
    """Turn what the block raises into one message and an exit status, after the block has cleaned up.

    Args:
        traceback: Let exceptions through instead, for people who asked for details.
    """
    try:
        with _stoppable():
            yield
    except Stopped as stopped:
        click.echo(f"Stopped by {signal.Signals(stopped.number).name}; no model was written.", err=True)
        raise click.exceptions.Exit(128 + stopped.number) from None
    except click.ClickException:
        raise
    except Exception as error:
        if traceback:
            raise
        raise click.ClickException(printable(describe(error))) from error


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Raise `Stopped` where a signal would end the process unreported; leave alone what is ignored or handled."""
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in handlers.items():
        if handler in defaults:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler in defaults:
                signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for again in _SIGNALS:  # cleaning up takes a moment, and should not be stopped half-way
        signal.signal(again, signal.SIG_IGN)
    raise Stopped(number)


def describe(error: BaseException) -> str:
    """Return an exception's message, for people."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    return message_of(error)
