"""How commands end: exit statuses and messages."""

import os
import signal

import click
import pytest

from mergekit_ace.cli.failures import describe, reported
from mergekit_ace.printable import printable


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("epsilon must be positive; got -1"), "epsilon must be positive; got -1"),
        (KeyError("model.norm.weight"), "KeyError: 'model.norm.weight'"),
        (
            OSError(28, "No space left on device", "out/model.safetensors"),
            "No space left on device: out/model.safetensors",
        ),
        (MemoryError(), "out of memory"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_an_error_says_what_it_knows(error: Exception, message: str) -> None:
    assert describe(error) == message
    with pytest.raises(click.ClickException) as raised, reported():
        raise error
    assert raised.value.message == message
    assert raised.value.exit_code == 1


def test_names_cannot_steer_the_terminal() -> None:
    assert printable("tensor \x1b[2J\x07é\u202e\nnext") == "tensor \\x1b[2J\\x07é\\u202e\nnext"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_become_exit_statuses(number: signal.Signals, status: int) -> None:
    # A suite started in the background, or by nohup, inherits signals that are ignored.
    inherited = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(click.exceptions.Exit) as raised, reported():
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 5)  # where the handler runs
        assert raised.value.exit_code == status
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, inherited)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with reported():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_with_a_traceback_the_error_itself_comes_through() -> None:
    with pytest.raises(KeyError), reported(traceback=True):
        raise KeyError("name")
