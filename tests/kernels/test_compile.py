"""Compilation ahead of time, for devices that are not here: registers, spills and shared memory of every tile."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from llmdpd import kernels

if kernels.interpreted():
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from llmdpd.kernels import report, tiles


@pytest.mark.slow
@pytest.mark.parametrize("capability", report.TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("actions", [4, 32])
def test_nothing_spills_at_width_256(capability: int, direction: str, bf16: bool, actions: int) -> None:
    for rows, launch in report.launches(256, actions, direction, bf16, capability):
        taken = report.usage(launch, capability)
        assert taken.stack == 0, (rows, launch.constants, taken)
        assert 0 < taken.registers <= 255
        assert taken.shared <= report.SHARED[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", report.TARGETS)
@pytest.mark.parametrize("H", [64, 512])
def test_other_widths_compile(capability: int, H: int) -> None:
    for direction in ("forward", "backward"):
        for bf16 in (False, True):
            for _, launch in report.launches(H, 4, direction, bf16, capability):
                assert report.usage(launch, capability).shared <= report.SHARED[capability]


@pytest.mark.slow
def test_a_device_with_less_shared_memory() -> None:
    for direction in ("forward", "backward"):
        for _, launch in report.launches(256, 4, direction, True, 89):
            assert report.usage(launch, 89).shared <= 99 << 10


@pytest.mark.slow
def test_a_spill_is_seen() -> None:
    """The naive way that the tiles are there to avoid: a whole product at once."""
    _, launch = next(report.launches(256, 4, "forward", True, 90))
    launch.constants.update(BM=128, BK=64, BN=128)
    assert report.usage(launch, 90).stack > 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_tile_fits_its_tensors(direction: str, bf16: bool) -> None:
    for H in (1, 33, 64, 65, 128, 250, 256, 300, 512):
        for A in (1, 4, 9, 17, 32):
            for rows in (1, 2048, 2049, 4096, 4097, 10**6):
                for capability in (80, 86, 89, 90, 100, 120):
                    if direction == "forward":
                        tile = tiles.forward_tile(rows, H, A, bf16, capability)
                    else:
                        tile = tiles.backward_tile(rows, H, bf16, capability)
                    assert max(tile.BK, tile.BN) <= tiles.padded_width(H)
                    assert tile.BN % tile.BK == 0
                    assert bf16 >= tile.WHOLE
