from __future__ import annotations

import signal

import pytest

from llmdpd.errors import StopRequestedError
from llmdpd.training.stopping import StopSignals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_told_when_asked(number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignals() as stop:
        assert all(signal.getsignal(n) != handler for n, handler in zip(SIGNALS, before, strict=True))
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(StopRequestedError, match=number.name) as error:
            stop.check()
        assert error.value.exit_code == code
        assert [signal.getsignal(n) for n in SIGNALS] == before, "a second one acts"
    with StopSignals():
        pass
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_second_ctrl_c_interrupts() -> None:
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
