from __future__ import annotations

import signal

import pytest

from llmdpd.training.stopping import StopRequestedError, StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_told_when_asked(number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(StopRequestedError, match=number.name) as error:
            stop.check()
        assert error.value.exit_code == code
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before, "a second one acts"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_interrupts() -> None:
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_without_a_signal_nothing_happens_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        stop.check()
    assert signal.getsignal(signal.SIGTERM) == before
