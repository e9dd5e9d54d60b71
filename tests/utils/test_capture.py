"""What a CUDA graph can't hold is found before a capture."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmdpd.utils.capture import CaptureError, CudaGraphs, watch
from tests.recorded_device import Device


def draws() -> None:
    torch.rand(())


def waits() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=2)


@pytest.mark.parametrize(("act", "reason"), [(draws, "random numbers on the host"), (waits, "waits for the device")])
def test_watching_tells_what_a_graph_cannot_hold(act: Callable[[], None], reason: str) -> None:
    def work() -> dict[str, Tensor]:
        act()
        return {}

    found = watch(work)[1]
    assert found is not None
    assert reason in found


def test_watching_keeps_results_and_other_warnings() -> None:
    def warns() -> dict[str, Tensor]:
        warnings.warn("something else", stacklevel=2)
        return {"x": torch.ones(())}

    with pytest.warns(UserWarning, match="something else"):
        assert watch(warns) == ({"x": torch.ones(())}, None)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_what_is_recorded_is_replayed(device: Device) -> None:
    given = torch.ones(3)
    replay, found = CudaGraphs(torch.device("cuda")).capture(lambda: 2.0 * given)
    given.fill_(5.0)
    replay()
    assert found.tolist() == [10.0] * 3


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("no\nmore"), CaptureError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_capture_that_breaks_off_leaves_generators_and_pool_as_new(
    device: Device, error: BaseException, raised: type[BaseException]
) -> None:
    graphs = CudaGraphs(torch.device("cuda"))

    def work() -> Tensor:
        assert device.generator.state == -1
        raise error

    with pytest.raises(raised):
        graphs.capture(work)
    assert (device.generator.state, graphs._pool) == (0, 2)


@pytest.mark.parametrize("first", ["watch", "run", "capture"])
def test_one_thread_of_a_process_captures_or_watches_at_a_time(device: Device, first: str) -> None:
    one, other = (CudaGraphs(torch.device("cuda")) for _ in range(2))
    acts: dict[str, Callable[[Callable[[], Tensor]], object]] = {"watch": watch, "run": one.run, "capture": one.capture}
    entered, began, together = threading.Event(), threading.Event(), []
    filters, show = warnings.filters, warnings.showwarning

    def work() -> Tensor:
        entered.set()
        together.append(began.wait(0.05))
        return torch.ones(1)

    def late(act: Callable[[Callable[[], Tensor]], object]) -> None:
        entered.wait()
        act(lambda: (began.set(), torch.ones(1))[1])  # type: ignore[func-returns-value]

    threads = [threading.Thread(target=acts[first], args=[work])]
    threads += [threading.Thread(target=late, args=[act]) for act in (watch, other.run, other.capture)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [False]
    assert began.is_set()
    assert warnings.filters is filters
    assert warnings.showwarning is show
