"""Compilation ahead of time, for devices that are not here: registers, spills and shared memory of every tile."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from llmdpd import kernels

if kernels.interpreted():
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

import torch
import triton

from llmdpd.kernels import batches, choice, features, losses, prompt_memory, report, tiles, time_rows, updates

# Bytes that a version other than the pinned one spills: by triton's version, direction, bf16, actions and target.
SPILLS = {
    ("3.6", "backward", False, 4, 80): 24,
    ("3.6", "backward", True, 32, 100): 40,
    ("3.6", "forward", True, 4, 90): 8,
}
VERSION = ".".join(triton.__version__.split(".")[:2])


@pytest.mark.slow
@pytest.mark.parametrize("capability", report.TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("actions", [4, 32])
def test_nothing_spills_at_width_256(capability: int, direction: str, bf16: bool, actions: int) -> None:
    for rows, launch in report.launches(256, actions, direction, bf16, capability):
        taken = report.usage(launch, capability)
        allowed = SPILLS.get((VERSION, direction, bf16, actions, capability), 0)
        assert taken.stack <= allowed, (rows, launch.constants, taken)
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
@pytest.mark.parametrize("capability", report.TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_products_of_float32_are_on_tensor_cores(capability: int, direction: str) -> None:
    _, launch = next(report.launches(256, 4, direction, False, capability))
    taken = report.usage(launch, capability)
    assert taken.products > 100, taken
    assert taken.multiply_adds < 250, taken  # Mish, noise and W_a a; with `ieee` 500 and more


@pytest.mark.slow
def test_products_of_float32_as_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_fp32_products", "ieee")
    _, launch = next(report.launches(256, 4, "forward", False, 90))
    taken = report.usage(launch, 90)
    assert taken.products == 0
    assert taken.multiply_adds > 400, taken
    assert taken.stack == 0


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "bf16"), [(80, True), (90, False), (90, True), (100, True)])
def test_the_critics_do_not_spill(capability: int, bf16: bool) -> None:
    for launch in report.mlp_launches(256, 43, 256, 1, 2, bf16, capability):
        taken = report.usage(launch, capability)
        assert taken.stack == 0, (launch.kernel, taken)
        assert taken.shared <= report.SHARED[capability]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "bf16", "actions"), [(80, True, 4), (90, True, 4), (90, False, 4), (100, True, 32)]
)
def test_learners_at_once_do_not_spill(capability: int, bf16: bool, actions: int) -> None:
    for launch in report.learner_launches(256, 256, actions, 8, bf16, capability):
        taken = report.usage(launch, capability)
        assert taken.stack == 0, (launch.kernel, taken)
        assert taken.shared <= report.SHARED[capability]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "short"), [(80, False), (90, True), (100, True)])
def test_reading_states_does_not_spill(capability: int, short: bool) -> None:
    """The default preset's batch: twelve prompts of 32 steps, forty states under each."""
    for launch in report.reading_launches(12, 40, 33, 128, short):
        taken = report.usage(launch, capability)
        assert taken.stack == 0, (launch.kernel, taken)
        assert taken.products > 10, (launch.kernel, taken)
        assert taken.shared <= report.SHARED[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_else_an_iteration_launches_does_not_spill(capability: int) -> None:
    """Two learners at Diffusion-QL's size: losses, AdamW's step, the time embedding; features of its states, what is
    kept of demonstrations, a choice among 50 actions."""
    L, B, S, A, K, T, H, P = 2, 256, 39, 4, 5, 16, 256, 300_000

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    levels, places = numbers(L, B, dtype=torch.int64), numbers(K, dtype=torch.int64)
    flat, values, alike = numbers(L, P), numbers(2 * L, B, 1), numbers(L, B, A)
    *step, _ = updates.step(
        flat, flat, (flat, flat), numbers(L, 9), numbers(1), updates.AdamW((0.9, 0.999), 1e-8, 0.01, 1.0), (flat, 0.005)
    )
    weights = [numbers(L, 2 * T, T), numbers(L, 2 * T), numbers(L, T, 2 * T), numbers(L, T)]
    W_t = numbers(L, H, A + T + S)[..., A : A + T]
    forward, embedded, rows = time_rows.forward(numbers(K, T), weights, W_t)
    whole = torch.int32
    tables = features.Tables(
        numbers(41, 5, dtype=whole), numbers(41), numbers(13, 5, dtype=whole), numbers(13), numbers(3, 3, dtype=whole)
    )
    columns = {"observations": numbers(B, S), "next_observations": numbers(B, S), "rewards": numbers(B)}
    columns |= {"actions": numbers(B, A), "expert_actions": numbers(B, A), "terminals": numbers(B)}
    shown = {"tokens.states": numbers(12, 32, S), "tokens.actions": numbers(12, 32, A)}
    scene = batches.Scene(numbers(S, 6, dtype=whole), numbers(3), 3, 6, (0, 1), (0, 1))
    turned = {"jitter": numbers(12, 3, 6), **{name: numbers(12) for name in ("cosine", "sine", "side")}}
    rows_of = numbers(B, S), (numbers(S), numbers(S)), tables, numbers(B, 53), numbers(B, 14)
    kept = prompt_memory.Raw(*numbers(2, 12, 33), numbers(12, 33, A + 26), numbers(12, 33, 14))
    launches = [
        *step,
        batches.launch(
            columns, levels.view(-1)[:B], numbers(12, 32, dtype=torch.int64), 4, columns | shown, scene, turned
        ),
        features.launch(*rows_of, (numbers(B, dtype=torch.int64), numbers(6), 50.0)),
        prompt_memory.launch(
            *(numbers(12, 32, dtype=torch.bool), numbers(12, 1), numbers(12, 32, A), numbers(12, 32, 14)),
            *(numbers(2, dtype=whole), 13, kept),
        ),
        choice.launch(numbers(64, 50), numbers(64, 50, A), levels.view(-1)[:64], numbers(64, A), 6, 1.0),
        losses.regression(values, values, numbers(L, B), numbers(L, B), 1.0, 0.99)[0],
        losses.actor(alike, alike, values, numbers(L), 1.0)[0],
        forward,
        time_rows.backward(numbers(K, T), weights, W_t, embedded, (rows, rows), [*weights, W_t]),
        time_rows.noisy_inputs(alike, alike, levels, places, numbers(K), embedded, numbers(L, B, S))[0],
        time_rows.level_sums(numbers(L, B, H, dtype=torch.bfloat16), levels, places, K, H)[0],
    ]
    for launch in launches:
        taken = report.usage(launch, capability)
        assert taken.stack == 0, (launch.kernel, taken)


@pytest.mark.slow
def test_a_spill_is_seen() -> None:
    """The naive way that the tiles are there to avoid: a whole product at once."""
    _, launch = next(report.launches(256, 4, "forward", True, 90))
    launch.constants.update(BM=128, BK=64, BN=128)
    assert report.usage(launch, 90).stack > 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operands", ["bf16", "tf32x3", "ieee"])
def test_every_tile_fits_its_tensors(direction: str, operands: tiles.Operands) -> None:
    for H in (1, 33, 64, 65, 128, 250, 256, 300, 512):
        for A in (1, 4, 9, 17, 32):
            for rows in (1, 2048, 2049, 4096, 4097, 10**6):
                for capability in (80, 86, 89, 90, 100, 120):
                    if direction == "forward":
                        tile = tiles.forward_tile(rows, H, A, operands, capability)
                    else:
                        tile = tiles.backward_tile(rows, H, operands, capability)
                    assert max(tile.BK, tile.BN) <= tiles.padded_width(H)
                    assert tile.BN % tile.BK == 0
                    assert operands == "bf16" or not tile.WHOLE
